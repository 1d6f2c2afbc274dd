//! The pure core of kvtier: which blocks there are, who uses them, what moves and what goes.
//!
//! A state machine in the style of sans-io protocol crates: the shell (daemon or simulator) calls [`Core`]'s methods
//! with the time, performs what [`Core::poll_action`] asks for on real or simulated tiers, and reports back. Bytes never
//! pass through it; ids, sizes and frame numbers do.
//!
//! *Invariants*
//! - No I/O, no clock, no randomness, no async, no hash maps with random order.
//! - A block is visible to lookups only once sealed, and only while every shard of it has a replica.
//! - No inner block of a prefix leaves a tier before its descendants (groups that need their ancestors).
//! - A leased block's frame is not given back, unless its bytes turned out to be wrong: then nobody should read on.
//!
//! *Bounds*: see the constants of [`limits`].
#![forbid(unsafe_code)]

mod attachment;
mod catalog;
mod core;
pub mod directory;
mod entry;
mod evict;
mod frame;
mod ghost;
mod intern;
mod lease;
mod ledger;
mod members;
pub mod peer;

pub mod limits;
mod pools;
mod publication;

pub use attachment::{AttachSpec, AttachmentId, AttachmentInfo, Role};
pub use catalog::{BlockId, Scope, Source};
pub use core::{
    Action, AnswerFrame, BlockView, Core, CoreConfig, CoreError, Counts, EvictPlan, ExportError, ExportRequest,
    Exported, FetchConfig, FetchEnd, LoadReport, LoadResult, Located, LookupAnswer, LookupRange, LookupRequest,
    MAX_EXPORT_TTL, MoveEnd, MoveId, Publish, RangeAnswer, Reclaimed, ReleaseReport, ReplicaView, Reservation,
    ReserveRequest, SealOutcome, SealRequest, TierUse, WriteBehind,
};
pub use evict::{LeafLru, Ranking};
pub use frame::{Allocation, FramePool, FrameRef, TwinPool};
pub use lease::LeaseId;
pub use ledger::{Ledger, MissReason};
pub use members::{Member, Members};
pub use publication::{PublicationCounts, Verdict};
