//! What the steps that are about to run share: so many read one context, or a part of it, that it is worth having in memory,
//! and on more nodes than one.
//!
//! *Bounds*: one look goes through graphs until [`MOST_LOOKED_AT`] of their steps were looked at; those that share nothing are
//! not looked through.

use std::ops::Bound;
use std::time::Duration;

use kvtier_types::{BlockKey, Instant, SemanticType, TenantId};

use super::plan::Step;
use super::{GraphName, Graphs};

/// Keys of blocks that one step names: the last of a prefix, one of each group of layers.
pub const MAX_SHARED_KEYS: usize = 16;
/// Steps that one look goes through: it holds the graphs' lock.
const MOST_LOOKED_AT: usize = 1024;

/// A part of a context.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum SharedContext {
    /// Tokens of the latest context of a program; to its end when the end is zero.
    Tokens {
        /// Whose; the declared program's when empty.
        program: String,
        /// The first of them.
        start: u32,
        /// The one after the last.
        end: u32,
    },
    /// All up to these blocks.
    Blocks(Vec<BlockKey>),
}

/// What steps share.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sharing {
    /// Whose steps they are.
    pub tenant: TenantId,
    /// Whose context it is a part of.
    pub program: String,
    /// Which part.
    pub part: SharedPart,
}

/// Which part of a context.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum SharedPart {
    /// These tokens; to the end when the end is zero.
    Tokens(u32, u32),
    /// All up to these blocks.
    Blocks(Vec<BlockKey>),
    /// All up to the last block of a type.
    Type(SemanticType),
}

impl Step {
    /// What it shares, in a graph of a name.
    pub(super) fn sharing(&self, name: &GraphName) -> Option<Sharing> {
        let (program, part) = match &self.shared {
            Some(SharedContext::Tokens { program, start, end }) => {
                let program = if program.is_empty() { &name.program } else { program };
                (program, SharedPart::Tokens(*start, *end))
            }
            Some(SharedContext::Blocks(keys)) => (&name.program, SharedPart::Blocks(keys.clone())),
            None if self.shares == SemanticType::Unspecified => return None,
            None => (&name.program, SharedPart::Type(self.shares)),
        };
        Some(Sharing { tenant: name.tenant.clone(), program: program.clone(), part })
    }

    /// Whether it shares anything.
    pub(super) const fn is_sharing(&self) -> bool {
        self.shared.is_some() || !matches!(self.shares, SemanticType::Unspecified)
    }
}

impl Graphs {
    /// What steps share that have not begun and may within a time, one of each step, of some graphs after one; and after
    /// which to go on if there are more.
    #[must_use]
    pub fn sharing_some(&self, before: Instant, after: Option<&GraphName>) -> (Vec<Sharing>, Option<GraphName>) {
        let (mut found, mut looked_at) = (Vec::new(), 0);
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        for name in self.sharing.range((start, Bound::Unbounded)) {
            let Some(graph) = self.graphs.get(name) else { continue };
            let due = graph.ready().iter().filter(|(_, due)| **due <= before);
            found.extend(due.filter_map(|(number, _)| graph.plan.steps()[*number as usize].sharing(name)));
            looked_at += graph.ready().len() + 1;
            if looked_at >= MOST_LOOKED_AT {
                return (found, Some(name.clone()));
            }
        }
        (found, None)
    }

    /// What the first step shares that a program is to run: where its context is not known, it begins with that.
    #[must_use]
    pub fn shared_by(&self, tenant: &TenantId, program: &str) -> Option<Sharing> {
        let runner = GraphName { tenant: tenant.clone(), program: program.to_owned() };
        let of_graph = |graph: &String| {
            let name = GraphName { tenant: tenant.clone(), program: graph.clone() };
            let steps = self.graphs.get(&name)?.plan.steps();
            let runs = |step: &&Step| {
                let by = if step.program.is_empty() { &name.program } else { &step.program };
                by == program && step.is_sharing()
            };
            steps.iter().find(runs)?.sharing(&name)
        };
        self.runners.get(&runner)?.iter().find_map(of_graph)
    }
}

/// Steps that may begin so long from now on count as about to.
pub const SHARED_SOON: Duration = Duration::from_secs(60);
