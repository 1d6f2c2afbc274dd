//! Extents of the daemon mapped into this process, per attachment. Used on copy threads only: mapping waits for the daemon.
//!
//! # Bounds
//! [`MAX_MAPPED`] mappings; one request to the daemon at a time, each within its job's deadline. After a request that got no
//! answer, others fail at once for [`PAUSE_AFTER_SILENCE`], so that a stalled daemon does not hold every copy thread.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_memory::fdpass::{Access, FdClient, Request};
use kvtier_memory::{MappedExtent, MemoryError};
use parking_lot::Mutex;

use crate::counters::Counters;
use crate::link::Attachment;

/// Most mappings kept; at 1 GiB an extent that is more than a node's memory.
const MAX_MAPPED: usize = 4096;
/// Longest wait for one extent, whatever the job's deadline.
const MAX_WAIT: Duration = Duration::from_secs(1);
/// How long the daemon is left alone after it did not answer.
const PAUSE_AFTER_SILENCE: Duration = Duration::from_millis(250);

/// The mappings of one session.
#[derive(Debug, Default)]
pub(crate) struct Extents {
    cache: Mutex<Cache>,
}

#[derive(Debug, Default)]
struct Cache {
    /// Epoch of everything here.
    epoch: u64,
    mapped: HashMap<(u32, bool), Arc<MappedExtent>>,
    client: Option<Arc<Mutex<FdClient>>>,
    silent_until: Option<Instant>,
}

impl Cache {
    /// Forgets what belongs to another attachment. Running copies keep their mappings.
    fn enter(&mut self, attachment: &Attachment) -> Arc<Mutex<FdClient>> {
        if self.epoch != attachment.epoch {
            *self = Self { epoch: attachment.epoch, ..Self::default() };
        }
        let client = self.client.get_or_insert_with(|| Arc::new(Mutex::new(FdClient::new(&attachment.fd_socket))));
        Arc::clone(client)
    }
}

impl Extents {
    /// The extent mapped as asked, from the cache or from the daemon until `deadline`; `None` when it cannot be had.
    pub(crate) fn get(
        &self,
        attachment: &Attachment,
        (extent, access): (u32, Access),
        deadline: Instant,
        counters: &Counters,
    ) -> Option<Arc<MappedExtent>> {
        let slot = (extent, access == Access::Writable);
        let client = {
            let mut cache = self.cache.lock();
            let client = cache.enter(attachment);
            if let Some(mapped) = cache.mapped.get(&slot) {
                return Some(Arc::clone(mapped));
            }
            if cache.silent_until.is_some_and(|until| Instant::now() < until) {
                return None;
            }
            client
        };
        let request = Request { attachment: attachment.token, extent, access };
        let result = ask(&mut client.lock(), &request, deadline);
        let mut cache = self.cache.lock();
        match result {
            Ok(mapped) => {
                counters.extents_mapped.one();
                let mapped = Arc::new(mapped);
                if cache.epoch == attachment.epoch {
                    if cache.mapped.len() >= MAX_MAPPED {
                        cache.mapped.clear();
                    }
                    cache.mapped.insert(slot, Arc::clone(&mapped));
                }
                Some(mapped)
            }
            Err(error) => {
                counters.extents_failed.one();
                if !matches!(error, MemoryError::Refused { .. }) && cache.epoch == attachment.epoch {
                    cache.silent_until = Some(Instant::now() + PAUSE_AFTER_SILENCE);
                }
                None
            }
        }
    }
}

/// Asks, and once more over a new connection: the daemon hangs up idle ones.
fn ask(client: &mut FdClient, request: &Request, deadline: Instant) -> Result<MappedExtent, MemoryError> {
    let left = || deadline.saturating_duration_since(Instant::now()).min(MAX_WAIT);
    match client.map(request, left()) {
        Err(MemoryError::System { .. } | MemoryError::Protocol { .. }) if !left().is_zero() => {
            client.map(request, left())
        }
        result => result,
    }
}
