//! Turns as they begin: a step may run from now on, and whoever sends requests hears of it without asking.
//!
//! Each is told once, also where its graph is declared anew; after a restart those that may run are told again.
//!
//! *Bounds*: one entry a graph.

use std::collections::{BTreeMap, BTreeSet};

use kvtier_types::{Instant, TenantId};

use super::{GraphName, Graphs};

/// Graphs with turns that were not told, by when the next one begins.
#[derive(Debug, Default)]
pub(super) struct Turns {
    order: BTreeSet<(Instant, GraphName)>,
    at: BTreeMap<GraphName, Instant>,
}

/// A step that may run from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Whose.
    pub tenant: TenantId,
    /// Who runs it.
    pub program: String,
    /// The program that declared it.
    pub graph: String,
    /// Its id in there.
    pub step: String,
}

impl Turns {
    /// The next turn of a graph begins then; `None` for one without.
    pub(super) fn set(&mut self, name: &GraphName, next: Option<Instant>) {
        if self.at.get(name).copied() == next {
            return;
        }
        if let Some(former) = self.at.remove(name) {
            self.order.remove(&(former, name.clone()));
        }
        if let Some(next) = next {
            self.at.insert(name.clone(), next);
            self.order.insert((next, name.clone()));
        }
    }

    fn take(&mut self, now: Instant) -> Option<GraphName> {
        let (at, name) = self.order.first().filter(|(at, _)| *at <= now)?.clone();
        self.order.remove(&(at, name.clone()));
        self.at.remove(&name);
        Some(name)
    }
}

impl Graphs {
    /// Steps whose turn began since the last call: those of one graph, none once all were told.
    pub fn take_turns(&mut self, now: Instant) -> Option<Vec<Turn>> {
        let name = self.turns.take(now)?;
        let Some(graph) = self.graphs.get_mut(&name) else { return Some(Vec::new()) };
        let begun = graph.take_turns(now);
        self.turns.set(&name, graph.next_turn());
        let turn = |number: &u32| {
            let step = &graph.plan.steps()[*number as usize];
            let program = if step.program.is_empty() { &name.program } else { &step.program };
            Turn {
                tenant: name.tenant.clone(),
                program: program.clone(),
                graph: name.program.clone(),
                step: step.id.clone(),
            }
        };
        Some(begun.iter().map(turn).collect())
    }
}
