//! Declared graphs: what a program will do, how far it is, and which steps should run next.
//!
//! A graph is a set of steps with those that each waits for. What is declared and what steps took says how long each takes
//! ([`learnt`]); from that follows how far each is from the end along the longest way, and from that the order ([`next`]).
//!
//! *Invariants*: a step is offered only once all before it ended. A later declaration keeps how far steps of the same id
//! are. A declaration that is older than the removal of its graph does not bring it back. The state after a restart is that of the same declarations and progress (`a_graph_resumes_where_it_was`).
//! *Bounds*: [`MAX_GRAPHS`] graphs, [`MAX_STEPS`] steps and [`MAX_BYTES`] bytes in all, [`MAX_TENANT_STEPS`] steps of a
//! tenant; those of [`Plan`]. What finds no room is refused; graphs go [`SILENCE`] after the last word on them, and
//! [`OVER`] after their last step ended.

mod graph;
mod learnt;
mod next;
mod plan;
mod removed;
mod shared;
#[cfg(test)]
mod tests;
mod turns;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kvtier_types::{Instant, Outcome, TenantId};

use graph::Graph;
pub use graph::StepState;
use learnt::Learnt;
pub use next::{NextStep, Question, Reason, Search, Undeclared};
pub use plan::{
    BadGraph, LONGEST_STEP, MAX_BEFORE, MAX_GRAPH_BYTES, MAX_STEP_NAME_BYTES, MAX_STEPS_PER_GRAPH, Plan, Step,
};
pub use shared::{MAX_SHARED_KEYS, SHARED_SOON, SharedContext, SharedPart, Sharing};
pub use turns::Turn;

/// Graphs of all tenants.
pub const MAX_GRAPHS: usize = 8192;
/// Steps of all graphs.
pub const MAX_STEPS: usize = 65_536;
/// Steps of one tenant's graphs: no tenant takes all the room.
pub const MAX_TENANT_STEPS: usize = 32_768;
/// Bytes of all declarations.
pub const MAX_BYTES: usize = 32 << 20;
/// A graph of which nothing was heard for so long is forgotten.
pub const SILENCE: Duration = Duration::from_secs(24 * 3600);
/// A graph whose steps all ended is forgotten so long afterwards.
pub const OVER: Duration = Duration::from_secs(600);
/// Steps named in one report of progress, begun and ended ones together.
pub const MAX_PROGRESS: usize = 4096;
/// Unknown steps that an answer names.
const NAMED: usize = 4;

/// Names a graph: the program that declared it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct GraphName {
    /// Whose program it is.
    pub tenant: TenantId,
    /// The program.
    pub program: String,
}

/// What a declaration or report came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The outcome.
    pub outcome: Outcome,
    /// Why.
    pub reason: String,
    /// The revision that is in force, of a declaration.
    pub revision: u64,
    /// Steps of the declaration, or steps whose state changed.
    pub steps: u32,
}

/// A graph as it is.
#[derive(Debug, Clone)]
pub struct GraphView {
    /// Its name.
    pub name: GraphName,
    /// Its revision.
    pub revision: u64,
    /// Its steps, none before those that it waits for.
    pub steps: Vec<StepView>,
    /// What engines are expected to take for what has not ended.
    pub remaining: Duration,
    /// The longest way from now to the end.
    pub longest: Duration,
    /// What engines took so far.
    pub attained: Duration,
}

/// A step as it is.
#[derive(Debug, Clone)]
pub struct StepView {
    /// As declared.
    pub step: Step,
    /// How far it is.
    pub state: StepState,
    /// Whether all before it ended.
    pub ready: bool,
    /// What engines are expected to take for it still.
    pub takes: Duration,
    /// From its beginning, or from now if it runs, to the end of the program.
    pub rank: Duration,
}

/// How many there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GraphCounts {
    /// Graphs.
    pub graphs: usize,
    /// Steps that have not begun.
    pub waiting: usize,
    /// Steps that run.
    pub running: usize,
    /// Steps that ended, of graphs that are still known.
    pub ended: usize,
}

