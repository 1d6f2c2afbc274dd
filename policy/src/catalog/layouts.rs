//! The layouts whose blocks are known, by number.

use kvtier_types::{GroupSpec, Layout, LayoutId, ShardKey};

use super::{BlockId, Catalog};

impl Catalog {
    /// Number of a layout, `None` when there are too many.
    pub(crate) fn layout(&mut self, layout: &LayoutId) -> Option<u16> {
        if let Some(at) = self.layouts.iter().position(|l| l == layout) {
            return u16::try_from(at).ok();
        }
        let number = u16::try_from(self.layouts.len()).ok()?;
        self.layouts.push(*layout);
        self.shards.push(0);
        Some(number)
    }

    /// Takes note of how many tokens the blocks of a layout's groups have.
    pub(crate) fn note_block_tokens(&mut self, layout: u16, groups: &[GroupSpec]) {
        for (group, spec) in (0..).zip(groups) {
            self.block_tokens.insert((layout, group), spec.block_tokens);
        }
    }

    /// Tokens of a block, `None` while no engine was attached with its layout.
    pub(crate) fn block_tokens(&self, layout: u16, group: u16) -> Option<u32> {
        self.block_tokens.get(&(layout, group)).copied()
    }

    /// Number of a layout seen before.
    pub(crate) fn find_layout(&self, layout: &LayoutId) -> Option<u16> {
        self.layouts.iter().position(|l| l == layout).and_then(|at| u16::try_from(at).ok())
    }

    pub(crate) fn find_shard(&self, key: &ShardKey) -> Option<BlockId> {
        self.find(&key.block, self.find_layout(&key.layout)?, key.shard)
    }

    /// Takes note of how many shards blocks of a layout have.
    pub(crate) fn note_shards(&mut self, layout: u16, shards: u16) {
        let known = &mut self.shards[usize::from(layout)];
        *known = (*known).max(shards).min(Layout::MAX_SHARDS);
    }

    /// The layouts seen so far, each with the shards that its blocks had.
    pub(crate) fn shapes(&self) -> impl Iterator<Item = (&LayoutId, u16)> {
        self.layouts.iter().zip(self.shards.iter().copied())
    }

    pub(crate) fn layouts(&self) -> &[LayoutId] {
        &self.layouts
    }

    pub(crate) fn layout_id(&self, number: u16) -> &LayoutId {
        &self.layouts[usize::from(number)]
    }
}
