//! The policies that are compared: what each decides, and what it is told. Tiers, links and costs are the same for all.

use super::cache::Order;

/// What stands for the time of a block's last use, where the order is by key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    /// The time of the last use.
    LastUse,
    /// That, and a while more for a program that waits for a tool.
    Kept,
    /// Steps of its program until it is used again: those with more go first.
    Steps,
    /// The time of the next use, which is known.
    NextUse,
}

/// What programs tell of their future.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Told {
    /// Nothing.
    Nothing,
    /// Their graph, and durations whose logarithm is off by so much (standard deviation).
    Noisy(f64),
    /// Their graph, and durations ten times too long or too short.
    Tenfold,
    /// Everything.
    Exactly,
}

/// Who goes first of those that wait for an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// First come.
    First,
    /// Least attained service, with aging.
    Attained,
    /// Least that remains, then the critical path, with aging.
    Remaining,
}

/// A policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Decisions {
    pub(crate) name: &'static str,
    pub(crate) order: Order,
    pub(crate) key: Key,
    /// Blocks are written to, and read from, the storage that nodes share.
    pub(crate) shares: bool,
    /// Steps go where they cost least; else where their program is, unless that is busy.
    pub(crate) places: bool,
    pub(crate) turn: Turn,
    /// What loads slower than it computes is computed.
    pub(crate) splits: bool,
    /// State is brought before its program is back.
    pub(crate) prefetches: bool,
    pub(crate) told: Told,
    /// What no step will use again goes at once.
    pub(crate) frees: bool,
    /// A cache that costs nothing: what others are measured against.
    pub(crate) free_of_cost: bool,
}

/// What is compared with: LRU on every node.
const LRU: Decisions = Decisions {
    name: "lru",
    order: Order::Key,
    key: Key::LastUse,
    shares: false,
    places: false,
    turn: Turn::First,
    splits: false,
    prefetches: false,
    told: Told::Nothing,
    frees: false,
    free_of_cost: false,
};

const LRU_SHARED: Decisions = Decisions { name: "lru-shared", shares: true, ..LRU };

const KVTIER: Decisions = Decisions {
    name: "kvtier",
    order: Order::Survival,
    places: true,
    turn: Turn::Attained,
    splits: true,
    prefetches: true,
    ..LRU_SHARED
};

const HINTS: Decisions =
    Decisions { name: "kvtier-hints", turn: Turn::Remaining, told: Told::Noisy(0.5), frees: true, ..KVTIER };

impl Decisions {
    /// All, in the order of reports.
    pub(crate) const ALL: [Self; 9] = [
        LRU,
        LRU_SHARED,
        Self { name: "s3fifo", order: Order::S3Fifo, ..LRU_SHARED },
        Self { name: "ttl", key: Key::Kept, ..LRU_SHARED },
        Self { name: "steps", key: Key::Steps, told: Told::Noisy(0.5), ..LRU_SHARED },
        KVTIER,
        HINTS,
        Self { name: "kvtier-noisy-hints", told: Told::Tenfold, ..HINTS },
        Self { name: "oracle", order: Order::Key, key: Key::NextUse, told: Told::Exactly, ..HINTS },
    ];

    /// What a cache without bounds and costs would do.
    pub(crate) const FREE: Self = Self { name: "free", free_of_cost: true, ..LRU };
}
