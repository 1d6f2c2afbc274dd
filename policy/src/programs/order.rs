//! Which step first: the critical path of declared graphs, attained service of the rest, and nobody waits for ever.

use std::time::Duration;

/// The upward rank of each step: how long from its beginning to the end of the program, along the longest way.
///
/// `before[i]` are the steps that step `i` waits for, all of lower numbers; `takes[i]` is what it takes itself, and
/// `gaps[i]` the pause between them and it.
///
/// # Panics
/// If a step waits for itself or a later one.
#[must_use]
pub fn upward_ranks(before: &[Vec<u32>], takes: &[Duration], gaps: &[Duration]) -> Vec<Duration> {
    let mut beyond = vec![Duration::ZERO; before.len()];
    for step in (0..before.len()).rev() {
        let rank = beyond[step] + takes[step];
        for earlier in &before[step] {
            let earlier = *earlier as usize;
            assert!(earlier < step, "steps come after those they wait for");
            beyond[earlier] = beyond[earlier].max(gaps[step] + rank);
        }
        beyond[step] = rank;
    }
    beyond
}

/// Bucket of a program's attained service (PLAS): octaves of seconds, so that what differs little goes by age.
#[must_use]
pub const fn attained_bucket(service: Duration) -> u32 {
    service.as_secs().saturating_add(1).ilog2()
}

/// What of an attained service counts in the order of programs: the least of its bucket.
#[must_use]
pub const fn attained_floor(service: Duration) -> Duration {
    Duration::from_secs((1 << attained_bucket(service)) - 1)
}

/// The order of steps that wait for one engine: the smallest goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// When it would be its turn.
    turn_ns: u64,
    /// Of those, the longer way to the end first.
    reversed_path_ns: u64,
}

impl Rank {
    /// A step that has waited since `since_ns` on the caller's clock.
    ///
    /// `remaining` is what its program still takes of engines, so far as that is known (else what it took so far), and
    /// `path` its upward rank. A step goes before one that came later by no more than the difference of what remains: a
    /// long program waits for short ones only as long as its own size, so none starves.
    #[must_use]
    pub fn new(since_ns: u64, remaining: Duration, path: Duration) -> Self {
        let nanos = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        Self { turn_ns: since_ns.saturating_add(nanos(remaining)), reversed_path_ns: u64::MAX - nanos(path) }
    }

    /// When it would be its turn, on the clock of the `since_ns` that it was made of.
    #[must_use]
    pub const fn turn_ns(self) -> u64 {
        self.turn_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn the_longest_way_counts() {
        // 0 -> (1, 2) -> 3, where 2 takes longer, and a tool of 5 s runs before 3.
        let before = [vec![], vec![0], vec![0], vec![1, 2]];
        let ranks = upward_ranks(&before, &[s(1), s(1), s(4), s(2)], &[s(0), s(0), s(0), s(5)]);
        assert_eq!(ranks, [s(12), s(8), s(11), s(2)]);
    }

    #[test]
    fn short_ones_first_but_not_for_ever() {
        let long = Rank::new(0, s(100), s(100));
        assert!(Rank::new(50_000_000_000, s(10), s(10)) < long);
        assert!(Rank::new(95_000_000_000, s(10), s(10)) > long, "it has waited long enough");
    }

    #[test]
    fn of_one_program_the_critical_path_first() {
        assert!(Rank::new(0, s(9), s(5)) < Rank::new(0, s(9), s(3)));
    }

    #[test]
    fn service_is_told_apart_by_octaves() {
        assert_eq!([0, 1, 2, 3, 7].map(|secs| attained_bucket(s(secs))), [0, 1, 1, 2, 3]);
        assert_eq!([0, 1, 2, 3, 7, 13].map(|secs| attained_floor(s(secs))), [0, 1, 1, 3, 7, 7].map(s));
        assert!(attained_floor(Duration::MAX) <= Duration::MAX);
    }
}
