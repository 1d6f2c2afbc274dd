//! How much may be written to the disk: flash wears out by what is written, and what is written waits for nothing else.

use kvtier_types::Instant;

/// A budget of bytes that grows with time, up to what a second gives.
#[derive(Debug, Clone, Copy)]
pub(super) struct WriteBudget {
    /// Bytes a second; none where all may be written.
    rate: Option<u64>,
    /// May be below zero: what is begun is written whole.
    left: i128,
    at: Instant,
}

impl WriteBudget {
    pub(super) fn new(rate: Option<u64>) -> Self {
        Self { rate, left: rate.map_or(0, i128::from), at: Instant::ZERO }
    }

    /// Whether another write may begin; so many bytes are written if it does.
    pub(super) fn take(&mut self, now: Instant, bytes: u64) -> bool {
        let Some(rate) = self.rate else { return true };
        let span = i128::try_from(now.since(self.at).as_nanos()).unwrap_or(i128::MAX);
        let grown = i128::from(rate).saturating_mul(span) / 1_000_000_000;
        if grown > 0 {
            // Otherwise a low rate would grow by nothing, call after call.
            self.at = self.at.max(now);
            self.left = self.left.saturating_add(grown).min(rate.into());
        }
        if self.left <= 0 {
            return false;
        }
        self.left -= i128::from(bytes);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn no_more_than_the_rate_is_written_over_time() {
        let mut budget = WriteBudget::new(Some(1000));
        let mut written = 0;
        for ms in 0..10_000 {
            let now = Instant::ZERO + Duration::from_millis(ms);
            while budget.take(now, 300) {
                written += 300;
            }
        }
        assert!((10_000..=11_300).contains(&written), "{written} bytes in ten seconds, with one second ahead");
    }

    #[test]
    fn a_block_larger_than_a_second_gives_is_written_all_the_same() {
        let mut budget = WriteBudget::new(Some(10));
        assert!(budget.take(Instant::ZERO, 100));
        assert!(!budget.take(Instant::ZERO + Duration::from_secs(8), 100));
        assert!(budget.take(Instant::ZERO + Duration::from_secs(10), 100));
    }

    #[test]
    fn without_a_rate_all_is_written() {
        let mut budget = WriteBudget::new(None);
        assert!((0..1000).all(|_| budget.take(Instant::ZERO, u64::MAX)));
    }
}
