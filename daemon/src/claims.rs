//! Claims between core and journal: what was acknowledged is durable, and what ended does not come back.
//!
//! *Order*: whoever changes claims holds [`Node::claims_turn`] from the change in the core until its entries are durable,
//! so that the journal has them in the order in which they happened.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvtier_policy::{ClaimView, Core};
use kvtier_storage::journal::{ClaimRecord, Entry};
use kvtier_types::{ClaimName, Instant};

use crate::journaling::append_or_warn;
use crate::node::Node;

/// Milliseconds of Unix time.
pub(crate) fn unix_ms() -> u64 {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// A span in milliseconds.
pub(crate) fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// The entries that make a claim durable as it is.
pub(crate) fn entries(claim: ClaimView) -> Vec<Entry> {
    let record = ClaimRecord {
        name: claim.name,
        revision: claim.revision,
        kind: claim.kind,
        until_unix_ms: unix_ms().saturating_add(millis(claim.remaining)),
        blocks: claim.blocks,
    };
    record.parts().into_iter().map(Entry::Claim).collect()
}

/// Brings the catalog in step with what was claimed or let go, in steps that leave others their turn.
pub(crate) async fn settle(node: &Arc<Node>) {
    while node.with_core(|core, _| core.settle_claims()) {
        tokio::task::yield_now().await;
    }
}

/// Journals the claims that ended by themselves. The caller has had its turn since they did.
pub(crate) async fn journal_expired(node: &Arc<Node>) {
    settle(node).await;
    let ended = node.with_core(|core, _| core.take_expired_claims());
    if ended.is_empty() {
        return;
    }
    tracing::info!(count = ended.len(), "claims ended: their time is over");
    let entries = ended.into_iter().map(Entry::ClaimEnded).collect();
    // Their deadlines are in the journal as well.
    append_or_warn(node, entries, "the end of claims").await;
}

/// Gives the core the claims of a former life. Answers with those whose time ended meanwhile.
pub(crate) fn recover(core: &mut Core, now: Instant, claims: Vec<ClaimRecord>) -> Vec<ClaimName> {
    let clock = unix_ms();
    let mut ended = Vec::new();
    for claim in claims {
        let remaining = claim.until_unix_ms.saturating_sub(clock);
        if remaining == 0 {
            ended.push(claim.name);
            continue;
        }
        let ClaimRecord { name, revision, kind, blocks, .. } = claim;
        core.recover_claim(
            now,
            ClaimView { name, revision, kind, remaining: Duration::from_millis(remaining), blocks },
        );
    }
    ended
}
