//! Extents that are registered with UCX, shared by their exposures.
//!
//! *Invariants*: an extent is registered at most once; it stays registered while an exposure holds its [`Registered`].
//!
//! *Bounds*: [`MAX_REGISTERED`].
//!
//! *Lock order*: one mutex, a leaf.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvtier_memory::Extent;
use parking_lot::Mutex;

use crate::TransportError;

/// Most registered extents.
const MAX_REGISTERED: usize = 4096;

/// A registered extent.
#[derive(Debug)]
pub(super) struct Registered {
    /// Keeps the address in [`Registry`]'s map from being used by another extent.
    pub(super) extent: Arc<Extent>,
    /// The key that peers need.
    pub(super) key: Bytes,
}

/// The registered extents.
#[derive(Debug, Default)]
pub(super) struct Registry {
    entries: Mutex<HashMap<usize, Entry>>,
}

#[derive(Debug)]
struct Entry {
    registered: Arc<Registered>,
    /// Since when no exposure holds it, as far as was seen.
    idle_since: Option<Instant>,
}

/// The name of an extent while somebody holds it.
pub(super) fn name(extent: &Arc<Extent>) -> usize {
    Arc::as_ptr(extent).addr()
}

impl Registry {
    /// An extent's registration, if it has one.
    pub(super) fn get(&self, extent: &Arc<Extent>) -> Option<Arc<Registered>> {
        self.entries.lock().get(&name(extent)).map(|entry| Arc::clone(&entry.registered))
    }

    /// Whether one more fits.
    pub(super) fn check_room(&self) -> Result<(), TransportError> {
        if self.entries.lock().len() < MAX_REGISTERED {
            return Ok(());
        }
        Err(TransportError::Limit { what: "registered extents", max: MAX_REGISTERED })
    }

    /// Adds one that was registered just now.
    pub(super) fn add(&self, registered: &Arc<Registered>) {
        let entry = Entry { registered: Arc::clone(registered), idle_since: None };
        self.entries.lock().insert(name(&registered.extent), entry);
    }

    /// Removes those that no exposure has held for `linger`, and returns their names with when to come again for others.
    pub(super) fn sweep(&self, now: Instant, linger: Duration) -> (Vec<Arc<Registered>>, Option<Instant>) {
        let mut entries = self.entries.lock();
        let mut next: Option<Instant> = None;
        let mut expired = Vec::new();
        entries.retain(|_, entry| {
            // Clones come from this map, under this lock, or from another clone: one reference is the map's own.
            if Arc::strong_count(&entry.registered) > 1 {
                entry.idle_since = None;
                return true;
            }
            let due = *entry.idle_since.get_or_insert(now) + linger;
            if due <= now {
                expired.push(Arc::clone(&entry.registered));
                return false;
            }
            next = Some(next.map_or(due, |next| next.min(due)));
            true
        });
        (expired, next)
    }

    /// Removes all.
    pub(super) fn clear(&self) {
        self.entries.lock().clear();
    }
}
