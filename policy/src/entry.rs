//! One shard of one block in the catalog.

use kvtier_types::{BlockKey, Instant, Location, SemanticType, Tier};

use crate::catalog::BlockId;
use crate::directory::Tiers;
use crate::evict::{SegmentId, Standing};
use crate::frame::FrameRef;

/// States of an entry that a bit can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Flags(u32);

impl Flags {
    /// Its frame is being written; nobody sees it yet.
    pub(crate) const RESERVED: u32 = 1;
    /// Evicted by verb while in use: hidden, and dropped when the last use ends.
    pub(crate) const DOOMED: u32 = 1 << 1;
    /// A movement from the host frame to the disk is under way.
    pub(crate) const TO_DISK: u32 = 1 << 2;
    /// A movement from the host frame to the object store is under way.
    pub(crate) const TO_OBJECT: u32 = 1 << 3;
    /// A movement into a host frame is under way.
    pub(crate) const TO_HOST: u32 = 1 << 4;
    /// It waits in the queue of offloads.
    pub(crate) const QUEUED: u32 = 1 << 5;
    /// Useless without its ancestors.
    pub(crate) const NEEDS_ANCESTORS: u32 = 1 << 6;
    /// Offered to the host pool's ranking.
    pub(crate) const RANKED_HOST: u32 = 1 << 7;
    /// Offered to the disk's ranking.
    pub(crate) const RANKED_DISK: u32 = 1 << 8;
    /// Offered to the object store's ranking.
    pub(crate) const RANKED_OBJECT: u32 = 1 << 9;
    /// Its record is being rewritten elsewhere on the disk.
    pub(crate) const RELOCATING: u32 = 1 << 10;
    /// What was last published of it is not what is: it waits to be published.
    pub(crate) const DIRTY: u32 = 1 << 11;
    /// Nothing of it is here, but somebody else is said to have it and a reader wants it.
    pub(crate) const REMOTE: u32 = 1 << 12;
    /// A copy of another node's block: whoever sealed it looks after further copies.
    pub(crate) const FETCHED: u32 = 1 << 13;
    /// It was read at least once since it came.
    pub(crate) const READ: u32 = 1 << 14;
    /// Somebody used it who did not say who he is: no program's end frees it.
    pub(crate) const COMMON: u32 = 1 << 17;
    /// A claim is on it.
    pub(crate) const CLAIMED: u32 = 1 << 19;
    /// The host pool's ranking has heard of it.
    pub(crate) const KNOWN_HOST: u32 = 1 << 20;
    /// The disk's ranking has.
    pub(crate) const KNOWN_DISK: u32 = 1 << 21;
    /// The object store's ranking has.
    pub(crate) const KNOWN_OBJECT: u32 = 1 << 22;
    /// Only programs that ended, or whose context was rewritten, held it: it goes first.
    pub(crate) const FADED: u32 = 1 << 18;

    /// Another node had this copy made ahead of its use, and nobody read it here yet.
    pub(crate) const SPREAD: u32 = 1 << 23;

    /// It has a copy in the memory of a device.
    pub(crate) const ON_DEVICE: u32 = 1 << 24;
    /// A movement from the host frame to a device is under way.
    pub(crate) const TO_DEVICE: u32 = 1 << 25;
    /// It waits to be copied to a device.
    pub(crate) const FOR_DEVICE: u32 = 1 << 26;

    /// Its copies in slower tiers could not be read a moment ago.
    pub(crate) const UNREAD: u32 = 1 << 27;

    /// It waits in the queue of copies on other nodes.
    pub(crate) const REPLICATE: u32 = 1 << 15;
    /// Its time ends earlier than its records say.
    pub(crate) const ENDS_EARLIER: u32 = 1 << 16;

    pub(crate) const fn has(self, bits: u32) -> bool {
        self.0 & bits != 0
    }

