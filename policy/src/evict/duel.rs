//! The guard of the survival ranking: sampled shadow caches run every ranking, and the node follows the winner.
//!
//! A program is sampled by its name; without one, by the first block that only one chain holds. What many programs share
//! weighs in a shadow what it weighs in the whole, so a shadow of one part in n is a cache of one part in n.

use rustc_hash::FxHashMap;

use super::{
    BlockUse, Known, LeafArc, LeafLru, LeafS3Fifo, PrefixCache, RecentKeys, SegmentId, Segments, SurvivalRanking,
};

/// Who competes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Contender {
    /// Survival ranking.
    Survival,
    /// Leaf-first LRU.
    Lru,
    /// Leaf-first S3-FIFO.
    S3Fifo,
    /// Leaf-first ARC.
    Arc,
}

impl Contender {
    /// All.
    pub const ALL: [Self; 4] = [Self::Survival, Self::Lru, Self::S3Fifo, Self::Arc];

    /// Its name, as that of a policy.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Survival => "survival",
            Self::Lru => "lru",
            Self::S3Fifo => "s3fifo",
            Self::Arc => "arc",
        }
    }
}

/// How the duel is held.
#[derive(Debug, Clone, Copy)]
pub struct DuelConfig {
    /// Blocks the guarded pool has room for.
    pub capacity_blocks: u64,
}

/// Weight of a block in a shadow that only its program uses.
const WHOLE: u32 = 64;
/// Stems remembered, to find the first block that only one chain holds.
const MAX_STEMS: usize = 65_536;
/// The child of a stem that has several.
const BRANCHED: u32 = u32::MAX;

/// The shadows and their score.
#[derive(Debug)]
pub struct Duel {
    /// Blocks of all shadows.
    known: Known<()>,
    prefix: Vec<BlockUse>,
    survival: PrefixCache<SurvivalRanking>,
    lru: PrefixCache<LeafLru>,
    s3fifo: PrefixCache<LeafS3Fifo>,
    arc: PrefixCache<LeafArc>,
    /// Out of 2^32.
    rate: u64,
    shared_weight: u32,
    stems: RecentKeys<u32>,
    scores: Scores,
    leader: Contender,
}

/// Hits of late, and how much their differences vary.
#[derive(Debug, Default)]
struct Scores {
    blocks: f64,
    lead: FxHashMap<(Contender, Contender), (f64, f64)>,
    calls: u64,
}

/// Share of the past that a sampled call leaves: half of it is gone after some 700.
const FADE: f64 = 0.999;
/// Standard errors by which another must lead: the question is asked after every call, so two would be met by chance.
const SURE: f64 = 2.5;
/// Share of blocks by which another must lead.
const MARGIN: f64 = 0.003;

impl Duel {
    /// Shadows of a pool.
    #[must_use]
    pub fn new(config: DuelConfig) -> Self {
        let share = (1024.0 / config.capacity_blocks.max(1) as f64).clamp(1.0 / 64.0, 1.0);
        let blocks = (config.capacity_blocks as f64 * share).round();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of what fitted before")]
        let (rate, capacity, shared_weight, count) = (
            (share * 4_294_967_296.0) as u64,
            blocks as u64 * u64::from(WHOLE),
            ((share * f64::from(WHOLE)).round() as u32).max(1),
            blocks as usize,
        );
        Self {
            known: Known::new(2 * count),
            prefix: Vec::new(),
            survival: PrefixCache::new(capacity, SurvivalRanking::default()),
            lru: PrefixCache::new(capacity, LeafLru::default()),
            s3fifo: PrefixCache::new(capacity, LeafS3Fifo::new(count)),
            arc: PrefixCache::new(capacity, LeafArc::new(count)),
            rate,
            shared_weight,
            stems: RecentKeys::new(MAX_STEMS),
            scores: Scores::default(),
            leader: Contender::Survival,
        }
    }

    /// Who leads.
    #[must_use]
    pub const fn leader(&self) -> Contender {
        self.leader
    }

    /// A call of `program`, if that is known, used these blocks, which are in these segments now.
    pub fn call(
        &mut self,
        touched: u64,
        program: Option<u64>,
        (keys, in_segments): (&[u64], &[SegmentId]),
        segments: &Segments,
    ) {
        let name = program.unwrap_or_else(|| self.own_block(keys));
        if scatter(name) >= self.rate {
            return;
        }
        self.prefix.clear();
        for (key, segment) in keys.iter().zip(in_segments) {
            let (id, fresh) = self.known.hold_key(*key);
            let weight = if segments.is_shared(*segment) { self.shared_weight } else { WHOLE };
            self.prefix.push(BlockUse { id, fresh, segment: *segment, weight });
        }
        let (prefix, known) = (&self.prefix, &mut self.known);
        let hits = [
            self.survival.call(touched, prefix, segments, known).hits,
            self.lru.call(touched, prefix, segments, known).hits,
            self.s3fifo.call(touched, prefix, segments, known).hits,
            self.arc.call(touched, prefix, segments, known).hits,
        ];
        prefix.iter().for_each(|block| known.release(block.id));
        while known.forget().is_some() {}
        self.scores.count(keys.len(), hits);
        self.leader = self.scores.leader(self.leader);
    }

    /// The first block of a chain that no other chain holds.
    fn own_block(&mut self, keys: &[u64]) -> u64 {
        for pair in keys.windows(2) {
            #[expect(clippy::cast_possible_truncation, reason = "part of a digest")]
            let child = (scatter(pair[1]) as u32).min(BRANCHED - 1);
            match self.stems.get(pair[0]) {
                Some(BRANCHED) => {}
                Some(known) if known != child => {
                    self.stems.put(pair[0], BRANCHED);
                }
                Some(_) => return pair[0],
                None => {
                    self.stems.put(pair[0], child);
                    return pair[0];
                }
            }
        }
        keys.last().copied().unwrap_or(0)
    }
}

impl Scores {
    fn count(&mut self, blocks: usize, hits: [usize; 4]) {
        self.calls += 1;
        self.blocks = self.blocks.mul_add(FADE, blocks as f64);
        for (a, x) in Contender::ALL.into_iter().zip(hits) {
            for (b, y) in Contender::ALL.into_iter().zip(hits).filter(|(b, _)| *b != a) {
                let (sum, squares) = self.lead.entry((a, b)).or_default();
                let lead = x as f64 - y as f64;
                *sum = sum.mul_add(FADE, lead);
                *squares = squares.mul_add(FADE, lead * lead);
            }
        }
    }

    fn leader(&self, leader: Contender) -> Contender {
        let ahead = |other: Contender| {
            let (sum, squares) = self.lead.get(&(other, leader)).copied().unwrap_or_default();
            (sum > SURE * squares.sqrt() && sum > MARGIN * self.blocks).then_some(sum)
        };
        let others = Contender::ALL.into_iter().filter(|c| *c != leader);
        let best = others.filter_map(|c| ahead(c).map(|sum| (sum, c))).max_by(|a, b| a.0.total_cmp(&b.0));
        best.map_or(leader, |(_, c)| c)
    }
}

/// Spreads a name over 32 bits.
const fn scatter(name: u64) -> u64 {
    let mut z = name.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) >> 32
}
