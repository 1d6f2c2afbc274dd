//! Every ranking against a naive one of its own, over random programs that share, extend and abandon prefixes.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use kvtier_types::{Instant, SemanticType};
use proptest::prelude::{Strategy, any, prop, proptest};

use super::survival::{CallFacts, StopReason};
use super::{
    BlockUse, Contender, Guarded, Known, LeafArc, LeafLru, LeafS3Fifo, PrefixCache, Ranking, SegmentId, Segments,
    SurvivalRanking,
};

/// A call of a program: keeps so many blocks of its last prompt, adds so many.
#[derive(Debug, Clone)]
struct Step {
    program: u64,
    keeps: usize,
    adds: usize,
    pause_ms: u64,
    tool: bool,
    last: bool,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (1..5_u64, 0..12_usize, 0..4_usize, 0..20_000_u64, any::<bool>(), 0..12_u8).prop_map(
        |(program, keeps, adds, pause_ms, tool, last)| Step { program, keeps, adds, pause_ms, tool, last: last == 0 },
    );
    prop::collection::vec(step, 1..120)
}

/// A block that may go.
#[derive(Debug, Clone, Copy)]
struct Leaf {
    key: u64,
    touched: u64,
    depth: usize,
    segment: SegmentId,
}

/// What a naive ranking is told, and asked.
trait Naive {
    fn came(&mut self, _key: u64, _touched: u64) {}
    fn used(&mut self, _key: u64, _touched: u64) {}
    fn left(&mut self, _key: u64) {}
    /// `leaves` are in the order of their last use, those of one call deepest first.
    fn choose(&mut self, leaves: &[Leaf], segments: &Segments) -> u64;
}

#[derive(Debug)]
struct NaiveLru;

impl Naive for NaiveLru {
    fn choose(&mut self, leaves: &[Leaf], _segments: &Segments) -> u64 {
        leaves[0].key
    }
}

#[derive(Debug)]
struct NaiveSurvival;

impl Naive for NaiveSurvival {
    fn choose(&mut self, leaves: &[Leaf], segments: &Segments) -> u64 {
        let rank = |leaf: &&Leaf| {
            let (value, cell) = segments.rank_of(leaf.segment);
            (value.to_bits(), cell, leaf.touched, leaf.segment, Reverse(leaf.depth))
        };
        leaves.iter().min_by_key(rank).expect("asked only when something may go").key
    }
}

/// The leaf that a call left.
fn of_call(leaves: &[Leaf], touched: u64) -> Option<u64> {
    leaves.iter().find(|leaf| leaf.touched == touched).map(|leaf| leaf.key)
}

#[derive(Debug, Default)]
struct NaiveS3 {
    capacity: usize,
    queues: [Vec<u64>; 2],
    uses: BTreeMap<u64, (u8, u64)>,
    departures: usize,
    ghosts: BTreeMap<u64, usize>,
    aside: Vec<u64>,
    call: u64,
}

impl NaiveS3 {
    fn put_back(&mut self, call: u64) {
        if self.call != call && !self.aside.is_empty() {
            self.call = call;
            for key in std::mem::take(&mut self.aside) {
                let queue = self.queues.iter_mut().find(|queue| queue.contains(&key)).expect("it is in one");
                queue.retain(|k| *k != key);
                queue.push(key);
            }
        }
    }
}

impl Naive for NaiveS3 {
    fn came(&mut self, key: u64, touched: u64) {
        let main = self.ghosts.remove(&key).is_some_and(|at| self.departures - at < self.capacity - self.capacity / 10);
        self.put_back(touched);
        self.queues[usize::from(main)].push(key);
        self.uses.insert(key, (0, touched));
    }

    fn used(&mut self, key: u64, touched: u64) {
        let uses = self.uses.get_mut(&key).expect("it is here");
        *uses = ((uses.0 + 1).min(3), touched);
        self.put_back(touched);
    }

    fn left(&mut self, key: u64) {
        if self.queues[0].contains(&key) {
            self.departures += 1;
            self.ghosts.insert(key, self.departures);
        }
        self.queues.iter_mut().for_each(|queue| queue.retain(|k| *k != key));
        self.aside.retain(|k| *k != key);
    }

