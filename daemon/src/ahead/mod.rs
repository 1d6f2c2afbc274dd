//! Brings a program's state back before the program is: a program that waits for a tool loses its place in host memory to
//! others, and gets it again shortly before it returns.
//!
//! When it will be back is learnt: announcements by what they were worth, and pauses without one by what pauses took. What is
//! brought is bounded by a budget, and every byte is counted once as useful, late, wasted or refused. Programs that wait for
//! their branches are [`forks`]' business, what declared steps share is [`shared`]'s.

mod forks;
mod shared;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::programs::{Durations, Joins, Kind, Proactive, ProactiveConfig, Spent};
use kvtier_policy::{HolderName, Holdings, ProgramEvent};
use kvtier_types::{BlockKey, Instant, Tier};
use parking_lot::Mutex;
use tokio::time::interval;

use crate::node::Node;
use crate::operations::{self, Operations, Terms};
use crate::services::{Caller, KEYS_PER_CORE_CALL, gather};
use crate::turns;

/// How often it is looked whether something is due.
const EVERY: Duration = Duration::from_millis(50);
/// What was brought waits so long beyond the late quantile of the return.
const PATIENCE: Duration = Duration::from_secs(30);
/// Programs that wait at once; beyond, later ones are not brought back ahead.
const MAX_WAITS: usize = 16_384;
/// Programs whose state is brought up at once: most operations are for those who ask.
const MAX_RUNNING: usize = 32;
/// Bytes a second that come up, until some were measured.
const FIRST_RATE: f64 = 5e8;
/// What a transfer takes beside its bytes.
const OVERHEAD: Duration = Duration::from_millis(20);
/// Share of a new measurement of the rate.
const LEARN: f64 = 0.2;

/// What is known of programs that wait.
pub(crate) struct Ahead {
    inner: Mutex<Inner>,
}

struct Inner {
    durations: Durations,
    /// How long branches take from their first call on.
    branches: Durations,
    proactive: Proactive,
    waits: BTreeMap<u64, Wait>,
    joins: Joins,
    /// Programs that forked and did not call since.
    forks: BTreeMap<u64, forks::Fork>,
    /// Programs whose branches changed since they were planned for.
    changed: BTreeSet<u64>,
    /// What declared steps are about to read.
    shared: shared::Parts,
    /// Bytes a second.
    rate: f64,
    /// Programs whose state is on its way up.
    running: usize,
}

/// A program that waits since `began`, and what it announced.
struct Wait {
    name: HolderName,
    kind: Kind,
    began: Instant,
    announced: Option<Duration>,
    /// For branches, not for a tool.
    joins: bool,
}

impl Inner {
    /// Who waits for longest is the least likely to be back.
    fn forget_oldest(&mut self) {
        let oldest = self.waits.iter().min_by_key(|(_, wait)| wait.began).map(|(number, _)| *number);
        if let Some(oldest) = oldest {
            self.waits.remove(&oldest);
            self.proactive.ended(oldest);
        }
    }
}

impl Ahead {
    pub(crate) fn new(budget_bytes: u64) -> Self {
        let inner = Inner {
            durations: Durations::default(),
            proactive: Proactive::new(ProactiveConfig { budget_bytes, patience: PATIENCE }),
            waits: BTreeMap::new(),
            branches: Durations::default(),
            joins: Joins::default(),
            forks: BTreeMap::new(),
            changed: BTreeSet::new(),
            shared: shared::Parts::default(),
            rate: FIRST_RATE,
            running: 0,
        };
        Self { inner: Mutex::new(inner) }
    }

    /// What became of what was brought, and bytes that wait to be used.
    pub(crate) fn spent(&self) -> (Spent, u64) {
        let inner = self.inner.lock();
        (inner.proactive.spent(), inner.proactive.outstanding_bytes())
    }

