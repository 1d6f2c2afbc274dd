//! The session's own counters, rendered as JSON for the caller's metrics. Statistics: they order nothing.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Every counter of a session, since it was opened.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: Counter,)*
        }

        impl Counters {
            /// One flat JSON object, a number a counter.
            #[must_use]
            pub fn to_json(&self) -> String {
                let mut fields = serde_json::Map::new();
                $(fields.insert(stringify!($name).to_owned(), self.$name.get().into());)*
                serde_json::Value::Object(fields).to_string()
            }
        }
    };
}

counters! {
    /// Attachments made.
    attached,
    /// Attachments lost: the daemon went away, or reaped us.
    detached,
    /// Attach attempts that failed or were refused.
    attach_failed,
    /// Lookups submitted.
    lookups,
    /// Lookups answered zero at once: no daemon, or it was not told the namespace yet.
    lookups_unavailable,
    /// Lookups answered by the daemon within their deadline.
    lookups_answered,
    /// Lookups whose deadline passed first.
    lookups_expired,
    /// Lookups that failed, or whose reply contradicted itself.
    lookups_failed,
    /// Lookups voided by a lost attachment or a namespace switch.
    lookups_voided,
    /// Blocks asked for.
    lookup_blocks,
    /// Requests with hints.
    hinted,
    /// Hints that the daemon was not told, or did not answer.
    hints_failed,
    /// Reservations submitted.
    reserves,
    /// Reservations that failed, timed out or contradicted themselves: busy to the caller.
    reserves_failed,
    /// Blocks granted.
    blocks_granted,
    /// Blocks present already.
    blocks_present,
    /// Blocks busy.
    blocks_busy,
    /// Shards loaded.
    loads_done,
    /// Shards whose bytes did not match their checksum.
    loads_corrupt,
    /// Shards whose frame was gone, late or cancelled.
    loads_lost,
    /// Bytes loaded.
    load_bytes,
    /// Shards saved.
    saves_done,
    /// Shards not saved: frame gone, late or cancelled.
    saves_lost,
    /// Bytes saved.
    save_bytes,
    /// Extents mapped.
    extents_mapped,
    /// Extents that could not be mapped.
    extents_failed,
    /// Mapped extents that the engine's device reaches directly.
    extents_pinned,
    /// Mapped extents that could not be registered with the device: their copies are slower.
    pins_failed,
    /// Bytes loaded from a device's pool, within devices.
    device_load_bytes,
    /// Frames sealed, as the daemon confirmed.
    seals_applied,
    /// Seals that the daemon did not want: reaped, duplicate or rejected.
    seals_refused,
    /// Seals and abandons that never reached the daemon.
    seals_dropped,
    /// Load reports and releases that never reached the daemon.
    reports_dropped,
}

/// One number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn one(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Adds the length of something.
    pub fn count(&self, n: usize) {
        self.add(n as u64);
    }

    /// The number.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::Counters;

    #[test]
    fn every_counter_is_a_field_of_the_json() {
        let counters = Counters::default();
        counters.loads_done.add(3);
        let json: serde_json::Value = serde_json::from_str(&counters.to_json()).unwrap();
        assert_eq!(json["loads_done"], 3);
        assert_eq!(json["lookups"], 0);
    }
}
