//! Prefixes that many calls share, by how often they are used: what is worth having on more nodes than one.
//!
//! A use counts less with age, by e every [`SPAN`]. Kept is the logarithm of the sum as of a fixed time, so that nothing has to
//! be aged and the order of two prefixes only changes with their uses.
//!
//! *Bounds*: [`MAX_PREFIXES`]; the least used makes room. O(log n) per use.

use std::collections::BTreeSet;
use std::time::Duration;

use kvtier_types::{BlockKey, Instant};
use rustc_hash::FxHashMap;

/// Prefixes that are counted at once.
pub const MAX_PREFIXES: usize = 1024;
/// What is older counts less than a third.
const SPAN: Duration = Duration::from_secs(60);

/// Logarithm of the uses of a prefix, as of the time zero.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Score(f64);

impl Eq for Score {}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Score {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

fn spans(now: Instant) -> f64 {
    now.since(Instant::ZERO).as_secs_f64() / SPAN.as_secs_f64()
}

/// Prefixes by the key of their last block.
#[derive(Debug, Default)]
pub struct Hot {
    scores: FxHashMap<BlockKey, Score>,
    order: BTreeSet<(Score, BlockKey)>,
}

impl Hot {
    /// A call used a prefix.
    pub fn used(&mut self, now: Instant, prefix: BlockKey) {
        let one = spans(now);
        let score = match self.scores.get(&prefix) {
            None => {
                if self.scores.len() >= MAX_PREFIXES
                    && let Some((_, least)) = self.order.pop_first()
                {
                    self.scores.remove(&least);
                }
                Score(one)
            }
            Some(former) => {
                self.order.remove(&(*former, prefix));
                let (more, less) = (former.0.max(one), former.0.min(one));
                Score(more + (less - more).exp().ln_1p())
            }
        };
        self.scores.insert(prefix, score);
        self.order.insert((score, prefix));
    }

    /// The most used first, with uses per second; those without any to speak of are left out.
    pub fn hottest(&self, now: Instant) -> impl Iterator<Item = (BlockKey, f64)> {
        let since = spans(now);
        let rate = move |score: Score| (score.0 - since).exp() / SPAN.as_secs_f64();
        let rates = self.order.iter().rev().map(move |(score, prefix)| (*prefix, rate(*score)));
        rates.take_while(|(_, rate)| rate * SPAN.as_secs_f64() > 0.01)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: u64) -> Instant {
        Instant::ZERO + Duration::from_secs(secs)
    }

    fn key(n: u32) -> BlockKey {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&n.to_le_bytes());
        BlockKey::new(bytes)
    }

    #[test]
    fn a_steady_rate_is_found_and_fades() {
        let mut hot = Hot::default();
        (0..1200).for_each(|second| (0..2).for_each(|_| hot.used(at(second), key(1))));
        (0..1200).step_by(10).for_each(|second| hot.used(at(second), key(2)));
        let rates: Vec<_> = hot.hottest(at(1200)).collect();
        assert_eq!(rates.iter().map(|(key, _)| *key).collect::<Vec<_>>(), [key(1), key(2)]);
        assert!((rates[0].1 - 2.0).abs() < 0.1 && (rates[1].1 - 0.1).abs() < 0.02, "{rates:?}");
        assert!(hot.hottest(at(1260)).next().unwrap().1 < 0.8);
        assert_eq!(hot.hottest(at(3000)).count(), 0);
    }

    #[test]
    fn the_least_used_makes_room() {
        let mut hot = Hot::default();
        (0..10).for_each(|_| hot.used(at(0), key(0)));
        (1..3000).for_each(|n| hot.used(at(1), key(n)));
        assert_eq!(hot.hottest(at(1)).count(), MAX_PREFIXES);
        assert_eq!(hot.hottest(at(1)).next().unwrap().0, key(0));
        assert_eq!(hot.scores.len(), hot.order.len());
    }
}