    /// The same, by name.
    pub(crate) fn counts(&self) -> [(&'static str, u64); 5] {
        let (spent, outstanding) = self.spent();
        [
            ("prefetch_useful_bytes", spent.useful_bytes),
            ("prefetch_late_bytes", spent.late_bytes),
            ("prefetch_wasted_bytes", spent.wasted_bytes),
            ("prefetch_refused_bytes", spent.refused_bytes),
            ("prefetch_outstanding_bytes", outstanding),
        ]
    }
}

/// Programs of one tenant and role are of a kind.
fn kind(name: &HolderName, role: &str) -> Kind {
    let of = |role: &str| HolderName::program(&name.tenant, role).number();
    Kind { tenant: of(""), what: if role.is_empty() { 0 } else { of(role) } }
}

/// The kind of a program that is known.
fn kind_of(node: &Arc<Node>, name: &HolderName) -> Kind {
    node.read_core(|core| kind(name, core.program_role(name)))
}

/// Runs until the node stops.
pub(crate) async fn run(node: Arc<Node>) {
    let brings = node.config.programs.prefetch;
    let mut ticks = interval(EVERY);
    loop {
        tokio::select! {
            () = node.stopping.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let (events, now) = node.with_core(|core, now| (core.take_program_events(), now));
        for event in events {
            tell_turns(&node, &event);
            if brings {
                hear(&node, event).await;
            }
        }
        if !brings {
            continue;
        }
        forks::plan(&node, now);
        forks::give_up(&node, now).await;
        shared::look(&node, now).await;
        loop {
            let due = {
                let mut inner = node.ahead.inner.lock();
                inner.proactive.due(now).and_then(|number| Some((number, inner.waits.get(&number)?.name.clone())))
            };
            let Some((number, name)) = due else { break };
            bring(&node, number, &name);
        }
    }
}

/// What an event says of a program's turn.
fn tell_turns(node: &Arc<Node>, event: &ProgramEvent) {
    match event {
        ProgramEvent::Waits { name, returns_in, at } => {
            let kind = kind_of(node, name);
            let expected = node.ahead.inner.lock().durations.expect(kind, *returns_in, Duration::ZERO);
            let early = expected.map(|expected| expected.early).or(*returns_in);
            node.returns.expect(name, early.map(|early| *at + early));
        }
        ProgramEvent::Back { name, .. } | ProgramEvent::Called { name, .. } | ProgramEvent::Ended { name, .. } => {
            node.returns.expect(name, None);
        }
        ProgramEvent::GoesOn { name } => {
            node.returns.expect(name, None);
            turns::undeclared(node, name, "goes_on");
        }
        ProgramEvent::Forked { .. } | ProgramEvent::Blocks { .. } => {}
    }
}

async fn hear(node: &Arc<Node>, event: ProgramEvent) {
    match event {
        ProgramEvent::Waits { name, returns_in, at } => {
            let (bytes, kind) =
                node.read_core(|core| (core.context_bytes(&name), kind(&name, core.program_role(&name))));
            let number = name.number();
            let inner = &mut *node.ahead.inner.lock();
            if inner.waits.len() >= MAX_WAITS && !inner.waits.contains_key(&number) {
                inner.forget_oldest();
            }
            if let Some(expected) = inner.durations.expect(kind, returns_in, Duration::ZERO) {
                inner.proactive.wait(at, number, (expected, transfer_of(bytes, inner.rate)));
            }
            inner.waits.insert(number, Wait { name, kind, began: at, announced: returns_in, joins: false });
        }
        ProgramEvent::Back { name, at } => {
            let number = name.number();
            let is_brought = node.ahead.inner.lock().proactive.holds(number);
            // It may have gone again since.
            let is_here = !is_brought || absent(node, &name).0.is_empty();
            let inner = &mut *node.ahead.inner.lock();
            if let Some(wait) = inner.waits.remove(&number).filter(|wait| !wait.joins) {
                inner.durations.observe(wait.kind, wait.announced, at.since(wait.began));
            }
            inner.proactive.back(number, is_here);
        }
        ProgramEvent::Forked { name, branches, at } => forks::forked(node, name, &branches, at).await,
        ProgramEvent::Called { name, at } => forks::called(node, &name, at).await,
        ProgramEvent::GoesOn { name } => {
            // It was told to go on: that it waits for nobody any more is no news.
            node.ahead.inner.lock().changed.remove(&name.number());
        }
        ProgramEvent::Blocks { name, parent, waits, at } => forks::blocks(node, &name, (parent, waits), at).await,
        ProgramEvent::Ended { name, role, at } => {
            let number = name.number();
            {
                let inner = &mut *node.ahead.inner.lock();
                inner.waits.remove(&number);
                inner.proactive.ended(number);
            }
            forks::ended(node, &name, kind(&name, &role), at).await;
        }
    }
}

/// How long so many bytes take to be brought up.
fn transfer_of(bytes: u64, rate: f64) -> Duration {
    OVERHEAD + Duration::from_secs_f64(bytes as f64 / rate)
}

/// Blocks of a program's latest context that are not in host memory, and their bytes.
fn absent(node: &Arc<Node>, name: &HolderName) -> (Vec<BlockKey>, u64) {
    let keys = gather(node, Holdings::of_session(name, (0, 0))).unwrap_or_default();
    let (mut bytes, mut out) = (0, Vec::new());
    for page in keys.chunks(KEYS_PER_CORE_CALL) {
        node.read_core(|core| {
            for key in page {
                if let Some((false, size)) = core.lies_in(key, Tier::Host) {
                    bytes += size;
                    out.push(*key);
                }
            }
        });
    }
    (out, bytes)
}

/// Brings up what is not in host memory.
fn bring(node: &Arc<Node>, number: u64, name: &HolderName) {
    let (keys, bytes) = absent(node, name);
    {
        let inner = &mut *node.ahead.inner.lock();
        if keys.is_empty() || inner.running >= MAX_RUNNING || !inner.proactive.begin(number, bytes) {
            return;
        }
        inner.running += 1;
    }
    let goals: Vec<_> = keys.into_iter().map(|key| (0, key)).collect();
    let terms =
        Terms { verb: "Prefetch ahead", tenant: name.tenant.clone(), total: goals.len() as u64, limit: PATIENCE };
    let (of_work, began) = (Arc::clone(node), std::time::Instant::now());
    let caller = Caller { tenant: name.tenant.clone(), operator: false };
    let running = Running(Arc::clone(node));
    let begun = Operations::begin(node, terms, |operation| async move {
        let _running = running;
        operations::prefetch(Arc::clone(&of_work), operation, goals, (caller, Tier::Host)).await;
        let inner = &mut *of_work.ahead.inner.lock();
        inner.proactive.arrived(number);
        let rate = bytes as f64 / began.elapsed().as_secs_f64().max(1e-3);
        inner.rate = LEARN.mul_add(rate, (1.0 - LEARN) * inner.rate);
    });
    if begun.is_none() {
        node.ahead.inner.lock().proactive.ended(number);
    }
}

/// One of those under way, until it ends or is given up.
struct Running(Arc<Node>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.ahead.inner.lock().running -= 1;
    }
}
