//! A segment: blocks that were used together, and so are likely to be used together again.

use std::time::Duration;

use kvtier_types::Instant;

use super::class::{Features, StopReason};

impl Default for SegmentId {
    fn default() -> Self {
        Self::NONE
    }
}

/// Number of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub(super) u32);

impl SegmentId {
    /// No segment: nothing is known of the block.
    pub const NONE: Self = Self(u32::MAX);

    pub(crate) const fn raw(self) -> u32 {
        self.0
    }

    pub(crate) const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }
}

/// What is known of a model call.
#[derive(Debug, Clone, Copy, Default)]
pub struct CallFacts {
    /// Names its program, if that is known. Never zero.
    pub program: Option<u64>,
    /// It is a sub-agent's.
    pub sub_agent: bool,
    /// Why it ended.
    pub stop: StopReason,
    /// When the program is said to come back.
    pub returns_in: Option<Duration>,
    /// The program's last call.
    pub last: bool,
    /// Blocks of its prompt.
    pub blocks: u32,
}

/// What a program waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pause {
    /// Why its call ended.
    pub stop: StopReason,
    /// When it is said to come back.
    pub returns_in: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    Open,
    Ended,
}

#[derive(Debug, Clone)]
pub(super) struct Segment {
    pub(super) generation: u32,
    pub(super) class: u8,
    pub(super) age: u8,
    pub(super) standing: Standing,
    pub(super) features: Features,
    pub(super) program: u64,
    pub(super) touched: Instant,
    /// Blocks in it, here or remembered.
    pub(super) blocks: u32,
    /// Blocks it had at most.
    pub(super) size: u32,
}

/// Something a ranking has to look at again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// A segment's class, age or standing.
    Place(SegmentId),
    /// The index of a class.
    Class(u8),
}

/// Where a segment stands: all of one cell have one value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cell {
    /// Class in bits 16 to 23, age in bits 8 to 15, standing in bit 0.
    pub(super) key: u32,
    /// Uses per second to be had.
    pub(super) value: f32,
}
