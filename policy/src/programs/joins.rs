//! Programs that forked: which of their branches were heard of, and when the last one will be done.
//!
//! A fork's stem is needed until every branch has made its first call; the program's own context when the last branch
//! ends. A branch's end is expected from how long branches took, beyond what it took already.
//!
//! *Bounds*: [`MAX_BRANCHES`] branches in all, and as many forks; the oldest fork makes room.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kvtier_types::Instant;

use super::{Kind, Return};

/// Branches of all forks that are followed at once.
pub const MAX_BRANCHES: usize = 65_536;
/// Branches of a kind whose first calls were not further apart are expected to take as long.
const ALIKE: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy, Default)]
struct Branch {
    /// Its first call.
    began: Option<Instant>,
    kind: Kind,
}

#[derive(Debug)]
struct Fork {
    at: Instant,
    /// Branches that did not end.
    running: BTreeMap<u64, Branch>,
    /// How many of them did not call.
    silent: usize,
}

impl Fork {
    fn remove(&mut self, branch: u64) -> Option<Branch> {
        let branch = self.running.remove(&branch)?;
        self.silent -= usize::from(branch.began.is_none());
        Some(branch)
    }
}

/// Forks by the number of the program that forked.
#[derive(Debug, Default)]
pub struct Joins {
    forks: BTreeMap<u64, Fork>,
    /// Of each branch, the program.
    parents: BTreeMap<u64, u64>,
    oldest: BTreeSet<(Instant, u64)>,
}

impl Joins {
    /// A program forked, perhaps once more, into branches of a kind. Answers with the programs that are not followed any more for want of room.
    pub fn forked(
        &mut self,
        now: Instant,
        (program, kind): (u64, Kind),
        branches: impl IntoIterator<Item = u64>,
    ) -> Vec<u64> {
        let new = || Fork { at: now, running: BTreeMap::new(), silent: 0 };
        let mut fork = self.forks.remove(&program).unwrap_or_else(new);
        self.oldest.remove(&(fork.at, program));
        fork.at = now;
        for branch in branches.into_iter().filter(|branch| *branch != program).take(MAX_BRANCHES) {
            let former = self.parents.insert(branch, program);
            if former == Some(program) {
                continue;
            }
            if let Some(former) = former.and_then(|former| self.forks.get_mut(&former)) {
                former.remove(branch);
            }
            fork.running.insert(branch, Branch { began: None, kind });
            fork.silent += 1;
        }
        if fork.running.is_empty() {
            return Vec::new();
        }
        self.forks.insert(program, fork);
        self.oldest.insert((now, program));
        let mut dropped = Vec::new();
        while self.parents.len().max(self.forks.len()) > MAX_BRANCHES {
            let Some((_, oldest)) = self.oldest.first().copied() else { break };
            self.forget(oldest);
            dropped.push(oldest);
        }
        dropped
    }

    /// A program called, and is of a kind. Answers with the one whose branch it is, should this have been its first call.
    pub fn called(&mut self, now: Instant, branch: u64, kind: Kind) -> Option<u64> {
        let parent = *self.parents.get(&branch)?;
        let fork = self.forks.get_mut(&parent)?;
        let branch = fork.running.get_mut(&branch)?;
        branch.kind = kind;
        if branch.began.is_some() {
            return None;
        }
        branch.began = Some(now);
        fork.silent -= 1;
        Some(parent)
    }

    /// A branch ended. Answers with the program that forked it, and how long the branch took since its first call.
    pub fn ended(&mut self, now: Instant, branch: u64) -> Option<(u64, Option<Duration>)> {
        let parent = self.parents.remove(&branch)?;
        let ended = self.forks.get_mut(&parent)?.remove(branch)?;
        Some((parent, ended.began.map(|at| now.since(at))))
    }

    /// A branch is none any more: its program does not wait for it. Answers with that program.
    pub fn leave(&mut self, branch: u64) -> Option<u64> {
        let parent = self.parents.remove(&branch)?;
        self.forks.get_mut(&parent)?.remove(branch);
        Some(parent)
    }

    /// Whether every branch of a program has called or ended.
    #[must_use]
    pub fn all_called(&self, program: u64) -> bool {
        self.forks.get(&program).is_none_or(|fork| fork.silent == 0)
    }

    /// When the last branch of a program will have ended, from now on, where `left` says it of one of a kind that took so long
    /// already. `None` where that is not known of one, or the program did not fork.
    #[must_use]
    pub fn rest(&self, now: Instant, program: u64, left: impl Fn(Kind, Duration) -> Option<Return>) -> Option<Return> {
        let none = Return { early: Duration::ZERO, usual: Duration::ZERO, late: Duration::ZERO };
        let mut last = none;
        // Branches that are alike and began at about the same time are to end at the same.
        let mut known: BTreeMap<(Kind, u128), Return> = BTreeMap::new();
        for branch in self.forks.get(&program)?.running.values() {
            let took = branch.began.map_or(Duration::ZERO, |at| now.since(at));
            let alike = (branch.kind, took.as_nanos() / ALIKE.as_nanos());
            let whole = match known.get(&alike) {
                Some(whole) => *whole,
                None => *known.entry(alike).or_insert(left(branch.kind, took)?),
            };
            let rest = |span: Duration| span.saturating_sub(took);
            last = Return {
                early: last.early.max(rest(whole.early)),
                usual: last.usual.max(rest(whole.usual)),
                late: last.late.max(rest(whole.late)),
            };
        }
        Some(last)
    }

