//! How long steps take: what was declared, corrected by what declarations of the kind were worth, or else what steps of the
//! kind took.
//!
//! *Bounds*: [`MAX_LEARNT`] kinds of all tenants; the one that nothing was learnt of for longest makes room.

use std::collections::BTreeMap;
use std::time::Duration;

use kvtier_types::{Instant, TenantId};

use super::plan::{LONGEST_STEP, Step};

/// Kinds of steps that are told apart.
const MAX_LEARNT: usize = 4096;
/// Share of the newest observation.
const NEWEST: f64 = 0.2;
/// Observations that weigh as much as the word of whoever declared.
const TRUST: f64 = 4.0;
/// A declaration is off by no more than this factor.
const MOST_OFF: f64 = 64.0;
/// A step of which nothing is known takes so long, and so much longer for each token.
const GUESS: Duration = Duration::from_secs(1);
const GUESS_A_TOKEN: Duration = Duration::from_micros(100);

/// What steps of a kind took.
#[derive(Debug, Clone, Copy, Default)]
struct Kind {
    /// Mean of what was observed, in seconds, the newest counting most.
    seconds: f64,
    observed: u32,
    /// Mean of the logarithm of what happened over what was declared.
    log_ratio: f64,
    compared: u32,
    at: Instant,
}

/// What is known of kinds of steps.
#[derive(Debug, Default)]
pub(super) struct Learnt {
    kinds: BTreeMap<(TenantId, String), Kind>,
}

impl Learnt {
    /// A step took so long.
    pub(super) fn observe(&mut self, now: Instant, (tenant, step): (&TenantId, &Step), took: Duration) {
        let key = (tenant.clone(), step.kind.clone());
        if self.kinds.len() >= MAX_LEARNT && !self.kinds.contains_key(&key) {
            let oldest = self.kinds.iter().min_by_key(|(_, kind)| kind.at).map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                self.kinds.remove(&oldest);
            }
        }
        let took = took.min(LONGEST_STEP).as_secs_f64();
        let kind = self.kinds.entry(key).or_default();
        kind.at = now;
        average(&mut kind.seconds, &mut kind.observed, took);
        if let Some(expected) = step.expected {
            let ratio = (took / expected.as_secs_f64().max(1e-3)).clamp(MOST_OFF.recip(), MOST_OFF);
            average(&mut kind.log_ratio, &mut kind.compared, ratio.ln());
        }
    }

    /// How long a step is expected to take.
    pub(super) fn expect(&self, tenant: &TenantId, step: &Step) -> Duration {
        let kind = self.kinds.get(&(tenant.clone(), step.kind.clone())).copied().unwrap_or_default();
        let seconds = match step.expected {
            Some(expected) => {
                let compared = f64::from(kind.compared);
                let belief = kind.log_ratio * compared / (compared + TRUST);
                expected.min(LONGEST_STEP).as_secs_f64() * belief.exp()
            }
            None if kind.observed > 0 => kind.seconds,
            None => (GUESS + GUESS_A_TOKEN * step.tokens).as_secs_f64(),
        };
        Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST_STEP).min(LONGEST_STEP)
    }
}

/// Takes in one more: the plain mean of the first few, then the newest weighs [`NEWEST`].
fn average(mean: &mut f64, count: &mut u32, value: f64) {
    *count = count.saturating_add(1);
    *mean += (value - *mean) * f64::from(*count).recip().max(NEWEST);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(kind: &str, expected_secs: u64) -> Step {
        let expected = Some(Duration::from_secs(expected_secs)).filter(|e| !e.is_zero());
        Step { kind: kind.into(), expected, ..Step::default() }
    }

    #[test]
    fn declarations_are_corrected_and_kinds_learnt() {
        let tenant = TenantId::shared();
        let mut learnt = Learnt::default();
        assert_eq!(learnt.expect(&tenant, &step("plan", 0)), GUESS);
        assert_eq!(learnt.expect(&tenant, &step("plan", 5)), Duration::from_secs(5));
        for _ in 0..40 {
            learnt.observe(Instant::ZERO, (&tenant, &step("plan", 5)), Duration::from_secs(20));
        }
        let secs = |s: &Step| learnt.expect(&tenant, s).as_secs_f64();
        assert!((19.9..20.1).contains(&secs(&step("plan", 0))), "as the kind took: {}", secs(&step("plan", 0)));
        assert!(
            (34.0..40.0).contains(&secs(&step("plan", 10))),
            "four times what is said: {}",
            secs(&step("plan", 10))
        );
        let other = TenantId::new("other").unwrap();
        assert_eq!(learnt.expect(&other, &step("plan", 0)), GUESS, "nobody learns from another tenant");
    }

    #[test]
    fn kinds_are_bounded() {
        let mut learnt = Learnt::default();
        for n in 0..MAX_LEARNT as u64 + 10 {
            let step = step(&n.to_string(), 0);
            learnt.observe(Instant::from_nanos(n), (&TenantId::shared(), &step), Duration::from_secs(9));
        }
        assert_eq!(learnt.kinds.len(), MAX_LEARNT);
        assert_eq!(learnt.expect(&TenantId::shared(), &step("0", 0)), GUESS, "the oldest made room");
    }
}
