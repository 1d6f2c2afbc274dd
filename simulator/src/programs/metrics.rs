//! What a run counts.

use std::time::Duration;

use kvtier_policy::programs::Spent;

use super::cache::{Occupancy, TYPES, Written};

/// Where tokens of prompts came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Served {
    pub(crate) device: u64,
    pub(crate) host: u64,
    pub(crate) disk: u64,
    pub(crate) store: u64,
    pub(crate) computed: u64,
}

impl Served {
    pub(crate) const fn hits(&self) -> u64 {
        self.device + self.host + self.disk + self.store
    }

    pub(crate) const fn all(&self) -> u64 {
        self.hits() + self.computed
    }
}

/// All that a run counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    /// From arrival to the end of each program that ended, in order of their numbers.
    pub(crate) completions: Vec<Option<Duration>>,
    pub(crate) served: Served,
    /// Tokens of blocks that some node had computed before.
    pub(crate) ideal_tokens: u64,
    /// Of those, tokens computed again, and their operations.
    pub(crate) recomputed_tokens: u64,
    pub(crate) recomputed_flops: f64,
    pub(crate) output_tokens: u64,
    pub(crate) steps: u64,
    /// Of steps: for memory of the device, for loads, to the first token after that, and to the last.
    pub(crate) queued: Duration,
    pub(crate) loaded: Duration,
    pub(crate) computing: Duration,
    pub(crate) decoding: Duration,
    /// Bytes over each kind of link.
    pub(crate) link_bytes: [u64; 4],
    pub(crate) link_busy: [Duration; 4],
    pub(crate) engine_busy: Duration,
    pub(crate) ends: Duration,
    pub(crate) occupancy: Occupancy,
    pub(crate) written: Written,
    pub(crate) stored_blocks: u64,
    pub(crate) spent: Spent,
    /// Bytes that steps waited for from disk and storage.
    pub(crate) demanded_bytes: u64,
    pub(crate) events: u64,
    pub(crate) peak_blocks: usize,
    /// Programs that ended, over the middle half of them.
    pub(crate) programs_per_second: f64,
    /// Blocks that programs under way may use again, on average over the middle of the run.
    pub(crate) live_blocks: f64,
}

impl Metrics {
    /// Adds what a node counted.
    pub(crate) fn add_occupancy(&mut self, other: &Occupancy) {
        for kind in 0..TYPES {
            self.occupancy.all[kind] += other.all[kind];
            self.occupancy.useful[kind] += other.useful[kind];
        }
    }
}
