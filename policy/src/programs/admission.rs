//! How many programs to have under way at once: no more than whose state comes back faster than it is needed.
//!
//! Beyond that every program waits for every other's loads: each takes longer, and none ends sooner. The advice moves a
//! limit up while nothing waits and down while transfers or memory are what programs wait for.

use std::time::Duration;

use kvtier_types::Instant;

/// Bounds of the advice.
#[derive(Debug, Clone, Copy)]
pub struct AdmissionConfig {
    /// Programs at once, at least.
    pub least: u32,
    /// How often the limit moves.
    pub every: Duration,
}

/// The advice of one node or cluster.
#[derive(Debug)]
pub struct Admission {
    config: AdmissionConfig,
    limit: f64,
    moved: Instant,
    /// Time programs spent since then: in all, and waiting for memory and transfers.
    spent: Duration,
    stalled: Duration,
}

/// Share of their time that programs may wait for memory and transfers.
const TOLERATED: f64 = 0.25;
/// By how much the limit moves.
const STEP: f64 = 0.1;

impl Admission {
    /// Begins with a limit.
    #[must_use]
    pub fn new(config: AdmissionConfig, limit: u32) -> Self {
        Self { config, limit: f64::from(limit), moved: Instant::ZERO, spent: Duration::ZERO, stalled: Duration::ZERO }
    }

    /// A step took so long on an engine, of which it waited so long for memory and transfers.
    pub fn observe(&mut self, now: Instant, took: Duration, stalled: Duration) {
        self.spent += took;
        self.stalled += stalled;
        if now.since(self.moved) < self.config.every {
            return;
        }
        self.moved = now;
        let share = self.stalled.as_secs_f64() / self.spent.as_secs_f64().max(1e-9);
        let factor = if share > TOLERATED { 1.0 - STEP } else { 1.0 + STEP };
        self.limit = (self.limit * factor).clamp(f64::from(self.config.least.max(1)), 1e6);
        (self.spent, self.stalled) = (Duration::ZERO, Duration::ZERO);
    }

    /// Whether another program should begin while so many are under way.
    #[must_use]
    pub fn admits(&self, under_way: u32) -> bool {
        f64::from(under_way) < self.limit
    }

    /// How many programs should be under way at most, while so many are: never more than twice those, so that what comes
    /// all at once is judged before it is all there.
    pub fn advise(&mut self, under_way: u32) -> u32 {
        let most = f64::from(under_way.max(self.config.least)) * 2.0;
        self.limit = self.limit.min(most);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between one and a million")]
        let limit = self.limit as u32;
        limit.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn falls_while_programs_stall_and_rises_while_they_do_not() {
        let config = AdmissionConfig { least: 2, every: Duration::from_secs(1) };
        let mut admission = Admission::new(config, 10);
        let mut now = Instant::ZERO;
        let mut run = |admission: &mut Admission, stalled: u64, times: u32| {
            for _ in 0..times {
                now = now + Duration::from_secs(1);
                admission.observe(now, Duration::from_secs(10), Duration::from_secs(stalled));
            }
        };
        run(&mut admission, 9, 3);
        assert!(!admission.admits(8) && admission.admits(7));
        run(&mut admission, 9, 100);
        assert!(admission.admits(1) && !admission.admits(2), "never below the least");
        run(&mut admission, 0, 30);
        assert!(admission.admits(20));
        assert_eq!((admission.advise(8), admission.admits(15), admission.admits(16)), (16, true, false));
    }
}