    fn choose(&mut self, leaves: &[Leaf], _segments: &Segments) -> u64 {
        loop {
            let [small, main] = [self.queues[0].len(), self.queues[1].len()];
            let giving = usize::from(main > 0 && small * 10 < small + main);
            let head = |queue: usize| self.queues[queue].iter().copied().find(|key| !self.aside.contains(key));
            let Some(head) = head(giving).or_else(|| head(1 - giving)) else { return leaves[0].key };
            let (uses, touched) = self.uses[&head];
            let Some(leaf) = of_call(leaves, touched) else {
                self.aside.push(head);
                continue;
            };
            if uses == 0 {
                return leaf;
            }
            let main = self.queues[1].contains(&head);
            self.uses.insert(head, (if main { uses - 1 } else { 0 }, touched));
            self.queues.iter_mut().for_each(|queue| queue.retain(|k| *k != head));
            self.queues[1].push(head);
        }
    }
}

#[derive(Debug, Default)]
struct NaiveArc {
    capacity: usize,
    /// Used once, used again.
    lists: [BTreeMap<u64, u64>; 2],
    ghosts: [Vec<u64>; 2],
    target: f64,
    /// What was chosen, and the list it goes for.
    chosen: Option<(u64, usize)>,
}

impl Naive for NaiveArc {
    fn came(&mut self, key: u64, touched: u64) {
        let [once, again] = [self.ghosts[0].len() as f64, self.ghosts[1].len() as f64];
        let was = [0, 1].into_iter().find(|kind| self.ghosts[*kind].contains(&key));
        match was {
            Some(0) => self.target = (self.target + (again / once).max(1.0)).min(self.capacity as f64),
            Some(_) => self.target = (self.target - (once / again).max(1.0)).max(0.0),
            None => {}
        }
        self.ghosts.iter_mut().for_each(|list| list.retain(|k| *k != key));
        self.lists[usize::from(was.is_some())].insert(key, touched);
    }

    fn used(&mut self, key: u64, touched: u64) {
        self.lists[0].remove(&key);
        self.lists[1].insert(key, touched);
    }

    fn left(&mut self, key: u64) {
        let kind = usize::from(self.lists[1].contains_key(&key));
        self.lists[kind].remove(&key);
        let kind = self.chosen.take().filter(|(chosen, _)| *chosen == key).map_or(kind, |(_, giving)| giving);
        self.ghosts[kind].push(key);
        while self.ghosts[0].len() > self.capacity.saturating_sub(self.lists[0].len()) {
            self.ghosts[0].remove(0);
        }
        let all = self.lists[0].len() + self.lists[1].len() + self.ghosts[0].len();
        while self.ghosts[1].len() > (2 * self.capacity).saturating_sub(all) {
            self.ghosts[1].remove(0);
        }
    }

    fn choose(&mut self, leaves: &[Leaf], _segments: &Segments) -> u64 {
        let giving = usize::from(self.lists[0].is_empty() || self.lists[0].len() as f64 <= self.target);
        for kind in [giving, 1 - giving] {
            let mut calls: Vec<u64> = self.lists[kind].values().copied().collect();
            calls.sort_unstable();
            if let Some(leaf) = calls.into_iter().find_map(|touched| of_call(leaves, touched)) {
                self.chosen = Some((leaf, giving));
                return leaf;
            }
        }
        self.chosen = None;
        leaves[0].key
    }
}

/// All of them, led by one.
#[derive(Debug)]
struct NaiveGuarded {
    capacity: usize,
    s3: NaiveS3,
    arc: NaiveArc,
    here: BTreeMap<u64, u64>,
    leader: Contender,
}

impl NaiveGuarded {
    /// Who takes the lead begins with what is here, in the order of its last use.
    fn follow(&mut self, leader: Contender) {
        if self.leader == leader {
            return;
        }
        self.leader = leader;
        self.s3 = NaiveS3 { capacity: self.capacity, ..NaiveS3::default() };
        self.arc = NaiveArc { capacity: self.capacity, ..NaiveArc::default() };
        let mut blocks: Vec<(u64, u64)> = self.here.iter().map(|(key, touched)| (*touched, *key)).collect();
        blocks.sort_unstable();
        for (touched, key) in blocks {
            self.s3.came(key, touched);
            self.arc.came(key, touched);
        }
    }
}

