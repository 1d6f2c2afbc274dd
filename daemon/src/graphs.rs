//! Declared graphs between memory and journal.
//!
//! *Order*: whoever declares, removes or writes behind holds [`Room::turn`] until its entries are durable, so that the
//! journal hears of a graph in the order in which memory does. A declaration is durable before it counts; how far steps are
//! is written behind every [`FLUSH_EVERY`]: after a crash, steps that ended since then are reported again or follow from
//! what begins next.
//! *Lock order*: the graphs' own lock is held for short looks and never with the core's.

use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::programs::graphs::{GraphCounts, GraphName, Graphs, Plan, SharedContext, Step, StepState};
use kvtier_proto::convert::WireError;
use kvtier_proto::{convert, v1};
use kvtier_storage::journal::{Entry, GraphKey, GraphProgress, GraphRecord};
use kvtier_types::Instant;
use parking_lot::Mutex;
use prost::Message;
use tokio::time::interval;

use crate::journaling::append_or_warn;
use crate::node::Node;

/// How often it is written how far steps are, and looked which graphs are over.
const FLUSH_EVERY: Duration = Duration::from_secs(5);
/// Graphs whose progress is written at once.
const FLUSH_AT_ONCE: usize = 256;

/// The graphs of a node.
#[derive(Debug, Default)]
pub(crate) struct Room {
    graphs: Mutex<Graphs>,
    /// Held by whoever journals of graphs, until it is durable.
    pub(crate) turn: tokio::sync::Mutex<()>,
}

impl Room {
    /// Looks at the graphs, or changes them.
    pub(crate) fn with<R>(&self, call: impl FnOnce(&mut Graphs) -> R) -> R {
        call(&mut self.graphs.lock())
    }

    /// How many there are.
    pub(crate) fn counts(&self) -> GraphCounts {
        self.with(|graphs| graphs.counts())
    }

    /// Takes in what the journal said at the start.
    pub(crate) fn restore(&self, now: Instant, records: Vec<GraphRecord>) {
        for record in records {
            let name = GraphName { tenant: record.key.tenant, program: record.key.program };
            let plan = v1::DeclareRequest::decode(record.bytes.as_slice())
                .map_err(anyhow::Error::from)
                .and_then(|message| Ok(message.steps.into_iter().map(step).collect::<Result<_, _>>()?))
                .and_then(|steps| Ok(Plan::new(steps)?));
            match plan {
                Ok(plan) => {
                    let states: Vec<StepState> = record.progress.into_iter().map(state).collect();
                    self.with(|graphs| graphs.restore(now, name, (record.revision, plan), &states));
                }
                Err(error) => {
                    tracing::warn!(program = name.program, %error, "a declared graph cannot be read: left out")
                }
            }
        }
    }
}

/// The entries that make a declaration durable; without steps, those that end it.
pub(crate) fn entries(name: &GraphName, revision: u64, plan: &Plan) -> Vec<Entry> {
    if plan.is_empty() {
        return vec![Entry::GraphEnded(key(name))];
    }
    // Steps as the plan has them: progress counts them in this order.
    let steps = plan.steps().iter().map(wire_step).collect();
    let bytes = v1::DeclareRequest { steps, ..Default::default() }.encode_to_vec();
    let record = GraphRecord { key: key(name), revision, bytes, progress: Vec::new() };
    record.parts().into_iter().map(Entry::Graph).collect()
}

pub(crate) fn key(name: &GraphName) -> GraphKey {
    GraphKey { tenant: name.tenant.clone(), program: name.program.clone() }
}

/// A step as it came over the wire, not checked.
///
/// # Errors
/// For keys that are none, and a part of a context that is named in two ways.
pub(crate) fn step(wire: v1::GraphStep) -> Result<Step, WireError> {
    let shares = convert::semantic(wire.shares);
    Ok(Step {
        id: wire.step_id,
        program: wire.program_id,
        after: wire.after,
        expected: Some(wire.expected_ms).filter(|ms| *ms > 0).map(Duration::from_millis),
        gap: Duration::from_millis(wire.tool_gap_ms),
        tokens: wire.tokens,
        kind: wire.kind,
        shares,
        shared: wire.shared_context.map(shared).transpose()?,
    })
}

fn shared(wire: v1::SharedContext) -> Result<SharedContext, WireError> {
    let v1::SharedContext { program_id: program, start_token: start, end_token: end, keys } = wire;
    if keys.is_empty() {
        return Ok(SharedContext::Tokens { program, start, end });
    }
    if !program.is_empty() || start != 0 || end != 0 {
        return Err(WireError::TwoWays("shared_context"));
    }
    convert::unpack_keys(&keys).map(SharedContext::Blocks)
}

fn wire_shared(shared: &SharedContext) -> v1::SharedContext {
    match shared {
        SharedContext::Tokens { program, start, end } => v1::SharedContext {
            program_id: program.clone(),
            start_token: *start,
            end_token: *end,
            ..Default::default()
        },
        SharedContext::Blocks(keys) => {
            v1::SharedContext { keys: convert::pack_keys(keys.iter()), ..Default::default() }
        }
    }
}

/// A step as it goes over the wire.
pub(crate) fn wire_step(step: &Step) -> v1::GraphStep {
    v1::GraphStep {
        step_id: step.id.clone(),
        program_id: step.program.clone(),
        after: step.after.clone(),
        expected_ms: step.expected.map_or(0, millis),
        tool_gap_ms: millis(step.gap),
        tokens: step.tokens,
        kind: step.kind.clone(),
        shares: v1::SemanticType::from(step.shares).into(),
        shared_context: step.shared.as_ref().map(wire_shared),
    }
}