    /// Forgets a program: it goes on, or ended. Answers whether it had forked.
    pub fn forget(&mut self, program: u64) -> bool {
        self.take(program).is_some()
    }

    fn take(&mut self, program: u64) -> Option<Fork> {
        let fork = self.forks.remove(&program)?;
        self.oldest.remove(&(fork.at, program));
        fork.running.keys().for_each(|branch| {
            self.parents.remove(branch);
        });
        Some(fork)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop, proptest};

    use super::*;

    const KIND: Kind = Kind { tenant: 1, what: 0 };

    const fn at(secs: u64) -> Instant {
        Instant::from_nanos(secs * 1_000_000_000)
    }

    const fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    fn takes(whole: u64) -> impl Fn(Kind, Duration) -> Option<Return> {
        move |_, _| Some(Return { early: secs(whole), usual: secs(whole * 2), late: secs(whole * 3) })
    }

    #[test]
    fn the_stem_is_needed_until_every_branch_called_or_ended() {
        let mut joins = Joins::default();
        joins.forked(at(0), (1, KIND), [2, 3, 4]);
        assert_eq!(
            (joins.called(at(1), 2, KIND), joins.called(at(2), 2, KIND), joins.called(at(2), 9, KIND)),
            (Some(1), None, None)
        );
        assert!(!joins.all_called(1));
        joins.called(at(2), 3, KIND);
        assert_eq!(joins.ended(at(3), 4), Some((1, None)), "it never called");
        assert!(joins.all_called(1));
        assert_eq!(joins.ended(at(7), 3), Some((1, Some(secs(5)))));
    }

    #[test]
    fn the_last_branch_counts_beyond_what_it_took() {
        let mut joins = Joins::default();
        joins.forked(at(0), (1, KIND), [2, 3]);
        joins.called(at(0), 2, KIND);
        joins.called(at(4), 3, KIND);
        let rest = joins.rest(at(6), 1, takes(10)).unwrap();
        assert_eq!((rest.early, rest.usual, rest.late), (secs(8), secs(18), secs(28)));
        joins.ended(at(6), 3);
        assert_eq!(joins.rest(at(6), 1, takes(10)).unwrap().early, secs(4));
        joins.ended(at(6), 2);
        assert_eq!(joins.rest(at(6), 1, |_, _| None).unwrap().late, Duration::ZERO, "nothing is left to wait for");
        assert_eq!(joins.rest(at(6), 5, takes(10)), None);
    }

    #[test]
    fn branches_of_a_kind_take_as_it_does_and_those_that_nobody_waits_for_nothing() {
        let mut joins = Joins::default();
        let slow = Kind { tenant: 1, what: 9 };
        joins.forked(at(0), (1, KIND), [2, 3]);
        joins.called(at(0), 2, KIND);
        joins.called(at(0), 3, slow);
        let left = |kind, took| takes(if kind == slow { 60 } else { 10 })(kind, took);
        assert_eq!(joins.rest(at(5), 1, left).unwrap().early, secs(55));
        assert_eq!((joins.leave(3), joins.leave(3)), (Some(1), None));
        assert_eq!(joins.rest(at(5), 1, left).unwrap().early, secs(5));
    }

    #[test]
    fn a_second_fork_adds_branches_and_a_branch_has_one_program() {
        let mut joins = Joins::default();
        joins.forked(at(0), (1, KIND), [2]);
        joins.called(at(1), 2, KIND);
        joins.forked(at(2), (1, KIND), [2, 3]);
        assert_eq!(joins.called(at(3), 2, KIND), None, "it is known to have called");
        joins.forked(at(4), (7, KIND), [3]);
        assert_eq!(joins.called(at(5), 3, KIND), Some(7));
        assert!(joins.forget(1) && !joins.forget(1));
        assert_eq!(joins.ended(at(6), 2), None);
    }

    proptest! {
        /// However programs fork, call and end, branches and programs name each other, within the bound.
        #[test]
        fn branches_and_programs_agree(steps in prop::collection::vec((0_u8..5, 0_u64..6, 0_u64..12), 0..80)) {
            let mut joins = Joins::default();
            for (n, (what, program, branch)) in (0..).zip(steps) {
                match what {
                    0 => drop(joins.forked(at(n), (program, KIND), [branch, branch + 1])),
                    1 => drop(joins.called(at(n), branch, KIND)),
                    2 => drop(joins.ended(at(n), branch)),
                    3 => drop(joins.leave(branch)),
                    _ => drop(joins.forget(program)),
                }
                let named: Vec<(u64, u64)> =
                    joins.forks.iter().flat_map(|(p, f)| f.running.keys().map(|b| (*b, *p))).collect();
                let mut sorted = named.clone();
                sorted.sort_unstable();
                let known: Vec<(u64, u64)> = joins.parents.iter().map(|(b, p)| (*b, *p)).collect();
                assert_eq!(sorted, known);
                assert_eq!(joins.oldest.len(), joins.forks.len());
                for (program, fork) in &joins.forks {
                    let silent = fork.running.values().filter(|branch| branch.began.is_none()).count();
                    assert_eq!((fork.silent, joins.all_called(*program)), (silent, silent == 0));
                }
            }
        }
    }
}
