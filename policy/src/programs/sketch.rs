//! Quantiles of durations, from a histogram of eighth octaves whose past fades.
//!
//! *Bounds*: 1.2 KiB, whatever is counted; O(buckets) per quantile. A quantile is off by at most a sixteenth octave (4.4 %).

use std::time::Duration;

/// From a millisecond in eighth octaves: up to 19 days.
const BUCKETS: usize = 300;
const PER_OCTAVE: f64 = 8.0;
const FIRST_SECONDS: f64 = 1e-3;
/// Observations after which the past counts half.
const MEMORY: f32 = 1024.0;

/// A histogram of durations.
#[derive(Debug, Clone)]
pub struct Sketch {
    counts: Vec<f32>,
    total: f32,
}

impl Default for Sketch {
    fn default() -> Self {
        Self { counts: vec![0.0; BUCKETS], total: 0.0 }
    }
}

impl Sketch {
    /// Counts one.
    pub fn add(&mut self, duration: Duration) {
        self.counts[bucket(duration)] += 1.0;
        self.total += 1.0;
        if self.total > MEMORY {
            self.counts.iter_mut().for_each(|count| *count *= 0.5);
            self.total *= 0.5;
        }
    }

    /// How much was counted and has not faded.
    #[must_use]
    pub const fn weight(&self) -> f32 {
        self.total
    }

    /// The quantile `q` of those that are longer than `past`: `None` where none is known.
    #[must_use]
    pub fn quantile_beyond(&self, q: f64, past: Duration) -> Option<Duration> {
        let from = if past.is_zero() { 0 } else { bucket(past) + 1 };
        let beyond: f64 = self.counts.get(from..)?.iter().map(|c| f64::from(*c)).sum();
        if beyond <= 0.0 {
            return None;
        }
        let mut left = q.clamp(0.0, 1.0) * beyond;
        let mut last = from;
        for (at, count) in self.counts.iter().enumerate().skip(from).filter(|(_, count)| **count > 0.0) {
            last = at;
            left -= f64::from(*count);
            if left <= 0.0 {
                break;
            }
        }
        Some(middle(last))
    }

    /// The quantile `q` of all.
    #[must_use]
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        self.quantile_beyond(q, Duration::ZERO)
    }
}

fn bucket(duration: Duration) -> usize {
    let octaves = (duration.as_secs_f64() / FIRST_SECONDS).max(1.0).log2();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative, and clamped")]
    {
        ((octaves * PER_OCTAVE) as usize).min(BUCKETS - 1)
    }
}

/// The geometric middle of a bucket.
fn middle(bucket: usize) -> Duration {
    Duration::from_secs_f64(FIRST_SECONDS * ((bucket as f64 + 0.5) / PER_OCTAVE).exp2())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop, proptest};

    use super::*;

    #[test]
    fn nothing_is_known_at_first() {
        assert_eq!(Sketch::default().quantile(0.5), None);
    }

    #[test]
    fn what_has_passed_is_left_out() {
        let mut sketch = Sketch::default();
        (0..90).for_each(|_| sketch.add(Duration::from_secs(1)));
        (0..10).for_each(|_| sketch.add(Duration::from_secs(100)));
        let at = |q, past| sketch.quantile_beyond(q, Duration::from_secs(past)).map(|d| d.as_secs_f64());
        assert!((at(0.1, 0).unwrap() - 1.0).abs() < 0.05);
        assert!((at(0.1, 10).unwrap() / 100.0 - 1.0).abs() < 0.05);
        assert_eq!(at(0.5, 1000), None);
    }

    proptest! {
        /// Against the sorted list.
        #[test]
        fn quantiles_are_within_a_bucket(mut millis in prop::collection::vec(1_u64..10_000_000, 1..200), q in 0.0_f64..1.0) {
            let mut sketch = Sketch::default();
            millis.iter().for_each(|m| sketch.add(Duration::from_millis(*m)));
            millis.sort_unstable();
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
            let exact = millis[((q * millis.len() as f64).ceil() as usize).clamp(1, millis.len()) - 1] as f64 / 1000.0;
            let found = sketch.quantile(q).unwrap().as_secs_f64();
            assert!((found / exact).log2().abs() <= 0.5 / PER_OCTAVE + 1e-9, "{found} {exact}");
        }
    }
}
