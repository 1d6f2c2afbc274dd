//! Brings a program's state back before the program is: prefetch at the low quantile of its return less the transfer.
//!
//! *Invariants*: at most `budget_bytes` are under way or waiting to be used at once; every byte that was brought ends as
//! useful, late or wasted, once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kvtier_types::Instant;

use super::Return;

/// How much may be speculated.
#[derive(Debug, Clone, Copy)]
pub struct ProactiveConfig {
    /// Bytes brought and not yet used, at most.
    pub budget_bytes: u64,
    /// What was brought and is not used so long after the late quantile of the return is given up.
    pub patience: Duration,
}

/// What became of bytes that were brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// They were there when the program came.
    Useful,
    /// They were under way.
    Late,
    /// The program did not come in time, or went elsewhere, or ended.
    Wasted,
}

/// Bytes by what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spent {
    /// There in time.
    pub useful_bytes: u64,
    /// Under way when they were needed.
    pub late_bytes: u64,
    /// For nothing.
    pub wasted_bytes: u64,
    /// Not begun for want of budget.
    pub refused_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Wait {
    began: Instant,
    /// When to begin, or to give up what was brought.
    at: Instant,
    give_up: Instant,
    brought: u64,
    arrived: bool,
}

/// Programs that wait for tools, joins or people.
#[derive(Debug)]
pub struct Proactive {
    config: ProactiveConfig,
    waits: BTreeMap<u64, Wait>,
    due: BTreeSet<(Instant, u64)>,
    outstanding: u64,
    spent: Spent,
}

impl Proactive {
    /// Nobody waits.
    #[must_use]
    pub const fn new(config: ProactiveConfig) -> Self {
        let spent = Spent { useful_bytes: 0, late_bytes: 0, wasted_bytes: 0, refused_bytes: 0 };
        Self { config, waits: BTreeMap::new(), due: BTreeSet::new(), outstanding: 0, spent }
    }

    /// Program `name` waits from now on; bringing its state takes `transfer`.
    pub fn wait(&mut self, now: Instant, name: u64, (expected, transfer): (Return, Duration)) {
        self.end(name, Fate::Wasted);
        let at = now + expected.early.saturating_sub(transfer);
        let give_up = now + expected.late + transfer + self.config.patience;
        self.waits.insert(name, Wait { began: now, at, give_up, brought: 0, arrived: false });
        self.due.insert((at, name));
    }

    /// When something is to be done next.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// A program whose state is to be brought now; what is not used in time is given up on the way.
    pub fn due(&mut self, now: Instant) -> Option<u64> {
        loop {
            let (at, name) = self.due.first().copied().filter(|(at, _)| *at <= now)?;
            self.due.remove(&(at, name));
            let Some(wait) = self.waits.get_mut(&name) else { continue };
            if wait.brought > 0 {
                self.end(name, Fate::Wasted);
            } else {
                return Some(name);
            }
        }
    }

    /// The state of `name` is to be brought, so many bytes: whether it may.
    pub fn begin(&mut self, name: u64, bytes: u64) -> bool {
        let Some(wait) = self.waits.get_mut(&name) else { return false };
        if bytes == 0 || self.outstanding + bytes > self.config.budget_bytes {
            self.spent.refused_bytes += bytes;
            return false;
        }
        self.outstanding += bytes;
        wait.brought = bytes;
        wait.at = wait.give_up;
        self.due.insert((wait.at, name));
        true
    }

    /// What was brought for `name` is there.
    pub fn arrived(&mut self, name: u64) {
        if let Some(wait) = self.waits.get_mut(&name) {
            wait.arrived = true;
        }
    }

    /// The program is back, where its state was brought if `here`. Returns since when it had waited, and what became of
    /// what was brought.
    pub fn back(&mut self, name: u64, here: bool) -> Option<(Instant, Option<Fate>)> {
        let wait = *self.waits.get(&name)?;
        let fate = match (here, wait.arrived) {
            (true, true) => Fate::Useful,
            (true, false) => Fate::Late,
            (false, _) => Fate::Wasted,
        };
        self.end(name, fate);
        Some((wait.began, (wait.brought > 0).then_some(fate)))
    }

    /// The program ended.
    pub fn ended(&mut self, name: u64) {
        self.end(name, Fate::Wasted);
    }

    fn end(&mut self, name: u64, fate: Fate) {
        let Some(wait) = self.waits.remove(&name) else { return };
        self.due.remove(&(wait.at, name));
        self.outstanding -= wait.brought;
        let spent = match fate {
            Fate::Useful => &mut self.spent.useful_bytes,
            Fate::Late => &mut self.spent.late_bytes,
            Fate::Wasted => &mut self.spent.wasted_bytes,
        };
        *spent += wait.brought;
    }

