//! The survival curve of a class, and its Gittins index.
//!
//! Ages are counted in quarter octaves from 0.25 s. For each: how many segments reached it, and how many were used again at
//! it. `G(a) = max over h of (chance of a use between a and h) / (expected seconds waited until then)`: the slope of the
//! upper concave hull of (seconds waited, chance) beyond a, found for all ages in one pass from the right.

use std::time::Duration;

/// Ages told apart: up to two days; older is one.
pub(super) const AGES: usize = 80;
/// The first bound, in seconds.
const FIRST: f64 = 0.25;
/// Quarter octaves: powers of the fourth root of two.
const QUARTERS: [f64; 4] = [1.0, 1.189_207_115_002_721, std::f64::consts::SQRT_2, 1.681_792_830_507_429];
/// Weight of the pooled curve: as if so many segments had followed it.
const SHRINK: f64 = 4.0;
/// Segments after which the past counts half.
const MEMORY: f32 = 4096.0;

/// The age at which a bucket begins, in seconds.
pub(super) fn begins(bucket: usize) -> f64 {
    let Some(steps) = bucket.checked_sub(1) else { return 0.0 };
    FIRST * QUARTERS[steps % 4] * (1_u64 << (steps / 4)) as f64
}

/// The bounds of all buckets as durations: bucket `b` ends at `[b]`.
pub(super) fn ends() -> [Duration; AGES] {
    std::array::from_fn(|bucket| Duration::from_secs_f64(begins(bucket + 1)))
}

/// What became of the segments of a class, by age.
#[derive(Debug, Clone)]
pub(super) struct Curve {
    used: [f32; AGES],
    reached: [f32; AGES],
    index: [f32; AGES],
    /// Something was counted since the last fit.
    pub(super) stale: bool,
}

impl Curve {
    pub(super) const fn new() -> Self {
        Self { used: [0.0; AGES], reached: [0.0; AGES], index: [0.0; AGES], stale: false }
    }

    pub(super) fn count_reached(&mut self, age: u8, weight: f32) {
        self.reached[usize::from(age)] += weight;
        self.stale = true;
    }

    pub(super) fn count_used(&mut self, age: u8, weight: f32) {
        self.used[usize::from(age)] += weight;
        self.stale = true;
    }

    /// Uses per second to be had from a segment of this age.
    pub(super) const fn index(&self, age: u8) -> f32 {
        self.index[age as usize]
    }

    /// Chance of a use at each age, given that it was reached.
    pub(super) fn hazards(&self, prior: &[f64; AGES]) -> [f64; AGES] {
        std::array::from_fn(|age| {
            let hazard = (f64::from(self.used[age]) + SHRINK * prior[age]) / (f64::from(self.reached[age]) + SHRINK);
            hazard.clamp(1e-9, 1.0 - 1e-9)
        })
    }

    /// Brings the index up to date; `prior` are the hazards of the pooled curve.
    pub(super) fn fit(&mut self, prior: &[f64; AGES]) {
        self.index = gittins(&self.hazards(prior));
        self.stale = false;
    }

    /// Lets the past fade once much was counted.
    pub(super) fn fade(&mut self) {
        if self.reached[0] > MEMORY {
            for count in self.used.iter_mut().chain(&mut self.reached) {
                *count *= 0.5;
            }
        }
    }
}

/// The Gittins index for each age.
fn gittins(hazards: &[f64; AGES]) -> [f32; AGES] {
    let mut points = [(0.0_f64, 0.0_f64); AGES + 1];
    let mut survival = 1.0_f64;
    for age in 0..AGES {
        let width = begins(age + 1) - begins(age);
        let (waited, chance) = points[age];
        let hazard = hazards[age];
        points[age + 1] = (survival.mul_add(width * (1.0 - hazard / 2.0), waited), survival.mul_add(hazard, chance));
        survival *= 1.0 - hazard;
    }
    let slope = |from: (f64, f64), to: (f64, f64)| (to.1 - from.1) / (to.0 - from.0).max(f64::MIN_POSITIVE);
    let mut hull = vec![points[AGES]];
    let mut index = [0.0_f32; AGES];
    for age in (0..AGES).rev() {
        while let [.., second, first] = hull[..] {
            if slope(points[age], second) < slope(points[age], first) {
                break;
            }
            hull.pop();
        }
        let best = slope(points[age], hull[hull.len() - 1]);
        #[expect(clippy::cast_possible_truncation, reason = "a rank needs no more digits")]
        {
            index[age] = best as f32;
        }
        hull.push(points[age]);
    }
    index
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_quarter_octaves_from_a_quarter_second() {
        let round = |bucket| (begins(bucket) * 1000.0).round();
        assert_eq!([round(0), round(1), round(5), round(9), round(3)], [0.0, 250.0, 500.0, 1000.0, 354.0]);
    }

    /// The definition, without the hull.
    fn naive(hazards: &[f64; AGES]) -> Vec<f64> {
        let from = |a: usize| {
            let (mut survival, mut chance, mut waited, mut best) = (1.0, 0.0, 0.0, 0.0_f64);
            for (age, hazard) in hazards.iter().enumerate().skip(a) {
                chance += survival * hazard;
                waited += survival * (1.0 - hazard / 2.0) * (begins(age + 1) - begins(age));
                survival *= 1.0 - hazard;
                best = best.max(chance / waited);
            }
            best
        };
        (0..AGES).map(from).collect()
    }

    #[test]
    fn the_hull_gives_the_index_of_the_definition() {
        let shapes: [fn(usize) -> f64; 4] =
            [|_| 0.05, |a| if a == 40 { 0.9 } else { 0.001 }, |a| 0.2 / (a + 1) as f64, |a| (a % 7) as f64 / 20.0];
        for shape in shapes {
            let hazards = std::array::from_fn(|a| shape(a).clamp(1e-9, 1.0 - 1e-9));
            for (fast, slow) in gittins(&hazards).iter().zip(naive(&hazards)) {
                assert!((f64::from(*fast) - slow).abs() <= 1e-4 * slow, "{fast} {slow}");
            }
        }
    }

    #[test]
    fn what_comes_back_at_a_known_age_is_worth_more_the_nearer_it_is() {
        let mut curve = Curve::new();
        for _ in 0..100 {
            (0..=30).for_each(|age| curve.count_reached(age, 1.0));
            curve.count_used(30, 1.0);
        }
        curve.fit(&[0.01; AGES]);
        assert!(curve.index(10) < curve.index(20) && curve.index(20) < curve.index(29));
        assert!(curve.index(31) < curve.index(10), "the time has passed");
    }
}
