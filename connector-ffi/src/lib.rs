//! The connector's library, `libkvtier`: a C interface over a session with the node's daemon.
//!
//! ```text
//! ffi (the C wall) -> session -> lookup, reserve          scheduler side: calls in the background, answers polled
//!                             -> jobs -> copying          worker side: native threads copy frames <-> engine memory
//!                             -> attach, report           keep attached; tell seals, loads and releases
//! ```
//! *Invariants*: no panic crosses the C boundary; no call waits for the daemon beyond the caller's bound; a daemon that is
//! absent, slow or restarted looks like a miss; nothing here is static, so sessions do not know of each other.

pub mod attach;
mod copying;
pub mod counters;
pub mod device;
pub mod error;
mod extents;
pub mod ffi;
pub mod frame;
pub mod hints;
pub mod jobs;
pub mod keys;
pub mod link;
pub mod lookup;
pub mod regions;
pub mod report;
pub mod reserve;
pub mod session;
pub mod shared;
pub mod spec;
pub mod weights;

pub use error::Error;
pub use session::Session;
pub use spec::Spec;
