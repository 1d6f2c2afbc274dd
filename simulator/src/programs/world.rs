//! One run: programs on a cluster, under one policy, driven by one event queue.
//!
//! Closed loop: a step begins when what it waits for has ended and its tool has returned, so what a policy does moves all
//! that follows.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use kvtier_policy::evict::KnownId;
use kvtier_policy::programs::Durations;
use kvtier_types::Instant;

use super::config::Config;
use super::decisions::Decisions;
use super::engine::Progress;
use super::forecast::Course;
use super::links::Link;
use super::metrics::Metrics;
use super::node::{Load, Node, Request, STORE};
use super::store::Store;
use super::tree::{Program, ROOT, Tree, Work};

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    Arrives(u32),
    Ready(u32, u32),
    Engine(u32),
    Link(u32, usize),
    Due(u32),
}

/// A program under way.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) arrived: Instant,
    pub(super) course: Course,
    /// Steps that each step still waits for.
    pub(super) missing: Vec<u32>,
    pub(super) left: usize,
    /// Steps that read what each lane wrote, or wait for its last step.
    pub(super) readers: Vec<Vec<u32>>,
    /// Lanes that have no future.
    pub(super) freed: Vec<bool>,
    /// What lanes are ranked by, where that is told.
    pub(super) keys: Vec<u64>,
    /// Time on engines so far.
    pub(super) attained: Duration,
    /// Blocks that it may use again, its own.
    pub(super) live: Vec<u32>,
}

/// What is known of a lane.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lane {
    /// Where its last step ran.
    pub(super) node: u32,
    /// The end of what it has read and written.
    pub(super) tip: u32,
    /// Since when it pauses.
    pub(super) paused: Option<Instant>,
    /// What kind of pause it is.
    pub(super) kind: u64,
    /// How long it is said to take.
    pub(super) says: Option<Duration>,
}

pub(super) const NOWHERE: u32 = u32::MAX;
const NEW_LANE: Lane = Lane { node: NOWHERE, tip: ROOT, paused: None, kind: 0, says: None };

/// A run.
pub(super) struct World<'a> {
    pub(super) work: &'a Work,
    pub(super) config: &'a Config,
    pub(super) how: Decisions,
    events: BinaryHeap<Reverse<(Instant, u64, Event)>>,
    sequence: u64,
    pub(super) nodes: Vec<Node>,
    pub(super) store: Store,
    pub(super) store_link: Link,
    pub(super) requests: Vec<Option<Request>>,
    free_requests: Vec<u32>,
    pub(super) loads: Vec<Load>,
    free_loads: Vec<u32>,
    pub(super) running: Vec<Option<Running>>,
    pub(super) lanes: Vec<Lane>,
    /// Blocks that were computed anywhere.
    pub(super) computed: Vec<bool>,
    pub(super) durations: Durations,
    pub(super) step_seconds: f64,
    /// Programs of a population that are not begun.
    backlog: u32,
    pub(super) live: u64,
    live_since: Instant,
    live_sum: f64,
    live_from: Instant,
    ended: usize,
    pub(super) metrics: Metrics,
    pub(super) progress: Vec<Progress>,
    pub(super) path: Vec<u32>,
    pub(super) ids: Vec<KnownId>,
}

impl<'a> World<'a> {
    pub(super) fn new(work: &'a Work, config: &'a Config, how: Decisions) -> Self {
        let mut world = Self {
            work,
            config,
            how,
            events: BinaryHeap::new(),
            sequence: 0,
            nodes: (0..config.nodes).map(|_| Node::new(config, &how)).collect(),
            store: Store::new(if how.shares { config.store_blocks } else { 0 }),
            store_link: Link::new(config.store_gb * 1e9, Duration::from_millis(2)),
            requests: Vec::new(),
            free_requests: Vec::new(),
            loads: Vec::new(),
            free_loads: Vec::new(),
            running: (0..work.programs.len()).map(|_| None).collect(),
            lanes: vec![NEW_LANE; work.lanes as usize],
            computed: vec![false; work.tree.len()],
            durations: Durations::default(),
            step_seconds: 5.0,
            backlog: 0,
            live: 0,
            live_since: Instant::ZERO,
            live_sum: 0.0,
            live_from: Instant::ZERO,
            ended: 0,
            metrics: Metrics { completions: vec![None; work.programs.len()], ..Metrics::default() },
            progress: Vec::new(),
            path: Vec::new(),
            ids: Vec::new(),
        };
        let programs = u32::try_from(work.programs.len()).expect("fewer programs than four billion");
        let first = if config.population > 0 { config.population.min(programs) } else { programs };
        for program in 0..first {
            world.at(Instant::ZERO + work.programs[program as usize].arrives, Event::Arrives(program));
        }
        world.backlog = first;
        world
    }

