//! Starts reads: part by part, in order, as far as each link's window allows.

use std::rc::Rc;

use super::{Engine, Why};
use crate::ucx::raw::{Get, Posted};

/// Bytes of one operation: large enough to keep a device busy, small enough to lie in a core's cache when it has arrived, for
/// its checksum.
const PART_BYTES: usize = 512 << 10;
/// Operations of one link before others have their turn, and commands and completions theirs. Where UCX reads by copying
/// (`cma`), an operation ends within the call that starts it.
const BURST: usize = 8;

impl Engine {
    /// Starts what can be started; returns whether something was.
    pub(super) fn post(&mut self) -> bool {
        if self.jobs.is_empty() {
            return false;
        }
        let ready = self.links.iter().filter(|(_, link)| !link.waiting.is_empty()).map(|(id, _)| *id);
        let mut some = false;
        for link in ready.collect::<Vec<_>>() {
            for _ in 0..BURST {
                if !self.post_part(link) {
                    break;
                }
                some = true;
            }
        }
        some |= self.confirm_all();
        some
    }

    /// Starts a link's next operation; false if there is none or no room.
    fn post_part(&mut self, link_id: u64) -> bool {
        let Some(link) = self.links.get_mut(&link_id) else { return false };
        let (Some(endpoint), Some(tag)) = (&link.endpoint, link.waiting.front().copied()) else { return false };
        let active = self.jobs.get_mut(&tag).expect("a read that waits has not ended");
        let (at, len) = (active.started, PART_BYTES.min(active.job.len - active.started));
        if link.in_flight_bytes > 0 && link.in_flight_bytes + len > self.config.window_bytes {
            return false;
        }
        let Some(landing) = active.job.landing() else {
            // Given up.
            link.waiting.pop_front();
            self.retire(tag);
            return true;
        };
        active.started += len;
        if active.started == active.job.len {
            link.waiting.pop_front();
        }
        let remote = active.job.place.address + at as u64;
        let posted = endpoint.get(Get { tag, key: Rc::clone(&active.key), remote, landing, at, len });
        match posted {
            Ok(Posted::Done) => self.arrive(tag, at, len),
            Ok(Posted::InFlight) => {
                active.in_flight += 1;
                link.in_flight_bytes += len;
                return true;
            }
            Err(failure) => self.fail_link(link_id, &Why::Failed(failure)),
        }
        self.retire(tag);
        true
    }
}
