//! One run: nodes, directory, object store and network, driven by one event queue.
//!
//! *Bounds*: events are counted; a run that passes [`MAX_EVENTS`] fails by the name `every-operation-ends`.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::time::Duration;

use kvtier_types::{Instant, NodeNumber};

use crate::checkers::{Failure, Grant};
use crate::directory::Directory;
use crate::disk::ObjectStore;
use crate::events::{Event, Queue};
use crate::faults::Fault;
use crate::memory::Sealings;
use crate::network::{ExportName, Message, Network, Party};
use crate::node::{Live, Node};
use crate::peers::Read;
use crate::prompts::Prompts;
use crate::report::Stats;
use crate::rng::Rng;

/// Events of one run at most.
const MAX_EVENTS: u64 = 400_000;
/// After the faults have ended: time for everything to end and for the directory to be told everything.
const QUIET: Duration = Duration::from_secs(12);
/// After everything was evicted: time for its withdrawal.
const LAST: Duration = Duration::from_secs(4);
/// How often the directory saves its state.
const SNAPSHOTS_EVERY: Duration = Duration::from_millis(1500);

/// A planted bug: the driver breaks the protocol at its boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// Nobody compares incarnations: requests for a former life reach the present one as its own.
    IncarnationCheckSkipped,
    /// Owners end export leases as soon as they are granted.
    LeaseReleasedEarly,
    /// Nodes are told the digests they expect, whatever the directory holds.
    DigestDropped,
}

impl Sabotage {
    /// Every planted bug.
    pub const ALL: [Self; 3] = [Self::IncarnationCheckSkipped, Self::LeaseReleasedEarly, Self::DigestDropped];

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::IncarnationCheckSkipped => "incarnation-check-skipped",
            Self::LeaseReleasedEarly => "lease-released-early",
            Self::DigestDropped => "digest-dropped",
        }
    }
}

/// What a run is of.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Decides everything that is left to chance.
    pub seed: u64,
    /// Nodes of the cluster, at least two.
    pub nodes: usize,
    /// Requests of engines, all together.
    pub steps: u64,
    /// Whether anything goes wrong.
    pub faults: bool,
    /// A planted bug.
    pub sabotage: Option<Sabotage>,
    /// Whether every event is printed.
    pub verbose: bool,
}

/// What a run came to.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Hash of everything that happened, in order.
    pub digest: u64,
    /// Events that happened.
    pub events: u64,
    /// Counts by kind.
    pub stats: Stats,
    /// What a checker found.
    pub failure: Option<Failure>,
}

/// What happened: hashed, and printed where somebody wants to read it.
#[derive(Debug)]
pub(crate) struct Log {
    hash: u64,
    verbose: bool,
}

impl fmt::Write for Log {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        if self.verbose {
            eprint!("{text}");
        }
        Ok(())
    }
}

/// The state of a run.
pub(crate) struct World {
    pub(crate) options: Options,
    pub(crate) rng: Rng,
    pub(crate) queue: Queue,
    pub(crate) now: Instant,
    pub(crate) nodes: Vec<Node>,
    pub(crate) numbers: BTreeMap<NodeNumber, usize>,
    pub(crate) network: Network,
    pub(crate) directory: Directory,
    pub(crate) store: ObjectStore,
    pub(crate) sealings: Sealings,
    pub(crate) prompts: Prompts,
    pub(crate) reads: BTreeMap<u64, Read>,
    pub(crate) grants: BTreeMap<ExportName, Grant>,
    pub(crate) faults: Vec<Fault>,
    pub(crate) stats: Stats,
    pub(crate) log: Log,
    pub(crate) failure: Option<Failure>,
    /// From when on engines ask for nothing new.
    pub(crate) ends: Instant,
    pub(crate) steps_left: u64,
    last_id: u64,
}

/// Runs one seed.
#[must_use]
pub fn run(options: Options) -> Outcome {
    let mut world = World::new(options);
    let events = world.drive();
    Outcome { digest: world.log.hash, events, stats: world.stats, failure: world.failure }
}

