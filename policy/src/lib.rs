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
mod census;
mod claims;
mod core;
pub mod directory;
mod entry;
mod events;
pub mod evict;
mod frame;
mod ghost;
mod holders;
mod intern;
mod lease;
mod ledger;
mod members;
pub mod peer;
pub mod programs;

pub mod limits;
mod pools;
mod publication;
mod rules;

pub use attachment::{AttachSpec, AttachmentId, AttachmentInfo, Role};
pub use catalog::{BlockId, Scope, Source, SpreadCounts};
pub use claims::{ClaimsConfig, MAX_CLAIMS_PER_BLOCK, MAX_HINTED, MAX_REMEMBERED, MAX_STEM_BLOCKS, TierBudget};
pub use core::{
    Action, AnswerFrame, BlockPlace, BlockView, ClaimAnswer, ClaimCounts, ClaimRequest, ClaimView, Claiming,
    ContextTips, Core, CoreConfig, CoreError, Counts, Due, EvictPlan, Explained, ExportError, ExportRequest, Exported,
    ExtentWalk, FetchConfig, FetchEnd, Freed, GuardEvent, HolderRecord, Holdings, KnownSpace, ListFilter, LoadReport,
    LoadResult, Located, Look, LookupAnswer, LookupRange, LookupRequest, MAX_CHILDREN_PER_SIGNAL, MAX_CLAIMS_PAGE,
    MAX_EXPORT_TTL, MAX_PROGRAMS_PAGE, Mark, MarkChange, MarkPlan, MarkSweep, MoveEnd, MoveId, MovePlan, MoveStep,
    Moved, ProgramCounts, ProgramEvent, ProgramPage, ProgramTurn, ProgramView, Publish, RangeAnswer, Reclaimed,
    ReleaseReport, ReplicaView, Reservation, ReserveRequest, SealOutcome, SealRequest, Signal, SignalAnswer,
    SignalKind, Signaling, Survey, TaintPattern, TierUse, Unclaiming, WriteBehind, prompt_blocks, prompt_keys,
};
pub use events::{Event, EventKind, MAX_EVENTS, MAX_EVENTS_PAGE};
pub use evict::{EvictionConfig, Standing};
pub use frame::{Allocation, FramePool, FrameRef, TwinPool};
pub use holders::{HolderKind, HolderName, HolderState, MAX_HOLDERS};
pub use lease::LeaseId;
pub use ledger::{Ledger, MissReason};
pub use members::{Member, Members, WARM_UP};
pub use pools::COMMON_PRIORITY;
pub use publication::{PublicationCounts, Verdict};
