//! What the graph of a program says about its state: when it will be back, what to bring before that, where to run it next,
//! in which order, and how many copies of what it shares are worth having.
//!
//! Pure functions and state machines: they are told the time and what things cost, and say what should be done. The daemon
//! and the simulator do it.

mod admission;
mod costing;
mod durations;
pub mod graphs;
mod hot;
mod joins;
mod order;
mod placement;
mod proactive;
mod replicas;
mod sketch;

pub use admission::{Admission, AdmissionConfig};
pub use costing::{
    Bill, BlockPlaces, Costing, DEFAULT_PREFILL_TOKENS_PER_SECOND, LoadRates, MAX_BLOCK_INDEX, Server, ShardPlaces,
    Step, choose,
};
pub use durations::{Durations, Kind, Return};
pub use hot::{Hot, MAX_PREFIXES};
pub use joins::{Joins, MAX_BRANCHES};
pub use order::{Rank, attained_bucket, attained_floor, upward_ranks};
pub use placement::{Candidate, Choice, Reason, STICK_SHARE, place, split};
pub use proactive::{Fate, Proactive, ProactiveConfig, Spent};
pub use replicas::replicas;
pub use sketch::Sketch;