impl Naive for NaiveGuarded {
    fn came(&mut self, key: u64, touched: u64) {
        self.here.insert(key, touched);
        self.s3.came(key, touched);
        self.arc.came(key, touched);
    }

    fn used(&mut self, key: u64, touched: u64) {
        self.here.insert(key, touched);
        self.s3.used(key, touched);
        self.arc.used(key, touched);
    }

    fn left(&mut self, key: u64) {
        self.here.remove(&key);
        self.s3.left(key);
        self.arc.left(key);
    }

    fn choose(&mut self, leaves: &[Leaf], segments: &Segments) -> u64 {
        match self.leader {
            Contender::Survival => NaiveSurvival.choose(leaves, segments),
            Contender::Lru => NaiveLru.choose(leaves, segments),
            Contender::S3Fifo => self.s3.choose(leaves, segments),
            Contender::Arc => self.arc.choose(leaves, segments),
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct NaiveBlock {
    parent: Option<u64>,
    touched: u64,
    depth: usize,
    segment: SegmentId,
}

/// A prefix-closed cache that looks at everything.
struct NaiveCache<N> {
    here: BTreeMap<u64, NaiveBlock>,
    capacity: usize,
    policy: N,
}

impl<N: Naive> NaiveCache<N> {
    fn call(&mut self, touched: u64, prefix: &[(u64, SegmentId)], segments: &Segments) -> usize {
        let hits = prefix.iter().take_while(|(key, _)| self.here.contains_key(key)).count();
        for (key, segment) in &prefix[..hits] {
            let block = self.here.get_mut(key).expect("a hit");
            (block.touched, block.segment) = (touched, *segment);
            self.policy.used(*key, touched);
        }
        for depth in hits..prefix.len() {
            let (key, segment) = prefix[depth];
            if self.here.len() == self.capacity && !self.evict(prefix[..depth].last().map(|(key, _)| *key), segments) {
                break;
            }
            let parent = depth.checked_sub(1).map(|before| prefix[before].0);
            self.here.insert(key, NaiveBlock { parent, touched, depth, segment });
            self.policy.came(key, touched);
        }
        hits
    }

    fn evict(&mut self, tip: Option<u64>, segments: &Segments) -> bool {
        let inner = |key: u64| self.here.values().any(|block| block.parent == Some(key));
        let leaf =
            |(key, b): (&u64, &NaiveBlock)| Leaf { key: *key, touched: b.touched, depth: b.depth, segment: b.segment };
        let mut leaves: Vec<Leaf> =
            self.here.iter().filter(|(key, _)| Some(**key) != tip && !inner(**key)).map(leaf).collect();
        leaves.sort_by_key(|leaf| (leaf.touched, Reverse(leaf.depth)));
        if leaves.is_empty() {
            return false;
        }
        let victim = self.policy.choose(&leaves, segments);
        self.here.remove(&victim).expect("a victim is here");
        self.policy.left(victim);
        true
    }
}

/// Plays the steps on both and compares after each what is here.
struct Match<R, N> {
    fast: PrefixCache<R>,
    slow: NaiveCache<N>,
    known: Known<SegmentId>,
    segments: Segments,
}

impl<R: Ranking, N: Naive> Match<R, N> {
    fn new(capacity: usize, ghosts: usize, ranking: R, naive: N) -> Self {
        Self {
            fast: PrefixCache::new(capacity as u64, ranking),
            slow: NaiveCache { here: BTreeMap::new(), capacity, policy: naive },
            known: Known::new(ghosts),
            segments: Segments::default(),
        }
    }

    fn play(&mut self, steps: &[Step], mut each: impl FnMut(&mut R, &mut N)) {
        let mut now = Instant::ZERO;
        let mut prompts: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        let mut next_key = 100;
        for (number, step) in (1..).zip(steps) {
            now = now + Duration::from_millis(step.pause_ms);
            let prompt = prompts.entry(step.program).or_insert_with(|| vec![1]);
            prompt.truncate(step.keeps.max(1));
            prompt.extend((0..step.adds).map(|n| next_key + n as u64));
            next_key += step.adds as u64;
            let prompt = prompt.clone();
            self.call(number, (now, step), &prompt);
            each(self.fast.ranking_mut(), &mut self.slow.policy);
        }
    }

    fn call(&mut self, number: u64, (now, step): (Instant, &Step), prompt: &[u64]) {
        let facts = CallFacts {
            program: Some(step.program),
            stop: if step.tool { StopReason::ToolUse } else { StopReason::EndTurn },
            last: step.last,
            blocks: u32::try_from(prompt.len()).expect("short"),
            ..CallFacts::default()
        };
        self.segments.begin_call(now, facts);
        let mut uses = Vec::new();
        for key in prompt {
            let (id, fresh) = self.known.hold_key(*key);
            let semantic = if *key == 1 { SemanticType::SystemPrompt } else { SemanticType::Unspecified };
            let segment = self.segments.use_block(self.known.value(id), semantic);
            self.known.set(id, segment);
            uses.push(BlockUse { id, fresh, segment, weight: 1 });
        }
        let found = self.fast.call(number, &uses, &self.segments, &mut self.known);
        let naive: Vec<(u64, SegmentId)> = prompt.iter().zip(&uses).map(|(key, used)| (*key, used.segment)).collect();
        assert_eq!(found.hits, self.slow.call(number, &naive, &self.segments), "call {number}");
        for (key, used) in prompt.iter().zip(&uses) {
            assert_eq!(self.fast.contains(used.id), self.slow.here.contains_key(key), "call {number}, block {key}");
        }
        assert_eq!(self.fast.used(), self.slow.here.len() as u64);
        uses.iter().for_each(|used| self.known.release(used.id));
        while let Some((_, segment)) = self.known.forget() {
            self.segments.leave(segment);
        }
        self.segments.end_call();
        assert_eq!(self.segments.blocks(), self.known.len(), "every block known is in a segment, once");
    }
}

proptest! {
    #[test]
    fn lru_evicts_what_a_naive_one_would(steps in steps(), capacity in 2..24_usize, ghosts in 0..40_usize) {
        Match::new(capacity, ghosts, LeafLru::default(), NaiveLru).play(&steps, |_, _| {});
    }

    #[test]
    fn survival_evicts_what_a_naive_one_would(steps in steps(), capacity in 2..24_usize, ghosts in 0..40_usize) {
        Match::new(capacity, ghosts, SurvivalRanking::default(), NaiveSurvival).play(&steps, |_, _| {});
    }

    #[test]
    fn s3fifo_evicts_what_a_naive_one_would(steps in steps(), capacity in 2..24_usize) {
        let naive = NaiveS3 { capacity, ..NaiveS3::default() };
        Match::new(capacity, 1000, LeafS3Fifo::new(capacity), naive).play(&steps, |_, _| {});
    }

    #[test]
    fn arc_evicts_what_a_naive_one_would(steps in steps(), capacity in 2..24_usize) {
        let naive = NaiveArc { capacity, ..NaiveArc::default() };
        Match::new(capacity, 1000, LeafArc::new(capacity), naive).play(&steps, |_, _| {});
    }

    #[test]
    fn whoever_leads_decides(steps in steps(), capacity in 2..24_usize, leaders in prop::collection::vec(0..4_usize, 1..8)) {
        let naive = NaiveGuarded {
            capacity,
            here: BTreeMap::new(),
            s3: NaiveS3 { capacity, ..NaiveS3::default() },
            arc: NaiveArc { capacity, ..NaiveArc::default() },
            leader: Contender::Survival,
        };
        let mut calls = 0;
        Match::new(capacity, 1000, Guarded::new(capacity), naive).play(&steps, |fast, slow| {
            calls += 1;
            let leader = Contender::ALL[leaders[calls / 5 % leaders.len()]];
            fast.follow(leader);
            slow.follow(leader);
        });
    }
}
