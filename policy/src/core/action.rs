//! What the core asks the shell to do.

use kvtier_types::{Expect, Instant, Location, RecordMeta, ShardKey, Tier};

#[cfg(doc)]
use super::Core;
use crate::catalog::Source;
use crate::frame::FrameRef;

/// Number of a movement, never reused within a run of the core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MoveId(pub(super) u64);

impl MoveId {
    /// A number of a test's choice.
    #[cfg(test)]
    pub(crate) const fn new(number: u64) -> Self {
        Self(number)
    }
}

/// What the shell shall do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Copy a host frame into a slower tier; report with [`Core::moved`].
    Offload {
        /// Names the movement.
        id: MoveId,
        /// Where to.
        to: Tier,
        /// What to write beside the bytes.
        meta: RecordMeta,
        /// Where the bytes are.
        frame: FrameRef,
    },
    /// Copy a record into a host frame; report with [`Core::moved`].
    Onboard {
        /// Names the movement.
        id: MoveId,
        /// The shard.
        key: ShardKey,
        /// Where from.
        from: Tier,
        /// Where it lies there.
        at: Location,
        /// What it must be.
        expect: Expect,
        /// Where to.
        into: FrameRef,
    },
    /// Copy a frame between host memory and a device, whichever way; report with [`Core::moved`].
    Copy {
        /// Names the movement.
        id: MoveId,
        /// The shard.
        key: ShardKey,
        /// What it must be.
        expect: Expect,
        /// Where the bytes are.
        from: FrameRef,
        /// Where to: one of both lies on a device.
        into: FrameRef,
    },
    /// Copy a shard from elsewhere into a host frame; report with [`Core::fetched`].
    Fetch {
        /// Names the movement.
        id: MoveId,
        /// The shard.
        key: ShardKey,
        /// Where from.
        from: Source,
        /// Where to.
        into: FrameRef,
        /// Its length.
        bytes: u64,
        /// When it is given up at the latest.
        deadline: Instant,
    },
    /// Nobody waits for a fetch any more: end it early. Its end need not be reported.
    CancelFetch {
        /// The movement.
        id: MoveId,
    },
    /// A record is dead.
    Forget {
        /// The tier.
        tier: Tier,
        /// Where it lies there.
        at: Location,
        /// Its payload's length.
        bytes: u64,
    },
}
