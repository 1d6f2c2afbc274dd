//! Copies that other nodes had made here ahead of their use, and what became of them.
//!
//! *Invariant*: each byte that came so is one of unread in host memory, unread elsewhere, useful or wasted
//! (`copies_made_ahead_are_useful_once_read_and_wasted_if_they_go_unread`).

use super::{BlockId, Catalog};
use crate::entry::{Entry, Flags};

/// Bytes of copies that other nodes had made here, by what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpreadCounts {
    /// Read here since.
    pub useful_bytes: u64,
    /// Under way when a reader came.
    pub late_bytes: u64,
    /// They went from this node and nobody had read them.
    pub wasted_bytes: u64,
    /// Not taken: as much lay here unread as may.
    pub refused_bytes: u64,
    /// In host memory, and not read yet.
    pub unread_bytes: u64,
}

impl SpreadCounts {
    /// Bytes of an entry that lie unread in host memory.
    pub(super) fn of(entry: &Entry) -> u64 {
        let unread = entry.flags.has(Flags::SPREAD) && entry.host.is_some();
        if unread { entry.bytes.into() } else { 0 }
    }

    /// An entry of which so much lay unread in host memory changed: with its last copy it goes unread.
    pub(super) fn changed(&mut self, unread: u64, entry: &mut Entry) {
        self.unread_bytes = self.unread_bytes + Self::of(entry) - unread;
        if entry.flags.has(Flags::SPREAD) && entry.fastest().is_none() {
            entry.flags.set(Flags::SPREAD, false);
            self.wasted_bytes += u64::from(entry.bytes);
        }
    }
}

impl Catalog {
    /// A reader came for an entry.
    pub(crate) fn read_ahead(&mut self, id: BlockId) {
        let entry = self.raw(id);
        if !entry.flags.has(Flags::SPREAD) {
            return;
        }
        let (before, bytes) = (SpreadCounts::of(entry), u64::from(entry.bytes));
        entry.flags.set(Flags::SPREAD, false);
        self.spread.unread_bytes -= before;
        self.spread.useful_bytes += bytes;
    }
}
