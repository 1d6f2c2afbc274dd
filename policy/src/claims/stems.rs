//! Blocks that branches of a fork are about to read: held softly until every branch has called, and lost with the process.

use kvtier_types::BlockKey;
use rustc_hash::FxHashMap;

/// Blocks held for branches at once, those of several stems counted for each: beyond, stems are held as far as they reach.
pub const MAX_STEM_BLOCKS: usize = 1 << 16;
/// Their priority among soft claims: what somebody asked to retain outright may have a higher one.
pub(super) const STEM_PRIORITY: u8 = 90;

/// How many stems hold a block.
#[derive(Debug, Default)]
pub(crate) struct Stems {
    blocks: FxHashMap<BlockKey, u32>,
    /// The sum of these.
    held: usize,
}

impl Stems {
    /// Holds a block once more. Answers whether there was room.
    pub(crate) fn hold(&mut self, key: BlockKey) -> bool {
        if self.held >= MAX_STEM_BLOCKS {
            return false;
        }
        *self.blocks.entry(key).or_default() += 1;
        self.held += 1;
        true
    }

    /// Holds a block once less. Answers whether nobody holds it now.
    pub(crate) fn let_go(&mut self, key: &BlockKey) -> bool {
        let Some(count) = self.blocks.get_mut(key) else { return false };
        *count -= 1;
        self.held -= 1;
        *count == 0 && self.blocks.remove(key).is_some()
    }

    pub(super) fn priority(&self, key: &BlockKey) -> Option<u8> {
        self.blocks.contains_key(key).then_some(STEM_PRIORITY)
    }

    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }
}
