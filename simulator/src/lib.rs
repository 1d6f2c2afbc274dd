//! The simulator: the daemon's own policy core over virtual time, with faults by seed.
//!
//! A run is a function of its seed: one thread, one event queue, one source of chance. Cores, peer sessions, publication
//! and the directory's table are the ones that ship; disks, object store, network and engines are models.
#![forbid(unsafe_code)]

mod campaign;
mod checkers;
mod directory;
mod disk;
mod events;
mod faults;
mod memory;
mod moves;
mod network;
mod node;
mod peers;
mod programs;
mod prompts;
mod replay;
mod report;
mod rng;
mod sessions;
mod workload;
mod world;

#[cfg(test)]
mod tests;

pub use campaign::{Campaign, Summary};
pub use checkers::Failure;
pub use programs::{CalibrateArgs, RunArgs, SweepArgs};
pub use replay::ReplayArgs;
pub use report::Stats;
pub use world::{Options, Outcome, Sabotage, run};
