//! Replays a trace on one cache of one policy.

use std::time::Duration;

use kvtier_policy::evict::survival::{CallFacts, StopReason};
use kvtier_policy::evict::{
    BlockUse, Found, Guard, Guarded, Known, LeafArc, LeafLru, LeafS3Fifo, PrefixCache, Ranking, SegmentId, Segments,
    SurvivalRanking,
};

use super::trace::{Trace, TraceCall};
use super::{Policy, belady};
use crate::rng::Rng;

/// Standard deviation of the logarithm of an announced return over the real one.
const ETA_SIGMA: f64 = 0.5;

/// What to replay.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    pub(crate) policy: Policy,
    /// In blocks.
    pub(crate) capacity: usize,
    /// Of the error in announced returns.
    pub(crate) seed: u64,
}

/// What a replay counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Blocks of all prompts.
    pub(crate) blocks: u64,
    /// Leading blocks that were there.
    pub(crate) hits: u64,
    /// Blocks that were there, leading or not.
    pub(crate) here: u64,
    /// Leading blocks that were seen before.
    pub(crate) ideal: u64,
    /// Blocks taken in.
    pub(crate) taken_in: u64,
    /// Blocks that left to make room.
    pub(crate) evicted: u64,
}

/// Replays `trace` under a policy; `progress` is told of every call.
pub(crate) fn replay(trace: &Trace, run: Run, progress: &mut dyn FnMut()) -> Tally {
    let (capacity, seed) = (run.capacity, run.seed);
    let mut tally = Tally { ideal: ideal(trace), blocks: trace.blocks.len() as u64, ..Tally::default() };
    let mut count = |found: Found, evicted: u64| {
        tally.hits += found.hits as u64;
        tally.here += found.here as u64;
        tally.taken_in += found.taken_in as u64;
        tally.evicted += evicted;
        progress();
    };
    match run.policy {
        Policy::Belady => belady::replay(trace, capacity, count),
        Policy::Lru => plain(trace, capacity, LeafLru::default(), count),
        Policy::S3fifo => plain(trace, capacity, LeafS3Fifo::new(capacity), count),
        Policy::Arc => plain(trace, capacity, LeafArc::new(capacity), count),
        Policy::SurvivalUnguarded => {
            let mut learning = Learning::new(capacity, SurvivalRanking::default(), Guard::learning_only(), seed);
            trace.calls.iter().for_each(|call| learning.call(trace, call, &mut count));
        }
        Policy::Survival | Policy::SurvivalEta => {
            let guard = Guard::new(capacity as u64);
            let mut learning = Learning::new(capacity, Guarded::new(capacity), guard, seed);
            learning.told = run.policy == Policy::SurvivalEta;
            trace.calls.iter().for_each(|call| learning.call(trace, call, &mut count));
        }
    }
    tally
}

fn plain<R: Ranking>(trace: &Trace, capacity: usize, ranking: R, mut count: impl FnMut(Found, u64)) {
    let mut cache = PrefixCache::new(capacity as u64, ranking);
    let segments = Segments::default();
    let mut known = Known::<()>::new(2 * capacity);
    let mut prefix = Vec::new();
    for (number, call) in (1..).zip(&trace.calls) {
        let before = cache.evicted();
        prefix.clear();
        for block in trace.blocks_of(call) {
            let (id, fresh) = known.hold_key(u64::from(*block));
            prefix.push(BlockUse { id, fresh, segment: SegmentId::NONE, weight: 1 });
        }
        let found = cache.call(number, &prefix, &segments, &mut known);
        prefix.iter().for_each(|block| known.release(block.id));
        while known.forget().is_some() {}
        count(found, cache.evicted() - before);
    }
}

/// A cache whose ranking learns.
struct Learning<R> {
    cache: PrefixCache<R>,
    guard: Guard,
    chance: Rng,
    told: bool,
}

impl<R: Ranking> Learning<R> {
    fn new(capacity: usize, ranking: R, guard: Guard, seed: u64) -> Self {
        let cache = PrefixCache::new(capacity as u64, ranking);
        Self { cache, guard, chance: Rng::new(seed), told: false }
    }

    fn call(&mut self, trace: &Trace, call: &TraceCall, count: &mut impl FnMut(Found, u64)) {
        let blocks = trace.blocks_of(call);
        let announced = call.next_after.filter(|_| self.told && call.stop == StopReason::ToolUse);
        let returns_in = announced.map(|after| self.blur(after));
        let facts = CallFacts {
            program: call.program,
            sub_agent: call.sub_agent,
            stop: call.stop,
            returns_in,
            last: call.last,
            blocks: u32::try_from(blocks.len()).unwrap_or(u32::MAX),
        };
        let before = self.cache.evicted();
        let cache = &mut self.cache;
        let used = blocks.iter().map(|block| (u64::from(*block), trace.semantics[*block as usize]));
        let found = self.guard.call_on(call.at, facts, used, |number, prefix, segments, known| {
            cache.call(number, prefix, segments, known)
        });
        self.cache.ranking_mut().follow(self.guard.leader());
        count(found, self.cache.evicted() - before);
    }

    /// A return time as a tool might announce it: log-normal around the real one.
    fn blur(&mut self, after: Duration) -> Duration {
        let mut uniform = || (self.chance.next() >> 11) as f64 / (1_u64 << 53) as f64;
        let (u, v) = (1.0 - uniform(), uniform());
        let normal = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
        Duration::try_from_secs_f64(after.as_secs_f64() * (ETA_SIGMA * normal).exp()).unwrap_or(Duration::MAX)
    }
}

/// Leading blocks seen before: what a cache without bounds would hit.
fn ideal(trace: &Trace) -> u64 {
    let mut seen = vec![false; trace.semantics.len()];
    let mut hits = 0;
    for call in &trace.calls {
        let blocks = trace.blocks_of(call);
        hits += blocks.iter().take_while(|b| seen[**b as usize]).count() as u64;
        for block in blocks {
            seen[*block as usize] = true;
        }
    }
    hits
}
