//! The C wall. Every function here checks the process (fork), its pointers and sizes, catches panics, and answers a status.
//!
//! *Invariants*: no other module of this crate dereferences a pointer that C gave; nothing C gave is kept after the call,
//! but addresses of registered regions.

pub mod args;
pub mod scheduler;
pub mod session;
pub mod types;
pub mod worker;

#[cfg(test)]
mod tests;
