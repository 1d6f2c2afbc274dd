//! What the parts of a session share.

use std::sync::Arc;

use kvtier_types::NamespaceId;
use parking_lot::RwLock;
use tokio::sync::Notify;

use crate::counters::Counters;
use crate::device::DeviceSide;
use crate::keys::KeySpace;
use crate::link::Link;
use crate::report::Reports;
use crate::spec::Spec;

/// Owned by the session, its background tasks and its copy threads.
#[derive(Debug)]
pub struct Shared {
    /// What the session was opened with. Its namespace is the first one; see [`Shared::keys`] for the current.
    pub spec: Spec,
    /// The attachment.
    pub link: Link,
    /// Statistics.
    pub counters: Arc<Counters>,
    /// Way to the daemon for everything nobody waits for.
    pub reports: Reports,
    /// The device that the engine's memory lies in; none for host memory.
    pub(crate) device: Option<Arc<DeviceSide>>,
    /// Rung when the namespace changes.
    pub namespace_changed: Notify,
    keys: RwLock<Arc<KeySpace>>,
}

impl Shared {
    /// The shared state of a session that is not attached yet.
    #[must_use]
    pub(crate) fn new(
        spec: Spec,
        device: Option<Arc<DeviceSide>>,
        (counters, reports): (Arc<Counters>, Reports),
    ) -> Self {
        let keys = KeySpace::new(spec.namespace.clone(), &spec.layout.groups);
        Self {
            spec,
            link: Link::default(),
            counters,
            reports,
            device,
            namespace_changed: Notify::new(),
            keys: RwLock::new(Arc::new(keys)),
        }
    }

    /// Keys of the current namespace.
    #[must_use]
    pub fn keys(&self) -> Arc<KeySpace> {
        Arc::clone(&self.keys.read())
    }

    /// Changes the revision: from the return on, keys are those of the new namespace. Answers its id.
    pub fn switch_revision(&self, revision: &str) -> NamespaceId {
        let mut keys = self.keys.write();
        *keys = Arc::new(keys.with_revision(revision));
        self.namespace_changed.notify_one();
        *keys.id()
    }
}
