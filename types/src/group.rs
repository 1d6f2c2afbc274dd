//! KV cache groups: which blocks of a prefix a reader needs.
//!
//! A model's layers fall into groups that keep different amounts of the past: full attention needs every block, a
//! sliding window the last few, a state-space layer only the state at the end. A prefix of `n` tokens is a hit when
//! every needed block of every group is there.

use std::ops::Range;

use crate::key::{FieldHasher, GroupDigest};

/// How much of the past a group of layers needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// Every block from the first.
    Full,
    /// Blocks that touch the last `window_tokens` tokens, the next one included.
    SlidingWindow {
        /// Width of the window in tokens.
        window_tokens: u32,
    },
    /// Multi-head latent attention: every block, identical on all tensor-parallel ranks.
    Mla,
    /// Recurrent state: only the block that ends at the prefix's end.
    State,
}

impl GroupKind {
    /// The name used on the wire and in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::SlidingWindow { .. } => "sliding_window",
            Self::Mla => "mla",
            Self::State => "state",
        }
    }

    /// Window width in tokens, zero for kinds without one.
    #[must_use]
    pub const fn window_tokens(self) -> u32 {
        match self {
            Self::SlidingWindow { window_tokens } => window_tokens,
            Self::Full | Self::Mla | Self::State => 0,
        }
    }

    /// Whether a block is useless without every earlier one.
    #[must_use]
    pub const fn needs_ancestors(self) -> bool {
        matches!(self, Self::Full | Self::Mla)
    }
}

/// One group of layers that share block ids.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GroupSpec {
    /// How much of the past it needs.
    pub kind: GroupKind,
    /// Tokens in a block of this group; a positive multiple of the namespace's hash-block tokens.
    pub block_tokens: u32,
    /// Names of the layers, in the order in which their runs lie in a frame.
    pub layers: Vec<String>,
}

impl GroupSpec {
    /// Digest of every field.
    #[must_use]
    pub fn digest(&self) -> GroupDigest {
        let mut hasher = FieldHasher::new("kvtier group v1");
        hasher.text(self.kind.name());
        hasher.number(u64::from(self.kind.window_tokens()));
        hasher.number(u64::from(self.block_tokens));
        hasher.number(self.layers.len() as u64);
        for layer in &self.layers {
            hasher.text(layer);
        }
        GroupDigest::new(hasher.finish())
    }

    /// Indices of the blocks needed to continue after a prefix of `prefix_tokens`, a multiple of the block size.
    #[must_use]
    pub fn needed_blocks(&self, prefix_tokens: u32) -> Range<u32> {
        let end = prefix_tokens / self.block_tokens;
        let start = match self.kind {
            GroupKind::Full | GroupKind::Mla => 0,
            // The next token attends to the `window_tokens - 1` tokens before it.
            GroupKind::SlidingWindow { window_tokens } => {
                prefix_tokens.saturating_sub(window_tokens.saturating_sub(1)) / self.block_tokens
            }
            GroupKind::State => end.saturating_sub(1),
        };
        start.min(end)..end
    }
}

/// The longest usable prefix, in tokens, of at most `max_tokens`, given which blocks are `available(group, block)`.
///
/// Blocks before `local_tokens` count as available: the engine holds them already. Prefixes end where a block of every
/// group ends. Answers at least nothing: zero when no prefix longer than `local_tokens` is usable.
pub fn usable_prefix(
    groups: &[GroupSpec],
    local_tokens: u32,
    max_tokens: u32,
    mut available: impl FnMut(usize, u32) -> bool,
) -> u32 {
    let Some(step) = prefix_step(groups) else { return 0 };
    // Where the first gap of a group that needs its ancestors caps every longer prefix.
    let mut cap = max_tokens / step * step;
    for (index, group) in groups.iter().enumerate().filter(|(_, g)| g.kind.needs_ancestors()) {
        let first = local_tokens / group.block_tokens;
        let gap = (first..cap / group.block_tokens).find(|&block| !available(index, block));
        if let Some(block) = gap {
            cap = block * group.block_tokens / step * step;
        }
    }
    let mut end = cap;
    while end > local_tokens {
        let complete = groups.iter().enumerate().filter(|(_, g)| !g.kind.needs_ancestors()).all(|(index, group)| {
            group
                .needed_blocks(end)
                .all(|block| (block + 1) * group.block_tokens <= local_tokens || available(index, block))
        });
        if complete {
            return end;
        }
        end -= step;
    }
    0
}

