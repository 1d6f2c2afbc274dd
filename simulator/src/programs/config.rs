//! What all policies of a run have in common: engines, tiers, links.

use super::cache::TIERS;
use super::cost::Cost;

/// A cluster.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Config {
    pub(crate) cost: Cost,
    pub(crate) nodes: u32,
    pub(crate) block_tokens: u32,
    /// Blocks of each tier of a node.
    pub(crate) capacity: [usize; TIERS],
    /// Blocks of the storage that nodes share.
    pub(crate) store_blocks: usize,
    /// Gigabytes per second: host to device, disk, network of a node, shared storage of all nodes.
    pub(crate) bus_gb: f64,
    pub(crate) disk_gb: f64,
    pub(crate) disk_write_gb: f64,
    pub(crate) network_gb: f64,
    pub(crate) store_gb: f64,
    /// Programs at once where they are a population; 0: they come when they come.
    pub(crate) population: u32,
    pub(crate) seed: u64,
}

impl Config {
    pub(crate) const fn block_bytes(&self) -> u64 {
        self.cost.kv_bytes_per_token * self.block_tokens as u64
    }
}
