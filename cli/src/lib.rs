//! `kvtier`: what an operator asks of a node's daemon, and of the node itself.
//!
//! Every command makes a [`report::Report`], which holds the text for people and the JSON for programs; `main` prints one
//! of the two. Commands that talk to the daemon live in one file each; `doctor` looks at the machine without a daemon.

pub mod address;
pub mod args;
pub mod client;
pub mod doctor;
pub mod drain;
pub mod error;
pub mod evict;
pub mod keys;
pub mod locate;
pub mod ls;
pub mod nodes;
pub mod report;
pub mod run;
pub mod status;
pub mod table;
pub mod units;