impl World {
    fn new(options: Options) -> Self {
        let mut rng = Rng::new(options.seed);
        let prompts = Prompts::new(&mut rng);
        let nodes: Vec<Node> = (0..options.nodes).map(|at| Node::new(at, &mut rng)).collect();
        let numbers = nodes.iter().enumerate().map(|(at, node)| (node.number, at)).collect();
        let length = Duration::from_millis(25) * u32::try_from(options.steps).unwrap_or(u32::MAX);
        let ends = Instant::ZERO + length.max(Duration::from_secs(5));
        Self {
            options,
            rng,
            queue: Queue::default(),
            now: Instant::ZERO,
            nodes,
            numbers,
            network: Network::default(),
            directory: Directory::default(),
            store: ObjectStore::default(),
            sealings: Sealings::default(),
            prompts,
            reads: BTreeMap::new(),
            grants: BTreeMap::new(),
            faults: Vec::new(),
            stats: Stats::default(),
            log: Log { hash: 0xcbf2_9ce4_8422_2325, verbose: options.verbose },
            failure: None,
            ends,
            steps_left: options.steps,
            last_id: 0,
        }
    }

    fn drive(&mut self) -> u64 {
        for node in 0..self.nodes.len() {
            self.start(node);
        }
        self.queue.push(Instant::ZERO + SNAPSHOTS_EVERY, Event::Snapshot);
        if self.options.faults {
            self.plan_faults();
        }
        let mut events = self.run_until(self.ends + QUIET, 0);
        if self.failure.is_none() {
            self.check_convergence();
            self.evict_everything();
            events = self.run_until(self.ends + QUIET + LAST, events);
        }
        if self.failure.is_none() {
            self.check_nothing_left();
        }
        events
    }

    fn run_until(&mut self, end: Instant, mut events: u64) -> u64 {
        while self.failure.is_none() {
            let Some((at, event)) = self.queue.pop() else { return events };
            if at >= end {
                self.queue.push(at, event);
                self.now = end;
                return events;
            }
            events += 1;
            if events > MAX_EVENTS {
                self.fail("every-operation-ends", format_args!("after {events} events there are still more"));
            }
            self.now = at;
            self.happen(event);
            self.check_world();
        }
        events
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Deliver { from, to, message } => self.deliver(from, to, message),
            Event::OnNode { node, life, duty } => {
                if self.nodes[node].live.as_ref().is_some_and(|l| l.life == life) {
                    self.note(format_args!("node {node}: {duty:?}"));
                    self.duty(node, duty);
                    self.settle(node);
                }
            }
            Event::Chunk { read } => self.read_on(read),
            Event::Fault { index, begins } => self.fault(index, begins),
            Event::Restart { node } => {
                if self.nodes[node].live.is_none() {
                    self.start(node);
                    self.settle(node);
                }
            }
            Event::Snapshot => {
                self.directory.snapshot();
                if self.now < self.ends {
                    self.queue.push(self.now + SNAPSHOTS_EVERY, Event::Snapshot);
                }
            }
        }
    }

    fn deliver(&mut self, from: Party, to: Party, message: Message) {
        let node = match to {
            Party::Directory => {
                if let Message::Ask { life, call, node, ask } = message {
                    self.note(format_args!("{from:?} asks the directory: {ask:?}"));
                    self.ask_arrived(from, life, call, (node, ask));
                }
                return;
            }
            Party::Node(node) => node,
        };
        if self.nodes[node].live.is_none() {
            return;
        }
        self.note(format_args!("{from:?} to node {node}: {message:?}"));
        match message {
            Message::Ask { .. } => {}
            Message::Answer { life, call, answer } => self.answered(node, life, call, answer),
            Message::Export { name, request, wait, counts_until } => {
                self.export_asked(name, request, (wait, counts_until));
            }
            Message::Exported { name, granted } => self.exported(name, granted),
            Message::Release { name } => self.release_asked(name),
            Message::Adopt { from, incarnation, metas } => self.adopt_asked(node, (from, incarnation), &metas),
        }
        self.settle(node);
    }

    /// The part of a node that dies with its process. Callers know that it lives.
    pub(crate) fn live(&mut self, node: usize) -> &mut Live {
        self.nodes[node].live.as_mut().expect("events of a life that is over are dropped")
    }

    pub(crate) const fn take_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// Writes a line of the log.
    pub(crate) fn note(&mut self, what: fmt::Arguments<'_>) {
        let nanos = self.now.as_nanos();
        writeln!(self.log, "{:10.6} {what}", std::time::Duration::from_nanos(nanos).as_secs_f64())
            .expect("writing to the log cannot fail");
    }

    /// A checker found something. The first finding counts.
    pub(crate) fn fail(&mut self, checker: &'static str, what: fmt::Arguments<'_>) {
        if self.failure.is_none() {
            self.note(format_args!("FAILED {checker}: {what}"));
            self.failure = Some(Failure { checker, at: self.now, what: what.to_string() });
        }
    }
}
