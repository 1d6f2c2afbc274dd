//! What requests ask to be kept: retentions become hints of the core, pins become claims of the owner [`OWNER`].
//!
//! *Bounds*: [`MAX_AT_ONCE`] requests at a time; retentions by the core's table of hinted blocks; pins by the budgets of one
//! owner of the tenant, [`MAX_BLOCKS`] a program or session, and half of `claims.max_claims`, so that verbs find room.
//!
//! *Invariant*: a request holds blocks of its own tenant only (`hints_hold_blocks_of_their_own_tenant`).

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::{ClaimRequest, Claiming, Survey};
use kvtier_types::{BlockKey, ClaimKind, ClaimName, FieldHasher, Outcome, RequestHints, TenantId, Tier};

use crate::claims::{entries, settle, unix_ms};
use crate::journaling;
use crate::node::Node;

/// Owner of the claims that requests make.
pub(crate) const OWNER: &str = "request hints";
/// Requests whose blocks are being held; those beyond hold nothing, and are counted.
pub(super) const MAX_AT_ONCE: usize = 64;
/// Blocks that one program or session may pin.
const MAX_BLOCKS: usize = 4096;
/// Blocks in one call of the core.
const STEP: usize = 1024;

/// Blocks of which the same is asked.
#[derive(Debug)]
pub(crate) struct Hold {
    /// Which.
    pub(crate) keys: Vec<BlockKey>,
    /// Priority, and for how long.
    pub(crate) retain: Option<(u8, Duration)>,
    /// Whether they shall not be evicted, and how long.
    pub(crate) pin: Option<Duration>,
}

/// Who asks: one claim for each.
#[derive(Debug)]
pub(crate) struct Holder(ClaimName);

impl Holder {
    /// The program of a request, or else its session, or else all requests of the tenant that name neither.
    pub(crate) fn new(tenant: &TenantId, request: &RequestHints) -> Self {
        let id = match (request.block.program_id.as_str(), request.session_id.as_str()) {
            ("", "") => "anonymous".to_owned(),
            ("", session) => format!("session {session}"),
            (program, _) => format!("program {program}"),
        };
        let fits = id.len() <= ClaimName::MAX_PART_BYTES;
        let digest = || hex::encode(FieldHasher::new("kvtier hint claim v1").text(&id).finish());
        let id = if fits { id } else { digest() };
        Self(ClaimName { tenant: tenant.clone(), owner: OWNER.to_owned(), id })
    }
}

/// Holds blocks in the background, as far as there is room.
pub(crate) fn retain_or_pin(node: &Arc<Node>, holder: Holder, holds: Vec<Hold>) {
    let Ok(permit) = Arc::clone(&node.hints.holding).try_acquire_owned() else {
        node.hints.counts.not_held(holds.len());
        return;
    };
    let node = Arc::clone(node);
    node.clone().tasks.spawn(async move {
        let _permit = permit;
        let Holder(name) = holder;
        let mut pinned: (Vec<BlockKey>, Duration) = Default::default();
        for hold in holds {
            let keys = own_keys(&node, &name.tenant, &hold.keys).await;
            if let Some(retain) = hold.retain {
                retain_all(&node, &keys, retain).await;
            }
            if let Some(ttl) = hold.pin {
                pinned.0.extend(keys);
                pinned.1 = pinned.1.max(ttl);
            }
        }
        if !pinned.0.is_empty() {
            pin(&node, name, pinned).await;
        }
    });
}

/// Those of these blocks that are here, or being written, and belong to the tenant.
async fn own_keys(node: &Arc<Node>, tenant: &TenantId, keys: &[BlockKey]) -> Vec<BlockKey> {
    let mut own = Vec::with_capacity(keys.len());
    for step in keys.chunks(STEP) {
        let of_tenant = |core: &kvtier_policy::Core| {
            step.iter().filter(|key| core.tenant_of(key) == Some(tenant)).copied().collect::<Vec<_>>()
        };
        own.extend(node.read_core(of_tenant));
        tokio::task::yield_now().await;
    }
    own
}

async fn retain_all(node: &Arc<Node>, keys: &[BlockKey], (priority, ttl): (u8, Duration)) {
    for step in keys.chunks(STEP) {
        if node.with_core(|core, now| core.retain_hint(now, step, priority, ttl)) != Outcome::Applied {
            node.hints.counts.not_held(1);
        }
        settle(node).await;
    }
}

/// Lets the holder's claim hold these blocks too.
async fn pin(node: &Arc<Node>, name: ClaimName, (mut keys, ttl): (Vec<BlockKey>, Duration)) {
    let _turn = node.claims_turn.lock().await;
    let live = node.with_core(|core, now| core.claim_view(now, &name));
    let mut request = ClaimRequest { name, revision: unix_ms(), kind: ClaimKind::Pin(Tier::Host), ttl };
    match live {
        Some(live) => {
            let held: HashSet<BlockKey> = live.blocks.iter().map(|block| block.key).collect();
            if live.remaining > ttl / 2 && keys.iter().all(|key| held.contains(key)) {
                return;
            }
            request.revision = request.revision.max(live.revision + 1);
            request.ttl = ttl.max(live.remaining);
            keys.retain(|key| !held.contains(key));
            keys.splice(0..0, live.blocks.iter().map(|block| block.key));
        }
        None if claims_of_others_need_room(node) => return node.hints.counts.not_held(1),
        None => {}
    }
    keys.truncate(MAX_BLOCKS);
    let mut survey = Survey::new(request.kind, keys);
    while node.read_core(|core| core.survey(&mut survey)) {
        tokio::task::yield_now().await;
    }
    let mut claiming = Claiming::new(request, survey, false);
    node.with_core_in_steps(|core, now| core.claim_some(now, &mut claiming));
    let claim = claiming.live(node.now());
    if !matches!(claiming.answer().outcome, Outcome::Applied | Outcome::Accepted | Outcome::Duplicate) {
        node.hints.counts.not_held(1);
    }
    let Some(claim) = claim else { return };
    settle(node).await;
    if let Ok(Err(error)) = journaling::append(node, entries(claim)).await {
        tracing::warn!(%error, "a pin of a request holds now, but a restart may end it: the journal cannot be written");
    }
}

fn claims_of_others_need_room(node: &Arc<Node>) -> bool {
    let [(_, pins), (_, retains), ..] = node.read_core(kvtier_policy::Core::claims_held);
    pins + retains >= node.config.claims.max_claims as u64 / 2
}