/// All declared graphs.
#[derive(Debug, Default)]
pub struct Graphs {
    graphs: BTreeMap<GraphName, Graph>,
    /// Programs that run steps of graphs, and the programs that declared these.
    runners: BTreeMap<GraphName, BTreeSet<String>>,
    /// Graphs with steps that share anything.
    sharing: BTreeSet<GraphName>,
    tenant_steps: BTreeMap<TenantId, usize>,
    steps: usize,
    bytes: usize,
    learnt: Learnt,
    /// Graphs whose progress changed since it was last asked.
    changed: BTreeSet<GraphName>,
    turns: turns::Turns,
    removed: removed::Removed,
}

impl Graphs {
    /// What declaring this would come to: [`Outcome::Applied`] only if [`Self::declare`] is to be called with the answer's
    /// revision. A revision of zero is higher than all before. A plan without steps removes.
    #[must_use]
    pub fn check(&self, name: &GraphName, plan: &Plan, revision: u64, now_unix_ms: u64) -> Answer {
        let known = self.graphs.get(name);
        let answer = |outcome, reason: String, revision| {
            let steps = u32::try_from(plan.steps().len()).unwrap_or(u32::MAX);
            Answer { outcome, reason, revision, steps }
        };
        let Some(known) = known else {
            if plan.is_empty() {
                return answer(Outcome::Missing, "nothing is declared of this program".into(), revision);
            }
            let removed = self.removed.revision(name);
            if revision != 0 && revision <= removed {
                let reason = format!("revision {revision} was declared before these steps were removed");
                return answer(Outcome::Rejected, reason, removed);
            }
            let revision = if revision == 0 { now_unix_ms.max(removed + 1) } else { revision };
            return match self.no_room(name, plan) {
                Some(reason) => answer(Outcome::Rejected, reason, 0),
                None => answer(Outcome::Applied, String::new(), revision),
            };
        };
        let same = known.plan == *plan;
        if same && (revision == 0 || revision == known.revision) {
            return answer(Outcome::Duplicate, String::new(), known.revision);
        }
        if revision != 0 && revision < known.revision {
            let reason = format!("revision {revision} is older than {}, which is in force", known.revision);
            return answer(Outcome::Rejected, reason, known.revision);
        }
        if revision == known.revision && !plan.is_empty() {
            let reason = format!("revision {revision} was declared with other steps: give a higher one, or none");
            return answer(Outcome::Rejected, reason, known.revision);
        }
        let next = if revision == 0 { now_unix_ms.max(known.revision + 1) } else { revision };
        match self.no_room(name, plan) {
            Some(reason) => answer(Outcome::Rejected, reason, known.revision),
            None => answer(Outcome::Applied, String::new(), next),
        }
    }

    /// Why there is no room for a plan.
    fn no_room(&self, name: &GraphName, plan: &Plan) -> Option<String> {
        let (steps, bytes) = self.graphs.get(name).map_or((0, 0), |g| (g.plan.steps().len(), g.plan.bytes()));
        let of_tenant = self.tenant_steps.get(&name.tenant).copied().unwrap_or(0);
        let more = plan.steps().len();
        let full = |what: &str, most: usize| {
            Some(format!("no room: at most {most} {what}; end programs, or remove graphs that are over"))
        };
        if more == 0 {
            None
        } else if of_tenant - steps + more > MAX_TENANT_STEPS {
            full("declared steps of a tenant", MAX_TENANT_STEPS)
        } else if self.steps - steps + more > MAX_STEPS {
            full("declared steps of a node", MAX_STEPS)
        } else if self.bytes - bytes + plan.bytes() > MAX_BYTES {
            full("bytes of declarations of a node", MAX_BYTES)
        } else if !self.graphs.contains_key(name) && self.graphs.len() >= MAX_GRAPHS {
            full("declared programs of a node", MAX_GRAPHS)
        } else {
            None
        }
    }

    /// The revision of a graph that is in force; zero without one.
    #[must_use]
    pub fn revision(&self, name: &GraphName) -> u64 {
        self.graphs.get(name).map_or(0, |graph| graph.revision)
    }

    /// A removal that came before what it removes: that is not to come back either.
    pub fn removed_ahead(&mut self, now: Instant, name: GraphName, revision: u64) {
        if revision > self.removed.revision(&name) && !self.graphs.contains_key(&name) {
            self.removed.note(now, name, revision);
        }
    }

