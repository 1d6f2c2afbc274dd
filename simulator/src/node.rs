//! A node: the daemon's core and sessions, its start and its end, its timers, and its word to the directory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use kvtier_policy::directory::{NodeRecord, NodeState};
use kvtier_policy::peer::{PeerSession, SessionConfig};
use kvtier_policy::{Core, CoreConfig, FetchConfig, LeaseId, Look, MoveId, Publish, Verdict, WriteBehind};
use kvtier_types::{Instant, Location, NodeId, NodeNumber, RecordMeta, ShardKey, Tier};

use crate::disk::Disk;
use crate::events::{Duty, Event};
use crate::memory::SharedPool;
use crate::network::{Answer, Ask, ExportName, Message, Party, Place};
use crate::peers::{Fetching, Staging};
use crate::rng::Rng;
use crate::workload::{Engine, Request};
use crate::world::World;

/// Between heartbeats.
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(500);
/// Between two looks at what there is to publish.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);
/// Between audits of the directory.
const AUDIT_EVERY: Duration = Duration::from_millis(1500);
/// How long the directory may take.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_millis(300);
/// Steps of publication in one go.
const MAX_PUBLISH_STEPS: usize = 64;

/// How sessions with peers are bounded here.
pub(crate) const SESSION: SessionConfig = SessionConfig {
    window_bytes: 6 * crate::memory::BLOCK,
    max_exports: 2,
    max_shards: 4,
    first_shards: 2,
    ttl: Duration::from_millis(2500),
    margin: Duration::from_millis(200),
    answer: Duration::from_millis(600),
};

/// A node, alive or not.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) number: NodeNumber,
    /// Starts so far.
    pub(crate) incarnation: u64,
    pub(crate) config: CoreConfig,
    frames: u64,
    pub(crate) disk: Disk,
    pub(crate) disk_slow: bool,
    /// Evictions by verb: what must not come back.
    pub(crate) journal: BTreeMap<ShardKey, u64>,
    pub(crate) live: Option<Live>,
}

/// What dies with the process.
pub(crate) struct Live {
    pub(crate) life: u64,
    pub(crate) core: Core,
    pub(crate) pool: SharedPool,
    pub(crate) sessions: BTreeMap<(NodeNumber, u64), PeerSession<Place>>,
    pub(crate) fetching: BTreeMap<MoveId, Fetching>,
    /// Exports asked for and not yet released: the reader counts on them.
    pub(crate) asked: BTreeMap<ExportName, Instant>,
    /// Exports granted, until when at most.
    pub(crate) granted: BTreeMap<ExportName, (LeaseId, Instant)>,
    pub(crate) staging: Vec<Staging>,
    pub(crate) engines: Vec<Engine>,
    pub(crate) requests: BTreeMap<u64, Request>,
    pub(crate) calls: BTreeMap<u64, Pending>,
    /// The highest incarnation heard of each node.
    pub(crate) known: BTreeMap<NodeNumber, u64>,
    pub(crate) draining: bool,
    publishing: bool,
    next_audit: Instant,
    armed: Option<Instant>,
    wakes: (Instant, u32),
}

/// A call to the directory that was not answered yet.
#[derive(Debug)]
pub(crate) enum Pending {
    Heartbeat,
    Publish,
    Audit,
    Locate(Locating),
}

/// Shards that a long lookup asks the directory for first, and at once after those.
const PARTS: (usize, usize) = (2, 3);

/// A lookup whose shards are being located, part after part.
#[derive(Debug)]
pub(crate) struct Locating {
    pub(crate) request: u64,
    pub(crate) look: Look,
    /// Which part is being asked for.
    pub(crate) part: usize,
    /// Whether the directory answered so far: else it is not asked again.
    pub(crate) answers: bool,
}

impl Locating {
    pub(crate) fn range(&self) -> Range<usize> {
        self.look.parts(PARTS.0, PARTS.1).nth(self.part).unwrap_or_default()
    }

    pub(crate) fn keys(&self) -> &[ShardKey] {
        &self.look.unknown()[self.range()]
    }

    pub(crate) fn is_last(&self) -> bool {
        self.range().end == self.look.unknown().len()
    }
}

impl Node {
    pub(crate) fn new(at: usize, rng: &mut Rng) -> Self {
        let id = NodeId::new(&format!("node-{at}")).expect("letters and digits");
        let write_behind = if rng.chance(500) { WriteBehind::Read } else { WriteBehind::All };
        let config = CoreConfig {
            disk: rng.chance(600),
            object: rng.chance(800),
            eager_offload: rng.chance(600),
            max_offloads: 3,
            max_onboards: 4,
            lease_ttl: Duration::from_secs(4),
            reserve_ttl: Duration::from_secs(2),
            attachment_ttl: Duration::from_secs(3),
            write_behind,
            fetch: FetchConfig {
                max_fetches: 8,
                max_bytes: 6 * crate::memory::BLOCK,
                patience: Duration::from_millis(400),
                deadline: Duration::from_millis(1500),
            },
            ..CoreConfig::default()
        };
        let disk = Disk::new(rng.index(30) + 12);
        Self {
            number: id.number(),
            id,
            incarnation: 0,
            config,
            frames: rng.between(10, 26),
            disk,
            disk_slow: false,
            journal: BTreeMap::new(),
            live: None,
        }
    }
}