/// Whole milliseconds.
pub(crate) fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

const fn number(state: StepState) -> u8 {
    match state {
        StepState::Waiting => 0,
        StepState::Running => 1,
        StepState::Ended => 2,
    }
}

const fn state(number: u8) -> StepState {
    match number {
        1 => StepState::Running,
        2 => StepState::Ended,
        _ => StepState::Waiting,
    }
}

/// Writes behind how far steps are, and forgets what is over, until the node stops, and then once more.
pub(crate) async fn run(node: Arc<Node>) {
    let mut ticks = interval(FLUSH_EVERY);
    loop {
        tokio::select! {
            () = node.stopping.cancelled() => break,
            _ = ticks.tick() => flush(&node).await,
        }
    }
    flush(&node).await;
}

/// Writes how far steps are now, and which declarations are over.
pub(crate) async fn flush(node: &Arc<Node>) {
    loop {
        let _turn = node.graphs.turn.lock().await;
        let now = node.now();
        let (gone, changed) = node.graphs.with(|graphs| (graphs.expire(now), graphs.take_changes(FLUSH_AT_ONCE)));
        let more = changed.len() == FLUSH_AT_ONCE;
        let progress = changed.into_iter().map(|(name, revision, states)| {
            let steps = states.into_iter().map(number).collect();
            Entry::GraphProgress(GraphProgress { key: key(&name), revision, steps })
        });
        let ended = gone.iter().map(|name| Entry::GraphEnded(key(name)));
        let entries: Vec<Entry> = ended.chain(progress).collect();
        if !append_or_warn(node, entries, "how far declared steps are").await || !more {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use kvtier_storage::journal::{Journal, batches};

    use super::*;

    #[test]
    fn a_declaration_comes_back_from_its_entries() {
        let name = GraphName { tenant: kvtier_types::TenantId::shared(), program: "p".into() };
        let step = |id: &str, after: &[&str]| Step {
            id: id.into(),
            after: after.iter().map(|a| (*a).to_owned()).collect(),
            expected: Some(Duration::from_millis(1500)),
            gap: Duration::from_millis(20),
            tokens: 7,
            kind: "k".into(),
            shares: kvtier_types::SemanticType::Document,
            shared: Some(if after.is_empty() {
                SharedContext::Tokens { program: "boss".into(), start: 16, end: 64 }
            } else {
                SharedContext::Blocks(vec![kvtier_types::BlockKey::new([7; 32])])
            }),
            ..Step::default()
        };
        let plan = Plan::new(vec![step("b", &["a"]), step("a", &[])]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path()).unwrap();
        journal.append(&entries(&name, 3, &plan)).unwrap();
        let steps = vec![number(StepState::Ended), number(StepState::Running)];
        journal.append(&[Entry::GraphProgress(GraphProgress { key: key(&name), revision: 3, steps })]).unwrap();
        drop(journal);
        let room = Room::default();
        room.restore(Instant::ZERO, Journal::open(dir.path()).unwrap().1.graphs);
        let view = room.with(|graphs| graphs.view(Instant::ZERO, &name)).unwrap();
        assert_eq!(view.revision, 3);
        let told: Vec<_> = view.steps.iter().map(|s| (s.step.clone(), s.state)).collect();
        assert_eq!(told, [(step("a", &[]), StepState::Ended), (step("b", &["a"]), StepState::Running)]);
        assert_eq!(room.counts().graphs, 1);
    }

    #[test]
    fn a_part_of_a_context_is_named_in_one_way() {
        let of = |shared_context: v1::SharedContext| {
            step(v1::GraphStep { shared_context: Some(shared_context), ..Default::default() })
        };
        let keys = convert::pack_keys(&[kvtier_types::BlockKey::new([7; 32])]);
        assert!(of(v1::SharedContext { keys: keys.clone(), end_token: 5, ..Default::default() }).is_err());
        assert!(of(v1::SharedContext { keys: keys.slice(1..), ..Default::default() }).is_err());
        let read = of(v1::SharedContext { keys, ..Default::default() }).unwrap();
        assert!(matches!(read.shared, Some(SharedContext::Blocks(keys)) if keys.len() == 1));
    }

    #[test]
    fn the_longest_declaration_is_one_frame() {
        use kvtier_policy::programs::graphs::{MAX_GRAPH_BYTES, MAX_STEPS_PER_GRAPH};
        let before: Vec<String> = (0..16).map(|n| n.to_string()).collect();
        let step = |n: usize| Step {
            id: n.to_string(),
            after: if n < 16 { Vec::new() } else { before.clone() },
            expected: Some(Duration::from_millis(u64::MAX)),
            gap: Duration::from_millis(u64::MAX),
            tokens: u32::MAX,
            kind: "k".repeat(28),
            ..Step::default()
        };
        let plan = Plan::new((0..MAX_STEPS_PER_GRAPH).map(step).collect()).unwrap();
        let name = GraphName { tenant: kvtier_types::TenantId::shared(), program: "p".repeat(128) };
        let entries = entries(&name, u64::MAX, &plan);
        assert_eq!(batches(&entries).count(), 1, "{} bytes", plan.bytes());
        assert!(plan.bytes() > MAX_GRAPH_BYTES / 2 && plan.bytes() <= MAX_GRAPH_BYTES, "{}", plan.bytes());
        let encoded = v1::DeclareRequest { steps: plan.steps().iter().map(wire_step).collect(), ..Default::default() };
        assert!(encoded.encoded_len() <= plan.bytes());
    }
}
