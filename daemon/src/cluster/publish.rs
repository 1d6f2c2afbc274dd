//! Tells the directory what this node holds, a flight of batches at a time.

use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::Publish;
use tokio::time::{sleep, timeout};

use super::Cluster;
use super::beat::judge;
use crate::directory::DirectoryError;
use crate::node::Node;

/// How long changes are gathered before they are told.
const GATHER: Duration = Duration::from_millis(5);
/// Pause after a flight that was not answered.
const RETRY: Duration = Duration::from_millis(500);
/// How often it is looked for changes that nobody woke us for.
const IDLE: Duration = Duration::from_secs(1);

/// Publishes until the node stops.
pub(super) async fn run(node: Arc<Node>, cluster: Arc<Cluster>) {
    let mut is_full = false;
    loop {
        tokio::select! {
            () = node.stopping.cancelled() => return,
            _ = timeout(IDLE, cluster.publishing.notified()) => {}
        }
        sleep(GATHER).await;
        while !node.stopping.is_cancelled() {
            match node.with_core(|core, _| core.publish()) {
                Publish::Nothing => break,
                Publish::Again => tokio::task::yield_now().await,
                Publish::Flight(edition, batches) => {
                    let answers = cluster.directory.apply(cluster.id.number(), edition, &batches).await;
                    match &answers {
                        Ok(_) => is_full = false,
                        // It answers, so that what it knows is still of use.
                        Err(error @ DirectoryError::Full { .. }) => {
                            if !is_full {
                                tracing::warn!(%error, "what is new here is not published: give the directory more memory");
                            }
                            is_full = true;
                        }
                        Err(error) => cluster.note_directory(node.now(), Some(error.to_string())),
                    }
                    let verdict = node.with_core(|core, _| core.published(answers.as_deref().ok()));
                    judge(&cluster, verdict, "the directory's answer shows that it lost entries of this node");
                    if answers.is_err() {
                        drop(timeout(RETRY, node.stopping.cancelled()).await);
                    }
                }
            }
        }
    }
}
