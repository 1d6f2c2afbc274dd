//! Tiers that hold bytes: log segments on disk, packs in an object store, their in-memory twin; and the control journal.

mod codec;
#[doc(hidden)]
pub mod conformance;
pub mod disk;
mod io;
pub mod journal;
mod lock;
pub mod memory_twin;
pub mod object;
pub mod store;

pub use disk::{DiskConfig, DiskStore, Recovered};
pub use io::IoEngine;
pub use journal::{Entry, Journal, JournalState};
pub use memory_twin::MemoryTwin;
pub use store::{BlockStore, Expect, Location, ReadBack, RecordMeta, StorageError, Usage, Written};
