//! Which ranking a node uses, and with what.

use kvtier_types::Tier;

use super::{Contender, Guarded, LeafArc, LeafLru, LeafS3Fifo, Ranking, SurvivalRanking};

/// How a node evicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EvictionConfig {
    /// Who decides.
    pub policy: Contender,
    /// Whether survival ranking yields to another that does better: see [`super::Guard`].
    pub guard: bool,
    /// Bytes that each tier has room for; host memory says so itself.
    pub capacity_bytes: [u64; 4],
}

impl Default for EvictionConfig {
    fn default() -> Self {
        Self { policy: Contender::Survival, guard: true, capacity_bytes: [0; 4] }
    }
}

impl EvictionConfig {
    /// Whether the guard has anything to decide.
    #[must_use]
    pub fn is_guarded(&self) -> bool {
        self.guard && self.policy == Contender::Survival
    }

    /// An empty ranking for a pool of about so many blocks. What leads is found for host memory; slower tiers, which hold
    /// what is used more rarely, go by survival alone.
    pub(crate) fn ranking(&self, tier: Tier, blocks: usize) -> Box<dyn Ranking> {
        match self.policy {
            Contender::Survival if self.guard && tier == Tier::Host => Box::new(Guarded::new(blocks)),
            Contender::Survival => Box::<SurvivalRanking>::default(),
            Contender::Lru => Box::<LeafLru>::default(),
            Contender::S3Fifo => Box::new(LeafS3Fifo::new(blocks)),
            Contender::Arc => Box::new(LeafArc::new(blocks)),
        }
    }
}
