//! What the transport did.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::TransportStats;

/// Counts that any thread adds to.
#[derive(Debug, Default)]
pub(super) struct Counters {
    read_bytes: AtomicU64,
    reads: AtomicU64,
    failed_reads: AtomicU64,
    pub(super) links: AtomicU64,
    pub(super) exposed: AtomicU64,
}

impl Counters {
    /// A read ended, well with so many bytes or not.
    pub(super) fn count_read(&self, bytes: Option<u64>) {
        if let Some(bytes) = bytes {
            self.reads.fetch_add(1, Ordering::Relaxed);
            self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            self.failed_reads.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// As they are now. A peer reads without this node's knowledge, so nothing is known of what was served.
    pub(super) fn now(&self) -> TransportStats {
        TransportStats {
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            reads: self.reads.load(Ordering::Relaxed),
            failed_reads: self.failed_reads.load(Ordering::Relaxed),
            served_bytes: 0,
            links: self.links.load(Ordering::Relaxed),
            exposed: self.exposed.load(Ordering::Relaxed),
        }
    }
}
