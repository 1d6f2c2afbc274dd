//! How long steps take: what was declared, corrected by what declarations of the kind were worth, or else what steps of the
//! kind took.
//!
//! *Bounds*: [`MAX_LEARNT`] kinds of all tenants; of the tenant that has most of them the one that nothing was learnt of for
//! longest makes room.

use std::collections::BTreeMap;
use std::time::Duration;

use kvtier_types::TenantId;

use super::plan::{LONGEST_STEP, Step};
use crate::holders::Shares;

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
    /// Number of the latest observation.
    seen: u64,
}

/// What is known of kinds of steps.
#[derive(Debug, Default)]
pub(super) struct Learnt {
    kinds: BTreeMap<(TenantId, String), Kind>,
    /// The same, by when something was learnt of them last.
    shares: Shares<(TenantId, String)>,
    observations: u64,
}

impl Learnt {
    /// A step took so long.
    pub(super) fn observe(&mut self, (tenant, step): (&TenantId, &Step), took: Duration) {
        let key = (tenant.clone(), step.kind.clone());
        match self.kinds.get(&key) {
            Some(kind) => self.shares.remove(tenant, kind.seen, key.clone()),
            None if self.kinds.len() >= MAX_LEARNT => self.make_room(),
            None => {}
        }
        self.observations += 1;
        self.shares.insert(tenant, self.observations, key.clone());
        let took = took.min(LONGEST_STEP).as_secs_f64();
        let kind = self.kinds.entry(key).or_default();
        kind.seen = self.observations;
        average(&mut kind.seconds, &mut kind.observed, took);
        if let Some(expected) = step.expected {
            let ratio = (took / expected.as_secs_f64().max(1e-3)).clamp(MOST_OFF.recip(), MOST_OFF);
            average(&mut kind.log_ratio, &mut kind.compared, ratio.ln());
        }
    }

    fn make_room(&mut self) {
        let Some(oldest) = self.shares.first_to_go().cloned() else { return };
        if let Some(kind) = self.kinds.remove(&oldest) {
            self.shares.remove(&oldest.0.clone(), kind.seen, oldest);
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
            learnt.observe((&tenant, &step("plan", 5)), Duration::from_secs(20));
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
    fn kinds_are_bounded_and_no_tenant_takes_all_the_room() {
        let mut learnt = Learnt::default();
        let quiet = TenantId::new("quiet").unwrap();
        learnt.observe((&quiet, &step("rare", 0)), Duration::from_secs(9));
        for n in 0..MAX_LEARNT as u64 + 10 {
            let step = step(&n.to_string(), 0);
            learnt.observe((&TenantId::shared(), &step), Duration::from_secs(9));
        }
        assert_eq!(learnt.kinds.len(), MAX_LEARNT);
        assert_eq!(learnt.expect(&TenantId::shared(), &step("0", 0)), GUESS, "the oldest made room");
        assert_eq!(learnt.expect(&quiet, &step("rare", 0)), Duration::from_secs(9));
    }
}
