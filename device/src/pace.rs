//! A cap on bandwidth: so many bytes a second, in bursts of at most a few milliseconds' worth.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// What may be moved at once after a pause: what the cap allows in this time.
const BURST: Duration = Duration::from_millis(10);

/// A cap that several threads share.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: Option<u64>,
    /// Up to when what was moved so far takes.
    busy_until: Mutex<Option<Instant>>,
}

impl Pace {
    /// At most so many bytes a second; `None` for as many as come.
    #[must_use]
    pub const fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, busy_until: Mutex::new(None) }
    }

    /// Counts bytes that are about to be moved; answers how long to wait before.
    #[must_use]
    pub fn take(&self, now: Instant, bytes: u64) -> Duration {
        let Some(rate) = self.bytes_per_second.filter(|rate| *rate > 0) else { return Duration::ZERO };
        let mut until = self.busy_until.lock();
        let from = until.map_or(now, |until| until.max(now.checked_sub(BURST).unwrap_or(now)));
        *until = Some(from + Duration::from_secs_f64(bytes as f64 / rate as f64));
        from.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_the_cap_waits() {
        let pace = Pace::new(Some(1 << 20));
        let now = Instant::now();
        assert_eq!(pace.take(now, 1 << 20), Duration::ZERO);
        assert_eq!(pace.take(now, 1 << 20), Duration::from_secs(1));
        assert_eq!(pace.take(now + Duration::from_secs(1), 0), Duration::from_secs(1));
        assert_eq!(pace.take(now + Duration::from_secs(60), 1), Duration::ZERO);
        assert_eq!(Pace::new(None).take(now, u64::MAX), Duration::ZERO);
    }
}