    pub(super) fn at(&mut self, when: Instant, event: Event) {
        self.events.push(Reverse((when, self.sequence, event)));
        self.sequence += 1;
    }

    /// Runs to the end; `progress` is told of every program that ended.
    pub(super) fn run(mut self, progress: &mut dyn FnMut()) -> Metrics {
        let mut now = Instant::ZERO;
        while let Some(Reverse((at, _, event))) = self.events.pop() {
            now = at;
            self.metrics.events += 1;
            match event {
                Event::Arrives(program) => self.arrives(now, program),
                Event::Ready(program, step) => self.ready(now, program, step),
                Event::Engine(node) => self.engine(now, node, progress),
                Event::Link(node, link) => self.link(now, node, link),
                Event::Due(node) => self.due(now, node),
            }
        }
        self.close(now)
    }

    fn close(mut self, now: Instant) -> Metrics {
        let mut metrics = std::mem::take(&mut self.metrics);
        metrics.ends = now.since(Instant::ZERO);
        for node in &self.nodes {
            metrics.engine_busy += node.engine.busy;
            metrics.add_occupancy(&node.cache.occupancy);
            metrics.written.to_host += node.cache.written.to_host;
            metrics.written.to_disk += node.cache.written.to_disk;
            metrics.written.dropped += node.cache.written.dropped;
            for (link, busy) in node.links.iter().zip(&mut metrics.link_busy) {
                *busy += link.busy;
            }
            let spent = node.proactive.spent();
            metrics.spent.useful_bytes += spent.useful_bytes;
            metrics.spent.late_bytes += spent.late_bytes;
            metrics.spent.wasted_bytes += spent.wasted_bytes;
            metrics.spent.refused_bytes += spent.refused_bytes;
            metrics.peak_blocks += node.cache.len();
        }
        metrics.link_busy[STORE] = self.store_link.busy;
        metrics.stored_blocks = self.store.written();
        metrics
    }

    fn arrives(&mut self, now: Instant, number: u32) {
        let program = &self.work.programs[number as usize];
        let readers = readers(&self.work.tree, program);
        let steps = program.steps.len();
        self.running[number as usize] = Some(Running {
            arrived: now,
            course: Course { ended: vec![None; steps], ready: vec![None; steps] },
            missing: program.steps.iter().map(|s| u32::try_from(s.after.len()).expect("few steps")).collect(),
            left: steps,
            live: vec![0; readers.len()],
            freed: vec![false; readers.len()],
            keys: vec![0; readers.len()],
            readers,
            attained: Duration::ZERO,
        });
        for (at, step) in program.steps.iter().enumerate() {
            if step.after.is_empty() {
                let at = u32::try_from(at).expect("few steps");
                self.at(now + step.gap, Event::Ready(number, at));
            }
        }
    }

    /// A step ended: those that waited for it and for nothing else begin after their pause.
    pub(super) fn step_ended(&mut self, now: Instant, (number, step): (u32, u32)) -> bool {
        let program = &self.work.programs[number as usize];
        let Some(running) = self.running[number as usize].as_mut() else { return false };
        running.course.ended[step as usize] = Some(now);
        running.left -= 1;
        let over = running.left == 0;
        let mut begin = Vec::new();
        for (at, next) in program.steps.iter().enumerate().skip(step as usize + 1) {
            if next.after.contains(&step) {
                running.missing[at] -= 1;
                if running.missing[at] == 0 {
                    begin.push((next.gap, u32::try_from(at).expect("few steps")));
                }
            }
        }
        for (gap, at) in begin {
            self.at(now + gap, Event::Ready(number, at));
        }
        over
    }

