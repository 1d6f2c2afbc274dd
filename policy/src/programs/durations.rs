//! When a program will be back: what tools of its kind take, and how far announcements are off.
//!
//! An announcement is never believed: learnt is the ratio of what happened to what was announced, by kind, and from that
//! and the announcement the quantiles of the return. Without one, the quantiles of the kind are.
//!
//! *Bounds*: `MAX_KINDS` kinds; the rest share one.

use std::time::Duration;

use rustc_hash::FxHashMap;

use super::Sketch;

/// Kinds of pauses told apart.
const MAX_KINDS: usize = 256;
/// Observations of a kind before it is preferred to all kinds together.
const ENOUGH: f32 = 8.0;
/// A ratio of one, as a duration: ratios are kept in the same sketch as durations.
const ONE: f64 = 1000.0;
/// Longest pause that is reckoned with: beyond, a program is back when it is back.
const LONGEST: Duration = Duration::from_secs(7 * 86_400);
/// An announcement that nobody has checked yet may be off by so much.
const UNCHECKED: f64 = 3.0;

/// When a program is expected back, counted from the beginning of its pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Return {
    /// One in ten is back before.
    pub early: Duration,
    /// Half are.
    pub usual: Duration,
    /// Nine in ten are.
    pub late: Duration,
}

#[derive(Debug, Default)]
struct Kind {
    pauses: Sketch,
    ratios: Sketch,
}

/// What is known of pauses.
#[derive(Debug, Default)]
pub struct Durations {
    kinds: FxHashMap<u64, Kind>,
    all: Kind,
}

impl Durations {
    /// A pause of a kind ended: announced so, it took so long.
    pub fn observe(&mut self, kind: u64, announced: Option<Duration>, took: Duration) {
        let ratio = announced.map(|a| ratio(took, a));
        let room = self.kinds.len() < MAX_KINDS;
        let own = if room { Some(self.kinds.entry(kind).or_default()) } else { self.kinds.get_mut(&kind) };
        for known in own.into_iter().chain([&mut self.all]) {
            known.pauses.add(took);
            if let Some(ratio) = ratio {
                known.ratios.add(Duration::from_secs_f64(ratio * ONE));
            }
        }
    }

    /// When a program is back whose pause is of a kind, was announced to take so long, and has lasted `waited` already.
    /// `None` where nothing is known of it.
    #[must_use]
    pub fn expect(&self, kind: u64, announced: Option<Duration>, waited: Duration) -> Option<Return> {
        let own = self.kinds.get(&kind);
        let by_pause = |q| {
            let sketch = own.map(|k| &k.pauses).filter(|s| s.weight() >= ENOUGH).unwrap_or(&self.all.pauses);
            sketch.quantile_beyond(q, waited)
        };
        let Some(announced) = announced.map(|a| a.min(LONGEST)) else { return all_of(by_pause) };
        let sketch = own.map(|k| &k.ratios).filter(|s| s.weight() >= ENOUGH).unwrap_or(&self.all.ratios);
        if sketch.weight() < ENOUGH {
            let guess = |factor: f64| scaled(announced, factor).max(waited);
            return Some(Return {
                early: guess(UNCHECKED.recip()),
                usual: announced.max(waited),
                late: guess(UNCHECKED),
            });
        }
        let past = Duration::from_secs_f64(ratio(waited, announced) * ONE);
        let by_ratio = |q| sketch.quantile_beyond(q, past).map(|r| scaled(announced, r.as_secs_f64() / ONE));
        let told = all_of(by_ratio);
        // Announcements that say less than the kind does are left aside.
        match (told, all_of(by_pause)) {
            (Some(told), Some(known)) if spread(known) < spread(told) => Some(known),
            (told, known) => told.or(known),
        }
    }
}

fn all_of(quantile: impl Fn(f64) -> Option<Duration>) -> Option<Return> {
    Some(Return { early: quantile(0.1)?, usual: quantile(0.5)?, late: quantile(0.9)? })
}

/// At most [`LONGEST`].
fn scaled(span: Duration, factor: f64) -> Duration {
    Duration::try_from_secs_f64(span.as_secs_f64() * factor).map_or(LONGEST, |scaled| scaled.min(LONGEST))
}

fn spread(expected: Return) -> f64 {
    expected.late.as_secs_f64() / expected.early.as_secs_f64().max(1e-3)
}

fn ratio(took: Duration, announced: Duration) -> f64 {
    (took.as_secs_f64() / announced.as_secs_f64().max(1e-3)).clamp(0.0, 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    fn near(a: Duration, b: Duration) -> bool {
        (a.as_secs_f64() / b.as_secs_f64()).log2().abs() < 0.1
    }

    #[test]
    fn no_announcement_is_too_long_to_reckon_with() {
        let mut durations = Durations::default();
        (0..20).for_each(|_| durations.observe(1, Some(Duration::from_millis(1)), secs(1_000_000)));
        let expected = durations.expect(1, Some(Duration::from_millis(u64::MAX)), Duration::ZERO).unwrap();
        assert!(expected.late <= LONGEST);
    }

    #[test]
    fn announcements_are_corrected_by_what_they_were_worth() {
        let mut durations = Durations::default();
        // Tools of this kind always take ten times what they say.
        (1..100).for_each(|s| durations.observe(7, Some(secs(s)), secs(10 * s)));
        let expected = durations.expect(7, Some(secs(20)), Duration::ZERO).unwrap();
        assert!(near(expected.early, secs(200)) && near(expected.late, secs(200)), "{expected:?}");
    }

    #[test]
    fn announcements_worth_nothing_are_left_aside() {
        let mut durations = Durations::default();
        (0..100).for_each(|n| durations.observe(1, Some(secs(if n % 2 == 0 { 1 } else { 100 })), secs(10)));
        let expected = durations.expect(1, Some(secs(100)), Duration::ZERO).unwrap();
        assert!(near(expected.usual, secs(10)), "{expected:?}");
    }

    #[test]
    fn who_is_late_is_expected_later() {
        let mut durations = Durations::default();
        (0..90).for_each(|_| durations.observe(1, None, secs(1)));
        (0..10).for_each(|_| durations.observe(1, None, secs(60)));
        assert!(near(durations.expect(1, None, secs(0)).unwrap().usual, secs(1)));
        assert!(near(durations.expect(1, None, secs(5)).unwrap().early, secs(60)));
        assert_eq!(durations.expect(1, None, secs(500)), None);
    }

    #[test]
    fn kinds_are_bounded() {
        let mut durations = Durations::default();
        (0..1000).for_each(|kind| durations.observe(kind, None, secs(kind + 1)));
        assert_eq!(durations.kinds.len(), MAX_KINDS);
        assert!(durations.expect(999, None, Duration::ZERO).is_some(), "by all kinds together");
    }
}