    pub(crate) const fn set(&mut self, bits: u32, on: bool) {
        if on { self.0 |= bits } else { self.0 &= !bits }
    }

    pub(crate) const fn known(tier: Tier) -> u32 {
        match tier {
            Tier::Device | Tier::Host => Self::KNOWN_HOST,
            Tier::Disk => Self::KNOWN_DISK,
            Tier::Object => Self::KNOWN_OBJECT,
        }
    }

    /// Offered to any tier's ranking.
    pub(crate) const RANKED: u32 = Self::RANKED_HOST | Self::RANKED_DISK | Self::RANKED_OBJECT;

    pub(crate) const fn ranked(tier: Tier) -> u32 {
        match tier {
            Tier::Device | Tier::Host => Self::RANKED_HOST,
            Tier::Disk => Self::RANKED_DISK,
            Tier::Object => Self::RANKED_OBJECT,
        }
    }
}

/// The time that does not come.
pub(crate) const NEVER: Instant = Instant::from_nanos(u64::MAX);

/// A set of tiers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Kept(u8);

impl Kept {
    /// Those of the four tiers that `pick` picks.
    pub(crate) fn of(pick: impl Fn(Tier) -> bool) -> Self {
        Tier::ALL.into_iter().filter(|t| pick(*t)).fold(Self::default(), Self::with)
    }

    /// The same with `tier`.
    #[must_use]
    pub(crate) const fn with(self, tier: Tier) -> Self {
        Self(self.0 | 1 << tier.index())
    }

    /// The tiers of either.
    #[must_use]
    pub(crate) const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) const fn has(self, tier: Tier) -> bool {
        self.0 & (1 << tier.index()) != 0
    }
}

/// One shard of one block. A few hundred million tokens make a million of these: mind its size.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) key: BlockKey,
    pub(crate) checksum: u64,
    /// Of the latest record written for it; what an eviction by verb must outlive.
    pub(crate) sequence: u64,
    pub(crate) touched: u64,
    pub(crate) host: Option<FrameRef>,
    pub(crate) disk: Option<Location>,
    pub(crate) object: Option<Location>,
    pub(crate) parent: Option<BlockId>,
    /// Children resident in host memory, on disk, in the object store.
    pub(crate) children: [u32; 3],
    /// Entries that name this one as their parent: it stays as long as they do.
    pub(crate) links: u32,
    /// Tips of holders at and below it.
    pub(crate) held: u32,
    pub(crate) scope: u32,
    pub(crate) program: u32,
    /// Number of its taints in the catalog.
    pub(crate) taints: u32,
    /// Number of its lifecycle in the catalog: what the rules say of it.
    pub(crate) life: u32,
    /// When it is gone, [`NEVER`] for most.
    pub(crate) expires: Instant,
    /// The engine that reserved it.
    pub(crate) engine: u32,
    pub(crate) bytes: u32,
    pub(crate) depth_blocks: u32,
    /// What it was last used with.
    pub(crate) segment: SegmentId,
    pub(crate) leases: u32,
    pub(crate) layout: u16,
    pub(crate) shard: u16,
    pub(crate) group: u16,
    pub(crate) flags: Flags,
    pub(crate) semantic: SemanticType,
    /// Tiers whose copy claims keep from going to make room.
    pub(crate) kept: Kept,
    /// Those whose copy taints and rules keep.
    pub(crate) stays: Kept,
    pub(crate) standing: Standing,
    /// What was last published of it: tiers in the low four bits, the edition's low bits in the others.
    pub(crate) published: u16,
}

/// Index of a tier among those that count children.
pub(crate) const fn child_index(tier: Tier) -> usize {
    match tier {
        Tier::Device | Tier::Host => 0,
        Tier::Disk => 1,
        Tier::Object => 2,
    }
}