impl World {
    /// Starts a node's daemon over what its disk and the object store hold of it.
    pub(crate) fn start(&mut self, at: usize) {
        let now = self.now;
        let join_first = self.rng.chance(500);
        let own = self.store.of(at);
        let node = &mut self.nodes[at];
        node.incarnation += 1;
        let pool = SharedPool::new(node.frames);
        let mut core = Core::new(node.config.clone(), Box::new(pool.clone()), |bytes| bytes);
        if join_first {
            core.join(&node.id, node.incarnation);
        }
        let disk = node.disk.records.iter().map(|(at, r)| (r.meta.clone(), *at)).collect();
        recover(&mut core, Tier::Disk, disk, &node.journal);
        recover(&mut core, Tier::Object, own, &node.journal);
        if !join_first {
            core.join(&node.id, node.incarnation);
        }
        let live = Live {
            life: node.incarnation,
            core,
            pool,
            sessions: BTreeMap::new(),
            fetching: BTreeMap::new(),
            asked: BTreeMap::new(),
            granted: BTreeMap::new(),
            staging: Vec::new(),
            engines: Vec::new(),
            requests: BTreeMap::new(),
            calls: BTreeMap::new(),
            known: BTreeMap::new(),
            draining: false,
            publishing: false,
            next_audit: now + AUDIT_EVERY,
            armed: None,
            wakes: (now, 0),
        };
        node.live = Some(live);
        self.note(format_args!("node {at} starts"));
        self.schedule(at, Duration::ZERO, Duty::Heartbeat);
        self.schedule(at, Duration::from_millis(5), Duty::Publish);
        self.schedule(at, Duration::from_millis(20), Duty::Engine);
        self.schedule(at, Duration::from_millis(900), Duty::EngineBeat);
        self.attach_engines(at);
    }

    /// A node's process dies.
    pub(crate) fn crash(&mut self, at: usize, empty: bool) {
        self.note(format_args!("node {at} dies"));
        let node = &mut self.nodes[at];
        node.live = None;
        node.disk.crash(self.now, &mut self.rng);
        if empty {
            node.disk.wipe();
            node.journal.clear();
        }
        self.grants.retain(|name, _| name.owner != at && name.reader != at);
    }

    pub(crate) fn schedule(&mut self, node: usize, after: Duration, duty: Duty) {
        let life = self.live(node).life;
        self.queue.push(self.now + after, Event::OnNode { node, life, duty });
    }

    pub(crate) fn duty(&mut self, n: usize, duty: Duty) {
        match duty {
            Duty::Wake => self.wake(n),
            Duty::Heartbeat => {
                let record = Box::new(self.record(n));
                self.call(n, Ask::Heartbeat(record), Pending::Heartbeat);
                self.schedule(n, HEARTBEAT, Duty::Heartbeat);
            }
            Duty::Publish => {
                self.publish(n);
                self.schedule(n, PUBLISH_EVERY, Duty::Publish);
            }
            Duty::CallTimeout { call } => {
                if let Some(pending) = self.live(n).calls.remove(&call) {
                    self.call_ended(n, pending, None);
                }
            }
            Duty::Engine => self.engine_acts(n),
            Duty::EngineBeat => self.engines_beat(n),
            Duty::Deadline { request } => self.deadline(n, request),
            Duty::Loaded { request } => self.loaded(n, request),
            Duty::Computed { request } => self.computed(n, request),
            Duty::Moved(work) => self.moved(n, work),
        }
    }

    /// Sets the timer that core and sessions want next.
    pub(crate) fn arm(&mut self, n: usize) {
        let live = self.live(n);
        let sessions = live.sessions.values().filter_map(PeerSession::poll_timeout).min();
        let staging = live.staging.iter().map(|s| s.until).min();
        let Some(next) = live.core.poll_timeout().into_iter().chain(sessions).chain(staging).min() else { return };
        if live.armed.is_none_or(|armed| next < armed) {
            live.armed = Some(next);
            let life = live.life;
            let at = next.max(self.now);
            self.queue.push(at, Event::OnNode { node: n, life, duty: Duty::Wake });
        }
    }

    fn wake(&mut self, n: usize) {
        let now = self.now;
        let live = self.live(n);
        live.armed = live.armed.filter(|at| *at > now);
        live.wakes = if live.wakes.0 == now { (now, live.wakes.1 + 1) } else { (now, 1) };
        if live.wakes.1 > 100 {
            self.fail("every-operation-ends", format_args!("node {n}: a timer that is due is set again and again"));
            return;
        }
        let reaped = live.core.expire(now);
        live.sessions.values_mut().for_each(|s| s.expire(now));
        live.granted.retain(|_, (_, until)| *until > now);
        self.engines_reaped(n, &reaped);
    }

