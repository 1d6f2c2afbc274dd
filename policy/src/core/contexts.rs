//! Contexts as whoever places steps sees them: which blocks the latest call of a program ended with, in which layout, and
//! which copies of them are here. In slices: no call touches more than
//! [`MAX_TOUCHES_PER_CALL`](crate::limits::MAX_TOUCHES_PER_CALL) blocks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kvtier_types::{BlockKey, Instant, Layout, LayoutId, Origin, ShardKey};

use super::Core;
use crate::directory::Tiers;
use crate::entry::Entry;
use crate::holders::HolderName;
use crate::limits::MAX_TOUCHES_PER_CALL;
use crate::programs::LoadRates;

/// What a load takes beside its bytes, by [`Origin::index`]: nothing from memory, a read's way from disk, two calls for a
/// store, one export and one read for a peer.
const LATENCY: [Duration; Origin::ALL.len()] =
    [Duration::ZERO, Duration::ZERO, Duration::from_micros(200), Duration::from_millis(30), Duration::from_millis(2)];

/// A block and its place in its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockPlace {
    /// The block.
    pub key: BlockKey,
    /// The layout in which it is known here.
    pub layout: LayoutId,
    /// Index of its group in the layout.
    pub group: u16,
    /// Blocks before it in its prefix.
    pub block: u32,
}

/// Where the latest call of a program or session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextTips {
    /// One block of each group, each the last.
    pub tips: Vec<ShardKey>,
    /// How long ago it called an engine here; `None` when it did not since the start, and only copies of its blocks came.
    pub called: Option<Duration>,
}

impl Core {
    /// Where the latest context of a program or session ends, in the layout in which it is longest. `None` when this node
    /// does not know it, or nothing of its context is left.
    #[must_use]
    pub fn context_tips(&self, now: Instant, name: &HolderName) -> Option<ContextTips> {
        let holder = self.catalog.holders.get(self.catalog.holders.find(name)?);
        let mut layouts: BTreeMap<u16, (u32, BTreeMap<u16, &Entry>)> = BTreeMap::new();
        for entry in holder.context.iter().map(|id| self.catalog.get(*id)) {
            let (longest, groups) = layouts.entry(entry.layout).or_default();
            *longest = (*longest).max(entry.depth_blocks);
            let tip = groups.entry(entry.group).or_insert(entry);
            if tip.depth_blocks < entry.depth_blocks {
                *tip = entry;
            }
        }
        let (_, groups) = layouts.into_values().max_by_key(|(longest, _)| *longest)?;
        Some(ContextTips {
            tips: groups.values().map(|tip| self.shard_key(tip)).collect(),
            called: holder.called.map(|at| now.since(at)),
        })
    }

    /// A block and those before it, the last first, at most [`MAX_TOUCHES_PER_CALL`]; and where to go on.
    #[must_use]
    pub fn context_above(&self, from: &ShardKey) -> (Vec<BlockPlace>, Option<ShardKey>) {
        let Some(id) = self.catalog.find_shard(from) else { return (Vec::new(), None) };
        let mut path = std::iter::successors(Some(id), |id| self.catalog.get(*id).parent);
        let above = path.by_ref().take(MAX_TOUCHES_PER_CALL).map(|id| self.block_place(self.catalog.get(id))).collect();
        (above, path.next().map(|id| self.shard_key(self.catalog.get(id))))
    }

    /// What is known here of the place of each block, at most [`MAX_TOUCHES_PER_CALL`] of them.
    #[must_use]
    pub fn block_places(&self, keys: &[BlockKey]) -> Vec<Option<BlockPlace>> {
        let keys = &keys[..keys.len().min(MAX_TOUCHES_PER_CALL)];
        // Whichever shard is here, it has the block's place.
        let place = |key: &BlockKey| {
            let shards = (0..).zip(self.catalog.shapes()).flat_map(|(layout, (_, n))| (0..n).map(move |s| (layout, s)));
            shards
                .into_iter()
                .find_map(|(layout, shard)| self.catalog.find(key, layout, shard))
                .map(|id| self.catalog.get(id))
        };
        keys.iter().map(|key| place(key).map(|entry| self.block_place(entry))).collect()
    }

    /// The tiers in which each shard lies here, at most [`MAX_TOUCHES_PER_CALL`] of them.
    #[must_use]
    pub fn tiers_of(&self, keys: &[ShardKey]) -> Vec<Tiers> {
        let keys = &keys[..keys.len().min(MAX_TOUCHES_PER_CALL)];
        keys.iter()
            .map(|key| self.catalog.find_shard(key).map_or(Tiers::NONE, |id| self.catalog.get(id).tiers()))
            .collect()
    }

    /// A layout that an engine was attached with lately; the latest one when none is named.
    #[must_use]
    pub fn known_layout(&self, id: Option<&LayoutId>) -> Option<(LayoutId, Arc<Layout>)> {
        self.spaces.layout(id)
    }

    /// What loads from each place took lately, of this node; from others' disks and packs they take about as long.
    #[must_use]
    pub const fn load_rates(&self) -> LoadRates {
        LoadRates { nanos_per_byte: self.costs.loads(), latency: LATENCY }
    }

    fn block_place(&self, entry: &Entry) -> BlockPlace {
        let layout = *self.catalog.layout_id(entry.layout);
        BlockPlace { key: entry.key, layout, group: entry.group, block: entry.depth_blocks }
    }
}

#[cfg(test)]
mod tests {
    use kvtier_types::{BlockHints, RequestHints, TenantId, Tier};

    use super::super::tests::{Bench, NOW, key};
    use super::super::{LookupRange, LookupRequest};
    use super::*;

    #[test]
    fn a_context_is_walked_from_its_end_to_its_beginning() {
        let mut bench = Bench::new(8, false);
        bench.write(&[1, 2, 3]);
        let name = HolderName::program(&TenantId::shared(), "p");
        assert_eq!(bench.core.context_tips(NOW, &name), None);
        let hints = RequestHints {
            block: BlockHints { program_id: "p".into(), ..BlockHints::default() },
            ..RequestHints::default()
        };
        let range = LookupRange { group: 0, first_block: 0, keys: [1, 2].map(key).to_vec() };
        let request = LookupRequest {
            attachment: bench.who,
            request_id: "r".into(),
            ranges: vec![range],
            local_tokens: 0,
            tenant: TenantId::shared(),
            hints,
        };
        bench.core.lookup(NOW, request).unwrap();
        let later = NOW + Duration::from_secs(3);
        let context = bench.core.context_tips(later, &name).unwrap();
        assert_eq!((context.tips.len(), context.called), (1, Some(Duration::from_secs(3))));
        let (above, more) = bench.core.context_above(&context.tips[0]);
        let places: Vec<_> = above.iter().map(|place| (place.key, place.group, place.block)).collect();
        assert_eq!((places, more), (vec![(key(2), 0, 1), (key(1), 0, 0)], None));
        assert_eq!(
            bench.core.block_places(&[key(3), key(9)]),
            [Some(BlockPlace { key: key(3), block: 2, ..above[0] }), None]
        );
        let shard = |n| ShardKey { block: key(n), layout: above[0].layout, shard: 0 };
        assert_eq!(bench.core.tiers_of(&[shard(3), shard(9)]), [Tiers::NONE.with(Tier::Host), Tiers::NONE]);
        let (layout, _) = bench.core.known_layout(None).unwrap();
        assert_eq!(layout, above[0].layout);
        assert!(bench.core.known_layout(Some(&LayoutId::new([9; 32]))).is_none());
    }
}