    /// A declaration that was said again: the graph is not silent.
    pub fn hear(&mut self, now: Instant, name: &GraphName) {
        if let Some(graph) = self.graphs.get_mut(name) {
            graph.heard = now;
        }
    }

    /// Declares what [`Self::check`] found good, in the place of what was declared before; without steps, removes it.
    pub fn declare(&mut self, now: Instant, name: GraphName, (revision, plan): (u64, Plan)) {
        let former = self.remove(&name);
        if plan.is_empty() {
            self.removed.note(now, name, revision);
            return;
        }
        let mut graph = Graph::new(now, revision, plan);
        if let Some(former) = former {
            graph.inherit(now, &former);
            self.changed.insert(name.clone());
        }
        self.insert(name, graph);
    }

    /// Takes in a graph of a former life, with how far its steps were. What finds no room is left out.
    pub fn restore(&mut self, now: Instant, name: GraphName, (revision, plan): (u64, Plan), states: &[StepState]) {
        if plan.is_empty() || self.graphs.contains_key(&name) || self.no_room(&name, &plan).is_some() {
            return;
        }
        let mut graph = Graph::new(now, revision, plan);
        graph.resume(now, states);
        self.insert(name, graph);
    }

    fn insert(&mut self, name: GraphName, graph: Graph) {
        self.steps += graph.plan.steps().len();
        self.bytes += graph.plan.bytes();
        *self.tenant_steps.entry(name.tenant.clone()).or_default() += graph.plan.steps().len();
        for runner in runners(&name, &graph.plan) {
            self.runners.entry(runner).or_default().insert(name.program.clone());
        }
        if graph.plan.steps().iter().any(Step::is_sharing) {
            self.sharing.insert(name.clone());
        }
        self.turns.set(&name, graph.next_turn());
        self.graphs.insert(name, graph);
    }

    fn remove(&mut self, name: &GraphName) -> Option<Graph> {
        let graph = self.graphs.remove(name)?;
        self.changed.remove(name);
        self.sharing.remove(name);
        self.turns.set(name, None);
        self.steps -= graph.plan.steps().len();
        self.bytes -= graph.plan.bytes();
        if let Some(steps) = self.tenant_steps.get_mut(&name.tenant) {
            *steps -= graph.plan.steps().len();
            if *steps == 0 {
                self.tenant_steps.remove(&name.tenant);
            }
        }
        for runner in runners(name, &graph.plan) {
            if let Some(graphs) = self.runners.get_mut(&runner) {
                graphs.remove(&name.program);
                if graphs.is_empty() {
                    self.runners.remove(&runner);
                }
            }
        }
        Some(graph)
    }

    /// Steps of a graph began and ended.
    pub fn progress(&mut self, now: Instant, name: &GraphName, (began, ended): (&[String], &[String])) -> Answer {
        let answer = |outcome, reason: String, steps| Answer { outcome, reason, revision: 0, steps };
        let Some(graph) = self.graphs.get_mut(name) else {
            return answer(Outcome::Missing, "nothing is declared of this program".into(), 0);
        };
        graph.heard = now;
        let wanted: BTreeSet<&str> = began.iter().chain(ended).map(String::as_str).collect();
        let ids = (0..).zip(graph.plan.steps()).map(|(number, step)| (step.id.as_str(), number));
        let numbers: BTreeMap<String, u32> =
            ids.filter(|(id, _)| wanted.contains(id)).map(|(id, number)| (id.to_owned(), number)).collect();
        let mut steps = 0;
        for number in began.iter().filter_map(|id| numbers.get(id)) {
            steps += graph.begin(now, *number);
        }
        for number in ended.iter().filter_map(|id| numbers.get(id)) {
            let (is_news, took) = graph.end(now, *number);
            steps += u32::from(is_news);
            if let Some(took) = took {
                self.learnt.observe((&name.tenant, &graph.plan.steps()[*number as usize]), took);
            }
        }
        if steps > 0 {
            self.changed.insert(name.clone());
            self.turns.set(name, graph.next_turn());
        }
        let unknown: Vec<&str> = wanted.iter().copied().filter(|id| !numbers.contains_key(*id)).collect();
        if !unknown.is_empty() {
            let named = unknown[..unknown.len().min(NAMED)].join(", ");
            let more = if unknown.len() > NAMED { ", ..." } else { "" };
            let reason = format!("{} steps are not declared: {named}{more}", unknown.len());
            let outcome = if numbers.is_empty() { Outcome::Missing } else { Outcome::Clipped };
            return answer(outcome, reason, steps);
        }
        answer(if steps > 0 { Outcome::Applied } else { Outcome::Duplicate }, String::new(), steps)
    }

