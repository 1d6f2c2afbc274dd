//! `kvtierd`, the node daemon: the shell around [`kvtier_policy::Core`].
//!
//! It owns memory and storage, serves gRPC, executes the core's actions, and decides nothing that the core could.
//!
//! *Lock order*: the core's mutex is taken by [`node::Node::with_core`] only, held for one call, never across `.await`;
//! the arena's own mutex lies under it.
//!
//! *Shutdown*: stop accepting, tell attachments, drain offloads until a deadline, close stores, leave.
#![forbid(unsafe_code)]

mod ahead;
mod claims;
pub mod cluster;
pub mod config;
pub mod descriptors;
mod device;
pub mod directory;
mod graphs;
mod guard;
pub mod hints;
mod journaling;
mod marks;
pub mod metrics;
pub mod mover;
pub mod node;
pub mod open_files;
mod operations;
mod pool;
mod programs;
mod reclaim;
pub mod recovery;
pub mod rules;
pub mod serve;
mod services;
pub mod turns;
mod units;
