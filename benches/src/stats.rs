//! Medians and spreads.

use serde::Serialize;

/// Samples, summed up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
    pub(crate) p99: f64,
    pub(crate) samples: usize,
}

impl Summary {
    /// # Panics
    /// Without samples.
    pub(crate) fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let last = samples.len().checked_sub(1).expect("a summary is of at least one sample");
        Self {
            median: samples[last / 2],
            least: samples[0],
            most: samples[last],
            p99: samples[(samples.len() * 99).div_ceil(100) - 1],
            samples: samples.len(),
        }
    }
}

/// One round: how long the subject and the baseline took for the same work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Round {
    pub(crate) subject_s: f64,
    pub(crate) baseline_s: f64,
}

impl Round {
    /// The subject's speed as a share of the baseline's.
    pub(crate) fn ratio(self) -> f64 {
        self.baseline_s / self.subject_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_tails() {
        let summary = Summary::of((1..=200).rev().map(f64::from).collect());
        assert_eq!((summary.median, summary.least, summary.most, summary.p99), (100.0, 1.0, 200.0, 198.0));
        let one = Summary::of(vec![3.0]);
        assert_eq!((one.median, one.p99), (3.0, 3.0));
        assert_eq!(Round { subject_s: 2.0, baseline_s: 1.0 }.ratio(), 0.5);
    }
}
