//! A node of the modelled cluster: an engine, tiers, links, and who waits.

use std::time::Duration;

use kvtier_policy::evict::KnownId;
use kvtier_policy::programs::{Proactive, ProactiveConfig, Rank};
use kvtier_types::Instant;
use rustc_hash::FxHashMap;

use super::cache::{Cache, DEVICE, DISK, HOST};
use super::config::Config;
use super::decisions::Decisions;
use super::engine::Engine;
use super::links::Link;

/// Links of a node: host to device, disk to host, shared storage to node.
pub(crate) const BUS: usize = 0;
pub(crate) const DISK_READ: usize = 1;
pub(crate) const NETWORK: usize = 2;
/// The storage's own link, which all nodes share.
pub(crate) const STORE: usize = 3;

/// A step on a node.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) program: u32,
    pub(crate) step: u32,
    pub(crate) node: u32,
    /// Blocks of the prompt, then of the answer.
    pub(crate) path: Vec<u32>,
    pub(crate) ids: Vec<KnownId>,
    /// Blocks of the prompt.
    pub(crate) prompt: usize,
    /// Leading blocks that are not computed.
    pub(crate) hits: usize,
    pub(crate) arrived: Instant,
    pub(crate) admitted: Instant,
    pub(crate) began: Instant,
    /// Blocks that were not on the device when it came.
    pub(crate) wanted: usize,
    /// Loads it waits for.
    pub(crate) loads: u32,
}

/// Bytes under way to a node.
#[derive(Debug, Default)]
pub(crate) struct Load {
    pub(crate) node: u32,
    /// Links that still carry it.
    pub(crate) links: u8,
    pub(crate) ids: Vec<KnownId>,
    pub(crate) waiters: Vec<u32>,
    /// The lane it is prefetched for.
    pub(crate) lane: Option<u64>,
}

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) engine: Engine,
    pub(crate) cache: Cache,
    pub(crate) links: [Link; 3],
    pub(crate) waiting: Vec<(Rank, u32)>,
    /// Blocks that those who wait bring.
    pub(crate) waiting_blocks: usize,
    pub(crate) proactive: Proactive,
    /// What was prefetched for a lane, in use in host until it is used there.
    pub(crate) pins: FxHashMap<u64, Vec<KnownId>>,
    /// Blocks under way, and by which load.
    pub(crate) under_way: FxHashMap<KnownId, u32>,
    /// Seconds a step holds its memory, lately.
    pub(crate) service: f64,
    /// Steps here, waiting or running.
    pub(crate) steps: u32,
    pub(crate) proactive_wakes: Option<Instant>,
    /// When the next event of its engine is scheduled.
    pub(crate) engine_wakes: Option<Instant>,
}

/// Share of host memory that may hold what nobody asked for yet.
const SPECULATIVE_SHARE: f64 = 0.5;

impl Node {
    pub(crate) fn new(config: &Config, how: &Decisions) -> Self {
        let block_bytes = config.block_bytes();
        let budget = (config.capacity[HOST] as f64 * SPECULATIVE_SHARE) * block_bytes as f64;
        let link = |gb: f64, micros| Link::new(gb * 1e9, Duration::from_micros(micros));
        Self {
            engine: Engine::new(config.cost, None),
            cache: Cache::new(config.capacity, how.order, (block_bytes, config.disk_write_gb * 1e9)),
            links: [link(config.bus_gb, 50), link(config.disk_gb, 200), link(config.network_gb, 1000)],
            waiting: Vec::new(),
            waiting_blocks: 0,
            proactive: Proactive::new(ProactiveConfig {
                budget_bytes: u64::from(super::dist::whole(budget / 1e6)) * 1_000_000,
                patience: Duration::from_secs(10),
            }),
            pins: FxHashMap::default(),
            under_way: FxHashMap::default(),
            service: 5.0,
            steps: 0,
            proactive_wakes: None,
            engine_wakes: None,
        }
    }

    /// Where blocks are that a step would read here: on the device, in host, on disk.
    pub(crate) fn found(&self, path: &[u32], shared: impl Fn(u32) -> bool) -> ([usize; 4], usize) {
        let mut found = [0_usize; 4];
        for (at, block) in path.iter().enumerate() {
            match self.cache.tier(*block) {
                Some(tier @ (DEVICE | HOST | DISK)) => found[tier] += 1,
                _ if shared(*block) => found[3] += 1,
                _ => return (found, at),
            }
        }
        (found, path.len())
    }
}