    /// What became of all that was brought.
    #[must_use]
    pub const fn spent(&self) -> Spent {
        self.spent
    }

    /// Whether something was brought for a program that waits.
    #[must_use]
    pub fn holds(&self, name: u64) -> bool {
        self.waits.get(&name).is_some_and(|wait| wait.brought > 0)
    }

    /// Bytes brought that nobody has used yet.
    #[must_use]
    pub const fn outstanding_bytes(&self) -> u64 {
        self.outstanding
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Just, Strategy, any, prop, prop_oneof, proptest};

    use super::*;

    const fn at(secs: u64) -> Instant {
        Instant::from_nanos(secs * 1_000_000_000)
    }

    const fn expected(early: u64, late: u64) -> Return {
        let usual = Duration::from_secs(u64::midpoint(early, late));
        Return { early: Duration::from_secs(early), usual, late: Duration::from_secs(late) }
    }

    fn proactive() -> Proactive {
        Proactive::new(ProactiveConfig { budget_bytes: 100, patience: Duration::from_secs(1) })
    }

    #[test]
    fn begins_at_the_low_quantile_less_the_transfer() {
        let mut p = proactive();
        p.wait(at(10), 1, (expected(5, 20), Duration::from_secs(2)));
        assert_eq!((p.next(), p.due(at(12))), (Some(at(13)), None));
        assert_eq!(p.due(at(13)), Some(1));
        assert!(p.begin(1, 60));
        p.arrived(1);
        assert_eq!(p.back(1, true), Some((at(10), Some(Fate::Useful))));
        assert_eq!((p.spent().useful_bytes, p.outstanding_bytes()), (60, 0));
    }

    #[test]
    fn nothing_beyond_the_budget_and_nothing_kept_for_ever() {
        let mut p = proactive();
        p.wait(at(0), 1, (expected(1, 2), Duration::ZERO));
        p.wait(at(0), 2, (expected(1, 2), Duration::ZERO));
        assert_eq!((p.due(at(1)), p.begin(1, 80)), (Some(1), true));
        assert_eq!((p.due(at(1)), p.begin(2, 80)), (Some(2), false));
        assert_eq!(p.due(at(3)), None, "given up one second after the late quantile");
        assert_eq!((p.spent().wasted_bytes, p.spent().refused_bytes, p.outstanding_bytes()), (80, 80, 0));
        assert_eq!(p.back(1, true), None);
    }

    #[derive(Debug, Clone, Copy)]
    enum Op {
        Wait(u64),
        Due,
        Begin(u64),
        Arrived(u64),
        Back(u64, bool),
        Ended(u64),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let op = (0_u64..5, any::<bool>()).prop_flat_map(|(name, here)| {
            prop_oneof![
                Just(Op::Wait(name)),
                Just(Op::Due),
                Just(Op::Begin(name)),
                Just(Op::Arrived(name)),
                Just(Op::Back(name, here)),
                Just(Op::Ended(name))
            ]
        });
        prop::collection::vec(op, 0..200)
    }

    proptest! {
        /// What was begun is outstanding or ended as one thing, and never more than the budget is outstanding.
        #[test]
        fn every_byte_is_accounted_for(ops in ops()) {
            let mut p = proactive();
            let (mut begun, mut now) = (0, 0);
            let mut waits = std::collections::BTreeMap::new();
            for op in ops {
                now += 1;
                match op {
                    Op::Wait(name) => {
                        p.wait(at(now), name, (expected(1, 4), Duration::ZERO));
                        waits.insert(name, false);
                    }
                    Op::Due => {
                        p.due(at(now));
                    }
                    Op::Begin(name) => {
                        if waits.get(&name) == Some(&false) && p.begin(name, 30) {
                            begun += 30;
                            waits.insert(name, true);
                        }
                    }
                    Op::Arrived(name) => p.arrived(name),
                    Op::Back(name, here) => {
                        p.back(name, here);
                        waits.remove(&name);
                    }
                    Op::Ended(name) => {
                        p.ended(name);
                        waits.remove(&name);
                    }
                }
                let spent = p.spent();
                assert_eq!(begun, spent.useful_bytes + spent.late_bytes + spent.wasted_bytes + p.outstanding_bytes());
                assert!(p.outstanding_bytes() <= 100);
            }
        }
    }
}
