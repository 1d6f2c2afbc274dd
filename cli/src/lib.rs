//! `kvtier`: what an operator asks of a node's daemon, and of the node itself.
//!
//! Every command makes a [`report::Report`], which holds the text for people and the JSON for programs; `main` prints one
//! of the two. Commands that talk to the daemon live in one file each; `doctor` looks at the machine without a daemon.

pub mod address;
pub mod args;
mod capabilities;
mod claims;
pub mod client;
pub mod doctor;
pub mod drain;
pub mod error;
mod events;
pub mod evict;
mod files;
mod graphs;
mod hints;
pub mod keys;
pub mod locate;
pub mod ls;
mod meaning;
mod movement;
pub mod nodes;
mod operations;
mod outcomes;
pub mod parse;
mod place;
mod programs;
pub mod report;
mod rules;
mod rules_check;
pub mod run;
pub mod status;
pub mod table;
mod taint;
mod target;
mod top;
pub mod units;
