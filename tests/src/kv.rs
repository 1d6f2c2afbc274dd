//! A worker's fake KV tensors: for each group one piece of memory, layer after layer, each a row of blocks.
//!
//! Atomic words, since the connector's threads write here by address.

use std::sync::atomic::{AtomicU64, Ordering};

use kvtier_memory::plan::Region;

use crate::shape::{Group, Shape};

/// Bytes of a word.
const WORD: usize = 8;

/// KV memory of every group.
#[derive(Debug)]
pub struct Kv {
    groups: Vec<Tensor>,
}

#[derive(Debug)]
struct Tensor {
    words: Box<[AtomicU64]>,
    layers: usize,
    slots: usize,
    /// Words of one block in one layer.
    run: usize,
}

impl Kv {
    /// Memory for a shape.
    #[must_use]
    pub fn new(shape: &Shape) -> Self {
        Self { groups: shape.groups.iter().map(|g| Tensor::new(g, shape.slots)).collect() }
    }

    /// The regions to register, with their groups.
    #[must_use]
    pub fn regions(&self) -> Vec<(u32, Region)> {
        let numbered = self.groups.iter().zip(0_u32..);
        numbered.flat_map(|(t, group)| t.regions().into_iter().map(move |r| (group, r))).collect()
    }

    /// Writes a block.
    pub fn fill(&self, group: usize, slot: u32, bytes: &[u8]) {
        let tensor = &self.groups[group];
        for (word, chunk) in tensor.block(slot).zip(bytes.chunks_exact(WORD)) {
            word.store(u64::from_le_bytes(chunk.try_into().expect("chunks are words")), Ordering::Relaxed);
        }
    }

    /// Overwrites a block with what no prompt has.
    pub fn spoil(&self, group: usize, slot: u32) {
        self.groups[group].block(slot).for_each(|word| word.store(u64::MAX, Ordering::Relaxed));
    }

    /// Reads a block.
    #[must_use]
    pub fn read(&self, group: usize, slot: u32) -> Vec<u8> {
        self.groups[group].block(slot).flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect()
    }
}

impl Tensor {
    fn new(group: &Group, slots: u32) -> Self {
        let layers = group.layers as usize;
        let bytes = usize::try_from(group.block_bytes).expect("blocks fit in memory");
        assert!(bytes.is_multiple_of(layers * WORD), "runs are whole words");
        let (run, slots) = (bytes / layers / WORD, slots as usize);
        let words = (0..layers * slots * run).map(|_| AtomicU64::new(0)).collect();
        Self { words, layers, slots, run }
    }

    fn regions(&self) -> Vec<Region> {
        let base = self.words.as_ptr().expose_provenance();
        let region = |layer| Region {
            base: base + layer * self.slots * self.run * WORD,
            block_count: self.slots as u64,
            block_stride: (self.run * WORD) as u64,
            run_bytes: (self.run * WORD) as u64,
            span: (self.slots * self.run * WORD) as u64,
        };
        (0..self.layers).map(region).collect()
    }

    /// The words of a block in the order in which they lie in a frame.
    fn block(&self, slot: u32) -> impl Iterator<Item = &AtomicU64> {
        let slot = slot as usize;
        assert!(slot < self.slots, "the block is in memory");
        (0..self.layers).flat_map(move |layer| {
            let start = (layer * self.slots + slot) * self.run;
            &self.words[start..start + self.run]
        })
    }
}
