//! Distributions that workloads draw from, by seed.

use std::time::Duration;

use super::engine::seconds;
use crate::rng::Rng;

/// A log-normal, by its median and the ratio of its 90th percentile to that, within bounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LogNormal {
    pub(crate) median: f64,
    pub(crate) p90_ratio: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// The 90th percentile of a standard normal.
const Z90: f64 = 1.281_551_565_5;

impl LogNormal {
    pub(crate) const fn new(median: f64, p90: f64, (low, high): (f64, f64)) -> Self {
        Self { median, p90_ratio: p90 / median, low, high }
    }

    /// From a mean and a standard deviation.
    pub(crate) fn of_mean(mean: f64, deviation: f64, bounds: (f64, f64)) -> Self {
        let variance = (deviation / mean).mul_add(deviation / mean, 1.0).ln();
        let median = mean / (variance / 2.0).exp();
        Self::new(median, median * (Z90 * variance.sqrt()).exp(), bounds)
    }

    /// From a mean and a median.
    pub(crate) fn of_mean_median(mean: f64, median: f64, bounds: (f64, f64)) -> Self {
        let sigma = (2.0 * (mean / median).ln()).max(0.0).sqrt();
        Self::new(median, median * (Z90 * sigma).exp(), bounds)
    }

    pub(crate) fn draw(&self, rng: &mut Rng) -> f64 {
        let sigma = self.p90_ratio.ln() / Z90;
        (self.median * (sigma * normal(rng)).exp()).clamp(self.low, self.high)
    }

    pub(crate) fn duration(&self, rng: &mut Rng) -> Duration {
        seconds(self.draw(rng))
    }

    pub(crate) fn whole(&self, rng: &mut Rng) -> u32 {
        whole(self.draw(rng))
    }
}

/// Uniform in [0, 1).
pub(crate) fn uniform(rng: &mut Rng) -> f64 {
    (rng.next() >> 11) as f64 / (1_u64 << 53) as f64
}

/// Standard normal (Box and Muller).
pub(crate) fn normal(rng: &mut Rng) -> f64 {
    let (u, v) = (1.0 - uniform(rng), uniform(rng));
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// Exponential of mean one.
pub(crate) fn exponential(rng: &mut Rng) -> f64 {
    -(1.0 - uniform(rng)).ln()
}

/// The nearest whole number.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to what fits")]
pub(crate) fn whole(value: f64) -> u32 {
    value.round().clamp(0.0, f64::from(u32::MAX)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_asked_for() {
        let dist = LogNormal::new(8.6, 71.0, (0.0, 1e9));
        let mut rng = Rng::new(7);
        let mut drawn: Vec<f64> = (0..20_001).map(|_| dist.draw(&mut rng)).collect();
        drawn.sort_by(f64::total_cmp);
        assert!((drawn[10_000] / 8.6 - 1.0).abs() < 0.06, "{}", drawn[10_000]);
        assert!((drawn[18_000] / 71.0 - 1.0).abs() < 0.08, "{}", drawn[18_000]);
        let of_mean = LogNormal::of_mean(13.0, 20.0, (0.0, 1e9));
        let mean = (0..50_000).map(|_| of_mean.draw(&mut rng)).sum::<f64>() / 50_000.0;
        assert!((mean / 13.0 - 1.0).abs() < 0.05, "{mean}");
    }
}
