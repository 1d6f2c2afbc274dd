//! `Watch`: block events as they happen, from where a watcher left off.
//!
//! *Bounds*: [`MAX_WATCHERS`] at once, [`REPLIES_AHEAD`] answers that a watcher did not take yet; beyond, it is told that
//! events are lost to it once it takes more, and what is remembered lies in the core's ring.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvtier_policy::{Event, EventKind};
use kvtier_proto::v1;
use kvtier_types::TenantId;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::codegen::BoxStream;

use crate::node::Node;
use crate::services::caller::Caller;

/// Watchers at once.
pub(crate) const MAX_WATCHERS: usize = 256;
/// Answers queued for one watcher.
const REPLIES_AHEAD: usize = 4;

/// Which events a watcher wants.
struct Filter {
    kinds: Vec<v1::EventKind>,
    model: String,
    /// Of one tenant and of what is shared; of all for operators.
    tenant: Option<TenantId>,
}

impl Filter {
    fn wants_turns(&self) -> bool {
        self.kinds.contains(&v1::EventKind::TurnBegan)
    }

    fn wants(&self, event: &Event) -> bool {
        let is_turn = event.kind == EventKind::Turn;
        // Blocks that are shared are everybody's; what runs next is its tenant's own business.
        let is_of = |t: &TenantId| event.tenant == *t || (!is_turn && event.tenant == TenantId::shared());
        let of_tenant = self.tenant.as_ref().is_none_or(is_of);
        (self.kinds.is_empty() && !is_turn || self.kinds.contains(&kind(event.kind)))
            && event.model.contains(&self.model)
            && of_tenant
    }
}

/// Counts a watcher for as long as it lives.
struct Seat(Arc<Node>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.watchers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream of events: first an answer that says where it begins.
pub(super) fn watch(
    node: &Arc<Node>,
    caller: &Caller,
    message: v1::WatchRequest,
) -> Result<BoxStream<v1::WatchReply>, Status> {
    let kinds = message.kinds.iter().map(|k| v1::EventKind::try_from(*k));
    let kinds: Vec<v1::EventKind> = kinds
        .collect::<Result<_, _>>()
        .map_err(|_| Status::invalid_argument("kinds holds one that this build lacks"))?;
    let tenant = (!caller.operator).then(|| caller.tenant.clone());
    let filter = Filter { kinds, model: message.model_contains, tenant };
    let seat = seat(node)?;
    let last = node.read_core(kvtier_policy::Core::last_event);
    let resumes = message.after_sequence > 0 || message.incarnation > 0;
    let same_life = message.incarnation == node.incarnation && message.after_sequence <= last;
    let lost = resumes && !same_life;
    let from = if resumes && same_life { message.after_sequence } else { last };
    let (sender, receiver) = mpsc::channel(REPLIES_AHEAD);
    node.tasks.spawn(feed(seat, filter, (from, lost), sender));
    Ok(Box::pin(ReceiverStream::new(receiver)))
}

fn seat(node: &Arc<Node>) -> Result<Seat, Status> {
    let taken = node.watchers.fetch_add(1, Ordering::Relaxed);
    let seat = Seat(Arc::clone(node));
    if taken >= MAX_WATCHERS {
        return Err(Status::resource_exhausted(format!("{MAX_WATCHERS} watchers at once: close some")));
    }
    Ok(seat)
}

/// Feeds a watcher until it leaves or the node stops.
async fn feed(
    seat: Seat,
    filter: Filter,
    (mut sequence, mut lost): (u64, bool),
    sender: mpsc::Sender<Result<v1::WatchReply, Status>>,
) {
    let node = &seat.0;
    let (mut first, mut told) = (true, 0);
    loop {
        let happened = node.happened.notified();
        tokio::pin!(happened);
        // Before the look, so that nothing in between is missed.
        happened.as_mut().enable();
        let (events, gap) = node.read_core(|core| core.events_after(sequence, filter.wants_turns()));
        let more = !events.is_empty();
        sequence = events.last().map_or(sequence, |e| e.sequence);
        // Pages of older events that are still there come after the gap was told.
        lost |= gap.is_some_and(|last| last > told);
        told = told.max(gap.unwrap_or(0));
        let events: Vec<v1::BlockEvent> = events.into_iter().filter(|e| filter.wants(e)).map(wire).collect();
        if first || lost || !events.is_empty() {
            let reply = v1::WatchReply { incarnation: node.incarnation, sequence, lost, events };
            if sender.send(Ok(reply)).await.is_err() {
                return;
            }
            (first, lost) = (false, false);
        }
        if more {
            continue;
        }
        tokio::select! {
            () = &mut happened => {}
            () = sender.closed() => return,
            () = node.stopping.cancelled() => return,
        }
    }
}

const fn kind(kind: EventKind) -> v1::EventKind {
    match kind {
        EventKind::Stored => v1::EventKind::BlockStored,
        EventKind::Removed => v1::EventKind::BlockRemoved,
        EventKind::Tainted => v1::EventKind::BlockTainted,
        EventKind::Claimed => v1::EventKind::BlockClaimed,
        EventKind::Released => v1::EventKind::BlockReleased,
        EventKind::ProgramEnded => v1::EventKind::ProgramEnded,
        EventKind::Corrupt => v1::EventKind::BlockCorrupt,
        EventKind::Turn => v1::EventKind::TurnBegan,
    }
}

fn wire(event: Event) -> v1::BlockEvent {
    let (graph, step_id) = event.step.map(|step| *step).unwrap_or_default();
    v1::BlockEvent {
        sequence: event.sequence,
        kind: kind(event.kind).into(),
        key: event.key.map(|key| key.as_bytes().to_vec()).unwrap_or_default().into(),
        tier: event.tier.map_or(v1::Tier::Unspecified, v1::Tier::from).into(),
        semantic: v1::SemanticType::from(event.semantic).into(),
        program_id: event.program,
        reason: event.reason.to_owned(),
        bytes: event.bytes,
        step_id,
        graph,
    }
}

/// Watchers there are.
pub(crate) fn watchers(count: &AtomicUsize) -> u64 {
    count.load(Ordering::Relaxed) as u64
}
