//! When a program will be back: what tools of its kind take, and how far announcements are off.
//!
//! An announcement is never believed: learnt is the ratio of what happened to what was announced, by kind, and from that
//! and the announcement the quantiles of the return. Without one, the quantiles of the kind are.
//!
//! What is known of a kind too little is taken from all of its tenant, and then from all.
//!
//! *Bounds*: [`MAX_KINDS`] kinds, [`MAX_TENANT_KINDS`] of one tenant: those that were seen for longest not make room, of the
//! tenant that is at its bound or else has most.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Sketch;

/// Kinds of pauses told apart: each takes 2.4 KiB.
const MAX_KINDS: usize = 256;
/// Kinds of one tenant: names of kinds come from clients, and no tenant takes all the room.
const MAX_TENANT_KINDS: usize = 64;
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

/// What is alike: of one tenant, what its programs are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Kind {
    /// Number of the tenant.
    pub tenant: u64,
    /// Number of the kind in the tenant; zero for all of them together.
    pub what: u64,
}

#[derive(Debug, Default)]
struct Known {
    pauses: Sketch,
    ratios: Sketch,
    /// Number of the latest observation.
    seen: u64,
}

/// What is known of pauses.
#[derive(Debug, Default)]
pub struct Durations {
    kinds: BTreeMap<Kind, Known>,
    all: Known,
}

impl Durations {
    /// A pause of a kind ended: announced so, it took so long.
    pub fn observe(&mut self, kind: Kind, announced: Option<Duration>, took: Duration) {
        let ratio = announced.map(|a| Duration::from_secs_f64(ratio(took, a) * ONE));
        let whole = Kind { what: 0, ..kind };
        for kind in [Some(kind).filter(|kind| *kind != whole), Some(whole)].into_iter().flatten() {
            if !self.kinds.contains_key(&kind) {
                self.make_room(kind.tenant);
            }
            let known = self.kinds.entry(kind).or_default();
            known.add(took, ratio);
            known.seen = self.all.seen;
        }
        self.all.add(took, ratio);
        self.all.seen += 1;
    }

    /// Forgets a kind where there is no room for one more of a tenant.
    fn make_room(&mut self, tenant: u64) {
        let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
        self.kinds.keys().for_each(|kind| *counts.entry(kind.tenant).or_default() += 1);
        let from = if counts.get(&tenant).is_some_and(|count| *count >= MAX_TENANT_KINDS) {
            Some(tenant)
        } else if self.kinds.len() >= MAX_KINDS {
            counts.into_iter().max_by_key(|(_, count)| *count).map(|(tenant, _)| tenant)
        } else {
            None
        };
        let Some(from) = from else { return };
        let of_tenant = self.kinds.range(Kind { tenant: from, what: 0 }..=Kind { tenant: from, what: u64::MAX });
        if let Some(oldest) = of_tenant.min_by_key(|(_, known)| known.seen).map(|(kind, _)| *kind) {
            self.kinds.remove(&oldest);
        }
    }

    /// The closest to a kind of which enough is known.
    fn closest(&self, kind: Kind, weight: impl Fn(&Known) -> f32) -> &Known {
        let known = [kind, Kind { what: 0, ..kind }].into_iter().filter_map(|kind| self.kinds.get(&kind));
        known.into_iter().find(|known| weight(known) >= ENOUGH).unwrap_or(&self.all)
    }

