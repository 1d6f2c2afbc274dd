//! Hints so far, by action and by what became of them.

use std::sync::atomic::{AtomicU64, Ordering};

use kvtier_types::Outcome;
use kvtier_types::hints::{KINDS, Note};

/// What can become of a hint: applied, clipped, rejected, or ignored.
const FATES: usize = 4;

/// One counter for each kind and fate. Statistics: they order nothing.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    told: [[AtomicU64; FATES]; KINDS.len()],
    not_held: AtomicU64,
}

impl Counts {
    /// Counts what became of an action.
    pub(crate) fn note(&self, note: &Note) {
        let fate = match note.outcome() {
            Outcome::Applied | Outcome::Accepted | Outcome::Deferred | Outcome::Duplicate => 0,
            Outcome::Clipped => 1,
            Outcome::Rejected | Outcome::Missing => 2,
            Outcome::Unsupported => 3,
        };
        if let Some(kind) = KINDS.iter().position(|kind| *kind == note.kind) {
            self.told[kind][fate].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Runs of blocks were to be retained or pinned, and there was no room for all of that.
    pub(crate) fn not_held(&self, runs: usize) {
        self.not_held.fetch_add(runs as u64, Ordering::Relaxed);
    }

    /// Runs of blocks that could not be held as a whole.
    pub(crate) fn runs_not_held(&self) -> u64 {
        self.not_held.load(Ordering::Relaxed)
    }

    /// All kinds together, by what became of them.
    pub(crate) fn sums(&self) -> [(&'static str, u64); FATES + 1] {
        let names = ["hints_applied", "hints_clipped", "hints_rejected", "hints_ignored"];
        let [applied, clipped, rejected, ignored] =
            std::array::from_fn(|fate| (names[fate], self.of(fate).map(|(_, count)| count).sum()));
        [applied, clipped, rejected, ignored, ("hints_not_held", self.runs_not_held())]
    }

    /// Kinds of one fate with their counts.
    pub(crate) fn of(&self, fate: usize) -> impl Iterator<Item = (&'static str, u64)> {
        KINDS.into_iter().zip(&self.told).map(move |(kind, row)| (kind, row[fate].load(Ordering::Relaxed)))
    }
}