/// Tokens between two possible ends of a prefix: the least common multiple of the groups' block sizes. `None` without
/// groups, or when a block size is zero or the multiple does not fit.
#[must_use]
pub fn prefix_step(groups: &[GroupSpec]) -> Option<u32> {
    let mut step: u32 = 1;
    if groups.is_empty() {
        return None;
    }
    for group in groups {
        if group.block_tokens == 0 {
            return None;
        }
        step = (step / gcd(step, group.block_tokens)).checked_mul(group.block_tokens)?;
    }
    Some(step)
}

const fn gcd(mut a: u32, mut b: u32) -> u32 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(kind: GroupKind, block_tokens: u32) -> GroupSpec {
        GroupSpec { kind, block_tokens, layers: vec!["l".into()] }
    }

    #[test]
    fn needed_blocks_by_kind() {
        let window = GroupKind::SlidingWindow { window_tokens: 5 };
        let cases = [
            (GroupKind::Full, 12, 0..3),
            (GroupKind::Mla, 8, 0..2),
            (GroupKind::State, 12, 2..3),
            (GroupKind::State, 0, 0..0),
            (window, 12, 2..3),
            (GroupKind::SlidingWindow { window_tokens: 6 }, 12, 1..3),
            (GroupKind::SlidingWindow { window_tokens: 100 }, 12, 0..3),
            (GroupKind::SlidingWindow { window_tokens: 1 }, 12, 3..3),
        ];
        for (kind, tokens, want) in cases {
            assert_eq!(group(kind, 4).needed_blocks(tokens), want, "{kind:?} {tokens}");
        }
    }

    #[test]
    fn full_attention_stops_at_the_first_gap() {
        let groups = [group(GroupKind::Full, 4)];
        assert_eq!(usable_prefix(&groups, 0, 40, |_, b| b != 5), 20);
        assert_eq!(usable_prefix(&groups, 0, 18, |_, _| true), 16);
        assert_eq!(usable_prefix(&groups, 0, 40, |_, b| b != 0), 0);
    }

    #[test]
    fn what_the_engine_holds_needs_no_copy_here() {
        let groups = [group(GroupKind::Full, 4)];
        assert_eq!(usable_prefix(&groups, 8, 40, |_, b| b >= 2), 40);
        assert_eq!(usable_prefix(&groups, 8, 40, |_, _| false), 0);
    }

    #[test]
    fn windows_need_only_their_end_and_fall_back_to_shorter_prefixes() {
        let groups = [group(GroupKind::Full, 4), group(GroupKind::SlidingWindow { window_tokens: 6 }, 4)];
        assert_eq!(usable_prefix(&groups, 0, 40, |g, b| g == 0 || b >= 8), 40);
        assert_eq!(usable_prefix(&groups, 0, 40, |g, b| g == 0 || (b != 9 && b != 7)), 28);
    }

    #[test]
    fn groups_of_different_block_sizes_meet_at_common_ends() {
        let groups = [group(GroupKind::Full, 4), group(GroupKind::State, 8)];
        assert_eq!(prefix_step(&groups), Some(8));
        assert_eq!(usable_prefix(&groups, 0, 44, |_, _| true), 40);
        assert_eq!(usable_prefix(&groups, 0, 44, |g, b| g == 0 || b == 1), 16);
        assert_eq!(prefix_step(&[group(GroupKind::Full, 0)]), None);
    }

    #[test]
    fn digest_sees_every_field() {
        let base = group(GroupKind::Full, 4);
        let mut renamed = base.clone();
        renamed.layers[0] = "m".into();
        let others = [
            group(GroupKind::Mla, 4),
            group(GroupKind::Full, 8),
            group(GroupKind::SlidingWindow { window_tokens: 4 }, 4),
            renamed,
        ];
        assert!(others.iter().all(|o| o.digest() != base.digest()));
    }
}