    fn record(&mut self, n: usize) -> NodeRecord {
        let id = self.nodes[n].id.clone();
        let live = self.live(n);
        let memory = live.pool.lock();
        let free_host_bytes = memory.capacity_bytes() - memory.used_bytes();
        drop(memory);
        let edition = live.core.edition().expect("every node joined the cluster");
        let state = if live.draining { NodeState::Draining } else { NodeState::Ready };
        let peer = format!("node-{n}:1");
        NodeRecord { id, edition, state, warming: false, peer, free_host_bytes, packs: Vec::new() }
    }

    /// Asks the directory.
    pub(crate) fn call(&mut self, n: usize, ask: Ask, pending: Pending) {
        let call = self.take_id();
        let node = self.nodes[n].number;
        let live = self.live(n);
        live.calls.insert(call, pending);
        let life = live.life;
        self.schedule(n, CALL_TIMEOUT, Duty::CallTimeout { call });
        self.send(Party::Node(n), Party::Directory, Message::Ask { life, call, node, ask });
    }

    /// The directory answered. Answers to a former life, or that come late, are nobody's.
    pub(crate) fn answered(&mut self, n: usize, life: u64, call: u64, answer: Answer) {
        if self.live(n).life != life {
            return;
        }
        if let Some(pending) = self.live(n).calls.remove(&call) {
            self.call_ended(n, pending, Some(answer));
        }
    }

    fn call_ended(&mut self, n: usize, pending: Pending, answer: Option<Answer>) {
        let now = self.now;
        match (pending, answer) {
            (Pending::Heartbeat, Some(Answer::Heard(records))) => {
                let own = self.nodes[n].number;
                let live = self.live(n);
                live.core.heard(now, &records);
                for record in records.iter().filter(|r| r.id.number() != own) {
                    let known = live.known.entry(record.id.number()).or_default();
                    *known = (*known).max(record.edition.incarnation());
                }
            }
            (Pending::Publish, answer) => {
                let answers =
                    if let Some(Answer::Applied(answers)) = &answer { Some(answers.as_slice()) } else { None };
                let verdict = self.live(n).core.published(answers);
                self.told(n, verdict);
            }
            (Pending::Audit, answer) => {
                let verdict = match answer {
                    Some(Answer::Digests(edition, digests)) => self.live(n).core.audited(edition, &digests),
                    _ => Verdict::Whole,
                };
                self.told(n, verdict);
            }
            (Pending::Locate(mut locating), answer) => {
                let replicas = if let Some(Answer::Located(replicas)) = answer { Some(replicas) } else { None };
                locating.answers = replicas.is_some();
                self.located_part(n, locating, &replicas.unwrap_or_default());
            }
            (Pending::Heartbeat, _) => {}
        }
    }

    fn told(&mut self, n: usize, verdict: Verdict) {
        self.live(n).publishing = false;
        match verdict {
            Verdict::Whole => {}
            Verdict::Anew => self.stats.count("publication", "anew"),
            Verdict::Superseded(_) => {
                self.fail("directory-converges", format_args!("node {n} is told of a later edition of its own name"));
            }
        }
    }

    /// One flight or audit at a time, as the daemon does.
    fn publish(&mut self, n: usize) {
        let now = self.now;
        let live = self.live(n);
        if live.publishing {
            return;
        }
        for _ in 0..MAX_PUBLISH_STEPS {
            match live.core.publish() {
                Publish::Again => {}
                Publish::Flight(edition, batches) => {
                    live.publishing = true;
                    self.stats.count("publication", "flights");
                    self.call(n, Ask::Apply(edition, batches), Pending::Publish);
                    return;
                }
                Publish::Nothing => {
                    if live.next_audit <= now {
                        live.next_audit = now + AUDIT_EVERY;
                        live.publishing = true;
                        let edition = live.core.edition().expect("every node joined the cluster");
                        self.stats.count("publication", "audits");
                        self.call(n, Ask::Digests(edition), Pending::Audit);
                    }
                    return;
                }
            }
        }
    }
}

/// Feeds recovered records to a core as the daemon does: parents first, of one key the oldest first, and nothing that was
/// evicted by verb.
fn recover(core: &mut Core, tier: Tier, mut records: Vec<(RecordMeta, Location)>, journal: &BTreeMap<ShardKey, u64>) {
    records.sort_by_key(|(meta, _)| (meta.depth_blocks, meta.sequence));
    for (meta, at) in records {
        let evicted = journal.get(&meta.key).is_some_and(|up_to| meta.sequence <= *up_to);
        core.sequence_floor(meta.sequence);
        if !evicted {
            core.recover(tier, &meta, at);
        }
    }
}
