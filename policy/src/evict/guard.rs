//! The guard of the survival ranking, beside the node: it plays the node's calls on small shadows of the host tier and says
//! which ranking does best there.
//!
//! It works from a record of each call and holds nothing of the core, so that its work need not be done under the core's
//! lock. A guard that misses calls judges by those it gets.

use kvtier_types::{Instant, SemanticType};

use super::survival::{CallFacts, Pause};
use super::{BlockUse, Contender, Duel, DuelConfig, Known, SegmentId, Segments};

/// Blocks that left and are remembered, so that the survival curves count them.
const GHOSTS: usize = 262_144;

/// A model call and the blocks of its prompt, in order.
#[derive(Debug, Clone)]
pub struct Call {
    /// When.
    pub at: Instant,
    /// What is known of it.
    pub facts: CallFacts,
    /// A number for each block, the same for equal ones, and what it means.
    pub blocks: Vec<(u64, SemanticType)>,
}

/// Segments of the blocks of a tier, those of late that left among them, and the shadows of the tier if there are any.
#[derive(Debug)]
pub struct Guard {
    known: Known<SegmentId>,
    segments: Segments,
    duel: Option<Duel>,
    number: u64,
    /// Of the call at hand: its blocks, their numbers and segments.
    keys: Vec<u64>,
    prefix: Vec<BlockUse>,
    in_segments: Vec<SegmentId>,
}

impl Guard {
    /// Of a tier with room for about so many blocks.
    #[must_use]
    pub fn new(capacity_blocks: u64) -> Self {
        Self::of(Some(Duel::new(DuelConfig { capacity_blocks })))
    }

    /// Without shadows: survival leads.
    #[must_use]
    pub fn learning_only() -> Self {
        Self::of(None)
    }

    fn of(duel: Option<Duel>) -> Self {
        Self {
            known: Known::new(GHOSTS),
            segments: Segments::default(),
            duel,
            number: 0,
            keys: Vec::new(),
            prefix: Vec::new(),
            in_segments: Vec::new(),
        }
    }

    /// Takes in a call. Returns who leads now.
    pub fn call(&mut self, call: &Call) -> Contender {
        self.call_on(call.at, call.facts, call.blocks.iter().copied(), |_, _, _, _| ());
        self.leader()
    }

    /// The same of a call whose blocks a cache uses meanwhile: `cache` gets the call's number and its blocks, in their
    /// segments.
    pub fn call_on<T>(
        &mut self,
        at: Instant,
        facts: CallFacts,
        blocks: impl Iterator<Item = (u64, SemanticType)>,
        cache: impl FnOnce(u64, &[BlockUse], &Segments, &mut Known<SegmentId>) -> T,
    ) -> T {
        self.number += 1;
        self.segments.begin_call(at, facts);
        self.keys.clear();
        self.prefix.clear();
        self.in_segments.clear();
        for (key, semantic) in blocks {
            let (id, fresh) = self.known.hold_key(key);
            let segment = self.segments.use_block(self.known.value(id), semantic);
            self.known.set(id, segment);
            self.keys.push(key);
            self.prefix.push(BlockUse { id, fresh, segment, weight: 1 });
            self.in_segments.push(segment);
        }
        let found = cache(self.number, &self.prefix, &self.segments, &mut self.known);
        self.prefix.iter().for_each(|block| self.known.release(block.id));
        while let Some((_, segment)) = self.known.forget() {
            self.segments.leave(segment);
        }
        if let Some(duel) = &mut self.duel {
            duel.call(self.number, facts.program, (&self.keys, &self.in_segments), &self.segments);
        }
        self.segments.end_call();
        found
    }

    /// A program says that it waits, and for how long.
    pub fn pause(&mut self, program: u64, pause: Pause) {
        self.segments.pause(program, pause);
    }

    /// A program ended.
    pub fn end_program(&mut self, program: u64) {
        self.segments.end_program(program);
    }

    /// Who leads.
    #[must_use]
    pub fn leader(&self) -> Contender {
        self.duel.as_ref().map_or(Contender::Survival, Duel::leader)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_no_recency_serves_is_noticed() {
        // Many one-time prompts, and a few that come again and again at a distance beyond what LRU keeps.
        let mut guard = Guard::new(512);
        let mut at = Instant::ZERO;
        for round in 0..3000_u64 {
            at = at + std::time::Duration::from_secs(1);
            let chain = if round % 2 == 0 { round / 2 % 6 } else { 1_000 + round };
            let blocks = (0..64).map(|n| (chain << 16 | n, SemanticType::default())).collect();
            guard.call(&Call { at, facts: CallFacts { blocks: 64, ..CallFacts::default() }, blocks });
        }
        assert!(Contender::ALL.contains(&guard.leader()));
        assert!(guard.known.len() <= GHOSTS + 64);
    }
}