    /// A program ended.
    pub(super) fn program_ended(&mut self, now: Instant, number: u32) {
        let Some(running) = self.running[number as usize].take() else { return };
        self.metrics.completions[number as usize] = Some(now.since(running.arrived));
        let live = running.live.iter().map(|blocks| u64::from(*blocks)).sum::<u64>();
        self.count_live(now, 0, live);
        self.ended += 1;
        let all = self.work.programs.len();
        if self.ended == all / 4 {
            (self.live_from, self.live_sum) = (now, 0.0);
        }
        if self.ended == all - all / 4 {
            let time = now.since(self.live_from).as_secs_f64();
            self.metrics.live_blocks = self.live_sum / time.max(1e-9);
            self.metrics.programs_per_second = (all - all / 4 - all / 4) as f64 / time.max(1e-9);
        }
        if self.config.population > 0 && (self.backlog as usize) < self.work.programs.len() {
            let next = self.backlog;
            self.backlog += 1;
            self.at(now, Event::Arrives(next));
        }
    }

    /// Blocks that may be used again come and go.
    pub(super) fn count_live(&mut self, now: Instant, come: u64, go: u64) {
        self.live_sum += now.since(self.live_since).as_secs_f64() * self.live as f64;
        self.live_since = now;
        self.live = (self.live + come).saturating_sub(go);
    }

    pub(super) fn new_request(&mut self, request: Request) -> u32 {
        let at = self.free_requests.pop().unwrap_or_else(|| {
            self.requests.push(None);
            u32::try_from(self.requests.len() - 1).expect("fewer requests than four billion")
        });
        self.requests[at as usize] = Some(request);
        at
    }

    pub(super) fn take_request(&mut self, at: u32) -> Request {
        self.free_requests.push(at);
        self.requests[at as usize].take().expect("an engine names requests that it has")
    }

    pub(super) fn request(&mut self, at: u32) -> &mut Request {
        self.requests[at as usize].as_mut().expect("who waits is there")
    }

    pub(super) fn new_load(&mut self, load: Load) -> u32 {
        if let Some(at) = self.free_loads.pop() {
            self.loads[at as usize] = load;
            return at;
        }
        self.loads.push(load);
        u32::try_from(self.loads.len() - 1).expect("fewer loads than four billion")
    }

    pub(super) fn take_load(&mut self, at: u32) -> Load {
        self.free_loads.push(at);
        std::mem::take(&mut self.loads[at as usize])
    }

    /// Schedules the next event of a node's engine.
    pub(super) fn wake_engine(&mut self, now: Instant, number: u32) {
        let node = &mut self.nodes[number as usize];
        let next = node.engine.next(now);
        if next != node.engine_wakes
            && let Some(at) = next
        {
            node.engine_wakes = Some(at);
            self.at(at, Event::Engine(number));
        }
    }
}

/// Steps of a program that read what each of its lanes wrote, or wait for the end of it.
fn readers(tree: &Tree, program: &Program) -> Vec<Vec<u32>> {
    let first = program.lanes.0;
    let mut readers = vec![Vec::new(); (program.lanes.1 - first) as usize];
    for (at, step) in (0..).zip(&program.steps) {
        let mut note = |lane: u32| {
            if let Some(of_lane) = lane.checked_sub(first).and_then(|lane| readers.get_mut(lane as usize)) {
                let of_lane: &mut Vec<u32> = of_lane;
                if of_lane.last() != Some(&at) {
                    of_lane.push(at);
                }
            }
        };
        note(step.lane);
        tree.owners(step.prompt, &mut note);
        for before in &step.after {
            let before = &program.steps[*before as usize];
            if before.last {
                note(before.lane);
            }
        }
    }
    readers
}