impl Entry {
    /// An entry without copies, tree or history. Scope and program are counted by the caller; it has no taints.
    pub(crate) fn bare(
        key: BlockKey,
        (layout, shard): (u16, u16),
        group: u16,
        bytes: u32,
        (scope, program, flags): (u32, u32, Flags),
    ) -> Self {
        Self {
            key,
            checksum: 0,
            sequence: 0,
            touched: 0,
            host: None,
            disk: None,
            object: None,
            parent: None,
            children: [0; 3],
            links: 0,
            held: 0,
            scope,
            program,
            taints: 0,
            life: 0,
            expires: NEVER,
            engine: 0,
            bytes,
            depth_blocks: 0,
            segment: SegmentId::NONE,
            leases: 0,
            layout,
            shard,
            group,
            flags,
            semantic: SemanticType::default(),
            kept: Kept::default(),
            stays: Kept::default(),
            standing: Standing::default(),
            published: 0,
        }
    }

    pub(crate) const fn resident(&self, tier: Tier) -> bool {
        match tier {
            Tier::Device => self.flags.has(Flags::ON_DEVICE),
            Tier::Host => self.host.is_some() && !self.flags.has(Flags::RESERVED),
            Tier::Disk => self.disk.is_some(),
            Tier::Object => self.object.is_some(),
        }
    }

    /// The tiers whose copies others may be told of.
    pub(crate) fn tiers(&self) -> Tiers {
        if self.flags.has(Flags::RESERVED | Flags::DOOMED) {
            return Tiers::NONE;
        }
        Tier::ALL.into_iter().filter(|t| self.resident(*t)).fold(Tiers::NONE, Tiers::with)
    }

    /// Whether a reader may be promised it: it is here, or somebody else is said to have it.
    pub(crate) fn offered(&self) -> bool {
        self.readable() || (self.flags.has(Flags::REMOTE) && !self.flags.has(Flags::RESERVED | Flags::DOOMED))
    }

    /// Whether a reader may be told that it is here.
    pub(crate) fn visible(&self) -> bool {
        !self.flags.has(Flags::RESERVED | Flags::DOOMED) && Tier::ALL.into_iter().any(|t| self.resident(t))
    }

    /// Whether it is here and can be read as far as is known.
    pub(crate) fn readable(&self) -> bool {
        let at_hand = self.resident(Tier::Host) || self.resident(Tier::Device);
        self.visible() && (at_hand || !self.flags.has(Flags::UNREAD))
    }

    /// The fastest tier that has it.
    pub(crate) fn fastest(&self) -> Option<Tier> {
        Tier::ALL.into_iter().find(|t| self.resident(*t))
    }

    /// Whether something is copying it or holds it.
    pub(crate) const fn in_use(&self) -> bool {
        let moving =
            Flags::TO_DISK | Flags::TO_OBJECT | Flags::TO_HOST | Flags::TO_DEVICE | Flags::RELOCATING | Flags::RESERVED;
        self.leases > 0 || self.flags.has(moving)
    }

    /// Whether its copy in `tier` may go to make room.
    pub(crate) const fn evictable(&self, tier: Tier) -> bool {
        // What is missing of a prefix on a device comes from host memory: its copies there go in any order.
        let blocked_by_child = !matches!(tier, Tier::Device)
            && self.children[child_index(tier)] > 0
            && self.flags.has(Flags::NEEDS_ANCESTORS);
        let busy = match tier {
            Tier::Device | Tier::Host => self.in_use(),
            // A read in flight holds its segment or pack itself.
            Tier::Disk => self.flags.has(Flags::TO_DISK | Flags::RELOCATING | Flags::TO_HOST),
            Tier::Object => self.flags.has(Flags::TO_OBJECT | Flags::TO_HOST),
        };
        self.resident(tier) && !busy && !blocked_by_child && !self.keeps(tier)
    }

    /// Whether its copy in `tier` does not go to make room, whoever says so.
    pub(crate) const fn keeps(&self, tier: Tier) -> bool {
        self.kept.has(tier) || self.stays.has(tier)
    }
}