    /// When a program is back whose pause is of a kind, was announced to take so long, and has lasted `waited` already.
    /// `None` where nothing is known of it.
    #[must_use]
    pub fn expect(&self, kind: Kind, announced: Option<Duration>, waited: Duration) -> Option<Return> {
        let pauses = &self.closest(kind, |known| known.pauses.weight()).pauses;
        let by_pause = |q| pauses.quantile_beyond(q, waited);
        let Some(announced) = announced.map(|a| a.min(LONGEST)) else { return all_of(by_pause) };
        let sketch = &self.closest(kind, |known| known.ratios.weight()).ratios;
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

impl Known {
    fn add(&mut self, took: Duration, ratio: Option<Duration>) {
        self.pauses.add(took);
        if let Some(ratio) = ratio {
            self.ratios.add(ratio);
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

    const fn kind(what: u64) -> Kind {
        Kind { tenant: 1, what }
    }

    #[test]
    fn no_announcement_is_too_long_to_reckon_with() {
        let mut durations = Durations::default();
        (0..20).for_each(|_| durations.observe(kind(1), Some(Duration::from_millis(1)), secs(1_000_000)));
        let expected = durations.expect(kind(1), Some(Duration::from_millis(u64::MAX)), Duration::ZERO).unwrap();
        assert!(expected.late <= LONGEST);
    }

    #[test]
    fn announcements_are_corrected_by_what_they_were_worth() {
        let mut durations = Durations::default();
        // Tools of this kind always take ten times what they say.
        (1..100).for_each(|s| durations.observe(kind(7), Some(secs(s)), secs(10 * s)));
        let expected = durations.expect(kind(7), Some(secs(20)), Duration::ZERO).unwrap();
        assert!(near(expected.early, secs(200)) && near(expected.late, secs(200)), "{expected:?}");
    }

    #[test]
    fn announcements_worth_nothing_are_left_aside() {
        let mut durations = Durations::default();
        (0..100).for_each(|n| durations.observe(kind(1), Some(secs(if n % 2 == 0 { 1 } else { 100 })), secs(10)));
        let expected = durations.expect(kind(1), Some(secs(100)), Duration::ZERO).unwrap();
        assert!(near(expected.usual, secs(10)), "{expected:?}");
    }

    #[test]
    fn who_is_late_is_expected_later() {
        let mut durations = Durations::default();
        (0..90).for_each(|_| durations.observe(kind(1), None, secs(1)));
        (0..10).for_each(|_| durations.observe(kind(1), None, secs(60)));
        assert!(near(durations.expect(kind(1), None, secs(0)).unwrap().usual, secs(1)));
        assert!(near(durations.expect(kind(1), None, secs(5)).unwrap().early, secs(60)));
        assert_eq!(durations.expect(kind(1), None, secs(500)), None);
    }

    #[test]
    fn kinds_are_bounded_and_no_tenant_takes_all_the_room() {
        let mut durations = Durations::default();
        let other = Kind { tenant: 2, what: 5 };
        (0..20).for_each(|_| durations.observe(other, None, secs(9)));
        (0..1000).for_each(|what| durations.observe(kind(what), None, secs(1)));
        assert_eq!(durations.kinds.len(), MAX_TENANT_KINDS + 2, "of the other tenant one kind, and all of it");
        assert!(near(durations.expect(other, None, Duration::ZERO).unwrap().usual, secs(9)));
        (0..1000).for_each(|tenant| durations.observe(Kind { tenant: 10 + tenant, what: 0 }, None, secs(1)));
        assert_eq!(durations.kinds.len(), MAX_KINDS);
        assert!(durations.expect(Kind { tenant: 5, what: 5 }, None, Duration::ZERO).is_some(), "by all together");
    }

    #[test]
    fn a_kind_is_told_apart_once_enough_is_known_of_it() {
        let mut durations = Durations::default();
        (0..20).for_each(|_| durations.observe(kind(1), None, secs(1)));
        (0..4).for_each(|_| durations.observe(kind(2), None, secs(60)));
        assert!(near(durations.expect(kind(2), None, Duration::ZERO).unwrap().usual, secs(1)), "as the tenant's do");
        (0..8).for_each(|_| durations.observe(kind(2), None, secs(60)));
        assert!(near(durations.expect(kind(2), None, Duration::ZERO).unwrap().usual, secs(60)));
        assert!(near(durations.expect(kind(1), None, Duration::ZERO).unwrap().usual, secs(1)));
    }
}