    /// Forgets what nothing was heard of for too long, and what is over.
    pub fn expire(&mut self, now: Instant) -> Vec<GraphName> {
        let late = |graph: &Graph| {
            let silent = now.since(graph.heard);
            // What runs may be a long step.
            silent > SILENCE || (graph.is_over() && silent > OVER)
        };
        let gone: Vec<GraphName> = self.graphs.iter().filter(|(_, g)| late(g)).map(|(n, _)| n.clone()).collect();
        for name in &gone {
            self.remove(name);
        }
        self.removed.expire(now);
        gone
    }

    /// The graphs that a program of a name declared: of one tenant, or of all.
    #[must_use]
    pub fn named(&self, program: &str, tenant: Option<&TenantId>) -> Vec<GraphName> {
        let fits = |name: &&GraphName| name.program == program;
        match tenant {
            Some(tenant) => {
                let name = GraphName { tenant: tenant.clone(), program: program.to_owned() };
                if self.graphs.contains_key(&name) { vec![name] } else { Vec::new() }
            }
            None => self.graphs.keys().filter(fits).cloned().collect(),
        }
    }

    /// Whether a program runs steps of a graph. One that goes on after its last step is like one that declared nothing.
    #[must_use]
    pub fn covers(&self, tenant: &TenantId, program: &str) -> bool {
        let name = GraphName { tenant: tenant.clone(), program: program.to_owned() };
        self.runners.contains_key(&name) && !self.graphs.get(&name).is_some_and(Graph::is_over)
    }

    /// A graph as it is.
    pub fn view(&mut self, now: Instant, name: &GraphName) -> Option<GraphView> {
        let graph = self.graphs.get_mut(name)?;
        let ranks = graph.rank(now, (&name.tenant, &self.learnt), Duration::ZERO).clone();
        let step = |(number, step): (u32, &Step)| StepView {
            step: step.clone(),
            state: graph.state(number),
            ready: graph.ready().contains_key(&number),
            takes: ranks.takes[number as usize],
            rank: ranks.ranks[number as usize],
        };
        Some(GraphView {
            name: name.clone(),
            revision: graph.revision,
            steps: (0..).zip(graph.plan.steps()).map(step).collect(),
            remaining: ranks.remaining,
            longest: ranks.longest,
            attained: graph.attained(now),
        })
    }

    /// Graphs whose progress changed since the last call, with how far each of their steps is, in the plan's order: to be
    /// made durable.
    pub fn take_changes(&mut self, limit: usize) -> Vec<(GraphName, u64, Vec<StepState>)> {
        let mut out = Vec::new();
        while let Some(name) = if out.len() < limit { self.changed.pop_first() } else { None } {
            let Some(graph) = self.graphs.get(&name) else { continue };
            out.push((name.clone(), graph.revision, graph.states().to_vec()));
        }
        out
    }

    /// How many there are.
    #[must_use]
    pub fn counts(&self) -> GraphCounts {
        let mut counts = GraphCounts { graphs: self.graphs.len(), ..GraphCounts::default() };
        for graph in self.graphs.values() {
            counts.running += graph.running().len();
            counts.ended += graph.ended();
        }
        counts.waiting = self.steps - counts.running - counts.ended;
        counts
    }
}

/// Programs that run steps of a plan, each once.
fn runners(name: &GraphName, plan: &Plan) -> BTreeSet<GraphName> {
    let of = |program: &str| GraphName { tenant: name.tenant.clone(), program: program.to_owned() };
    let branches = plan.steps().iter().map(|s| s.program.as_str()).filter(|p| !p.is_empty());
    branches.map(of).chain([name.clone()]).collect()
}
