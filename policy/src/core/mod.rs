//! [`Core`]: the state machine that composes catalog, leases, rankings, movement and ledger.
//!
//! *Use*: call a method with the time; perform every [`Action`] of [`Core::poll_action`]; report its end with
//! [`Core::moved`]; call [`Core::expire`] at [`Core::poll_timeout`].

mod abandon;
mod action;
mod answer;
mod begin;
mod budget;
mod calls;
mod claiming;
mod claims;
mod config;
mod contexts;
mod control;
mod costs;
mod counts;
mod device;
mod device_room;
mod error;
mod export;
mod forking;
mod holdings;
mod host_room;
mod lifetime;
mod look;
mod lookup;
mod marks;
mod movement;
mod moves;
mod program_page;
mod programs;
mod publish;
mod readers;
mod records;
mod remote;
mod replication;
mod session;
mod settle;
mod shared;
mod signals;
mod spaces;
mod standing;
mod turns;
mod unread;
mod write;

#[cfg(test)]
mod begin_tests;
#[cfg(test)]
mod cluster_tests;
#[cfg(test)]
mod device_tests;
#[cfg(test)]
mod host_room_tests;
#[cfg(test)]
mod marks_tests;
#[cfg(test)]
mod movement_tests;
#[cfg(test)]
mod program_steps_tests;
#[cfg(test)]
mod programs_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod unread_tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use kvtier_types::{BlockKey, ClaimName, Instant, Location, Origin, ShardKey, Tier};
use rustc_hash::FxHashMap;

pub use abandon::Freed;
pub use action::{Action, MoveId};
pub use answer::{AnswerFrame, LookupAnswer, RangeAnswer};
pub use calls::GuardEvent;
pub use claiming::{ClaimAnswer, ClaimRequest, Claiming, Survey, Unclaiming};
pub use claims::{ClaimCounts, ClaimView, MAX_CLAIMS_PAGE};
pub use config::{CoreConfig, WriteBehind};
pub use contexts::{BlockPlace, ContextTips};
pub use control::{BlockView, EvictPlan, ListFilter, ReplicaView, TierUse};
pub use counts::Counts;
pub use device_room::ExtentWalk;
pub use error::CoreError;
pub use export::{ExportError, ExportRequest, Exported, MAX_EXPORT_TTL};
pub use holdings::Holdings;
pub use lifetime::Explained;
pub use look::Look;
pub use lookup::{LookupRange, LookupRequest};
pub use marks::{Mark, MarkChange, MarkPlan, MarkSweep, TaintPattern};
pub use movement::{MovePlan, MoveStep, Moved};
pub use moves::MoveEnd;
pub use program_page::{MAX_PROGRAMS_PAGE, ProgramPage, ProgramView};
pub use programs::{HolderRecord, ProgramCounts, ProgramEvent};
pub use publish::{Located, Publish};
pub use records::Reclaimed;
pub use remote::{FetchConfig, FetchEnd};
pub use settle::{LoadReport, LoadResult, ReleaseReport};
pub use signals::{MAX_CHILDREN_PER_SIGNAL, Signal, SignalAnswer, SignalKind, Signaling};
pub use spaces::{KnownSpace, prompt_blocks, prompt_keys};
pub use turns::{Due, ProgramTurn};
pub use write::{Reservation, ReserveRequest, SealOutcome, SealRequest};

use self::budget::WriteBudget;
use self::calls::GuardQueue;
use self::costs::Costs;
use self::device::Devices;
use self::unread::Unread;
use crate::attachment::{Attachment, AttachmentId};
use crate::catalog::{BlockId, Catalog};
use crate::claims::Claims;
use crate::frame::{FramePool, FrameRef};
use crate::ghost::Ghost;
use crate::holders::Cancelled;
use crate::intern::Interner;
use crate::lease::{Lease, LeaseId};
use crate::ledger::Ledger;
use crate::limits::GHOST_KEYS;
use crate::members::Members;
use crate::pools::Pools;
use crate::programs::{Admission, AdmissionConfig, Hot};
use crate::rules::Rules;
use export::Hold;
use spaces::KnownSpaces;

/// What a movement does to the catalog when it ends.
#[derive(Debug, Clone, Copy)]
enum Movement {
    Offload { to: Tier, sequence: u64, from: FrameRef },
    Onboard { from: Tier, at: Location, into: FrameRef },
    Fetch { from: Origin, into: FrameRef, started: Instant },
    ToDevice { from: FrameRef, into: FrameRef },
    FromDevice { from: FrameRef, into: FrameRef },
}

/// Fetches under way.
#[derive(Debug, Default)]
struct Fetching {
    count: usize,
    bytes: u64,
}

/// How the advice on how many programs to have under way moves.
const ADMISSION: AdmissionConfig = AdmissionConfig { least: 8, every: Duration::from_secs(10) };
/// Programs that may be under way before anything was seen of them.
const ADMITTED_FIRST: u32 = 256;

/// A frame granted and not yet sealed.
#[derive(Debug, Clone, Copy)]
struct Reserved {
    engine: u32,
    expires: Instant,
}

/// The policy core of one node.
#[derive(Debug)]
pub struct Core {
    config: CoreConfig,
    catalog: Catalog,
    frames: Box<dyn FramePool>,
    /// Size classes that found no room in extents of others, and when.
    without_room: FxHashMap<u64, Instant>,
    attachments: BTreeMap<AttachmentId, Attachment>,
    engines: Interner<String>,
    reserved: BTreeMap<BlockId, Reserved>,
    leases: BTreeMap<LeaseId, Lease>,
    waiters: FxHashMap<BlockId, Vec<LeaseId>>,
    rules: Rules,
    /// Where the walk over all blocks goes on that another set of rules needs.
    walk: Option<u32>,
    marks: BTreeMap<BlockKey, Mark>,
    hot: Hot,
    admission: Admission,
    /// Blocks marked anew by engines, and not yet journaled.
    remarked: BTreeSet<BlockKey>,
    /// Of blocks whose time ended before their records say.
    expired_records: Vec<(ShardKey, u64)>,
    replications: VecDeque<BlockId>,
    epoch_ms: u64,
    exports: BTreeMap<LeaseId, Hold>,
    /// Bytes of copies on their way here ahead of their use.
    coming_ahead: u64,
    moves: BTreeMap<MoveId, (BlockId, Movement)>,
    offloads: VecDeque<(BlockId, Tier)>,
    onboards: VecDeque<BlockId>,
    fetches: VecDeque<BlockId>,
    claims: Claims,
    /// Blocks that claims want brought up.
    upholds: VecDeque<BlockId>,
    /// Those whose onboard failed: tried again at the next expiry.
    failed_upholds: Vec<BlockId>,
    expired_claims: Vec<ClaimName>,
    unread: Unread,
    claim_counts: ClaimCounts,
    devices: Devices,
    fetching: Fetching,
    members: Members,
    spaces: KnownSpaces,
    cancelled: Cancelled,
    program_counts: ProgramCounts,
    incarnation: u64,
    /// When it last went on under a later number.
    outlived: Option<Instant>,
    /// The time last told.
    clock: Instant,
    offloading: usize,
    onboarding: usize,
    actions: VecDeque<Action>,
    ghost: Ghost,
    guard: GuardQueue,
    disk_writes: WriteBudget,
    costs: Costs,
    /// What programs did that somebody may want to prepare for.
    program_events: VecDeque<ProgramEvent>,
    ledger: Ledger,
    counts: Counts,
    host_used_bytes: u64,
    /// Order of touches; each call that uses blocks takes one.
    tick: u64,
    next_sequence: u64,
    next_id: u64,
}

impl Core {
    /// A core over `frames`, with nothing in it.
    #[must_use]
    pub fn new(config: CoreConfig, frames: Box<dyn FramePool>, class_of: impl Fn(u64) -> u64 + Send + 'static) -> Self {
        let (eviction, disk_writes) = (config.eviction, WriteBudget::new(config.disk_write_rate));
        let mut capacities = eviction.capacity_bytes;
        capacities[Tier::Host.index()] = frames.capacity_bytes();
        let pools = Pools::new(
            Box::new(move |tier, blocks| eviction.ranking(tier, blocks)),
            Box::new(class_of),
            (capacities, eviction.policy),
        );
        let claims = Claims::new(config.claims, config.disk.then_some(Tier::Disk));
        Self {
            config,
            claims,
            upholds: VecDeque::new(),
            failed_upholds: Vec::new(),
            expired_claims: Vec::new(),
            unread: Unread::default(),
            claim_counts: ClaimCounts::default(),
            catalog: Catalog::new(pools),
            frames,
            without_room: FxHashMap::default(),
            attachments: BTreeMap::new(),
            engines: Interner::default(),
            reserved: BTreeMap::new(),
            leases: BTreeMap::new(),
            waiters: FxHashMap::default(),
            rules: Rules::default(),
            walk: None,
            marks: BTreeMap::new(),
            hot: Hot::default(),
            admission: Admission::new(ADMISSION, ADMITTED_FIRST),
            remarked: BTreeSet::new(),
            expired_records: Vec::new(),
            replications: VecDeque::new(),
            epoch_ms: 0,
            exports: BTreeMap::new(),
            coming_ahead: 0,
            moves: BTreeMap::new(),
            offloads: VecDeque::new(),
            onboards: VecDeque::new(),
            fetches: VecDeque::new(),
            devices: Devices::default(),
            fetching: Fetching::default(),
            members: Members::default(),
            spaces: KnownSpaces::default(),
            cancelled: Cancelled::default(),
            program_counts: ProgramCounts::default(),
            incarnation: 0,
            outlived: None,
            clock: Instant::ZERO,
            offloading: 0,
            onboarding: 0,
            actions: VecDeque::new(),
            ghost: Ghost::new(GHOST_KEYS),
            guard: GuardQueue::default(),
            disk_writes,
            costs: Costs::default(),
            program_events: VecDeque::new(),
            ledger: Ledger::default(),
            counts: Counts::default(),
            host_used_bytes: 0,
            tick: 0,
            next_sequence: 1,
            next_id: 1,
        }
    }

    /// Tells the core that a configured tier is not there after all: blocks go to the next one.
    pub fn without(&mut self, tier: Tier) {
        match tier {
            Tier::Device => self.devices.pools.iter_mut().for_each(|pool| pool.lost = true),
            Tier::Host => {}
            Tier::Disk => self.config.disk = false,
            Tier::Object => self.config.object = false,
        }
    }

    /// Tells the time, for what begins in calls that do not say it.
    pub fn tell_time(&mut self, now: Instant) {
        self.clock = self.clock.max(now);
    }

    /// The next thing to do, until there is none.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Self::expire`] wants to be called next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let leases = self.leases.values().map(|l| l.expires);
        let attachments = self.attachments.values().map(|a| a.seen + self.config.attachment_ttl);
        let reserved = self.reserved.values().map(|r| r.expires);
        let remote = self.next_export_timeout().into_iter().chain(self.next_fetch_timeout());
        let ends = self.claims.next_deadline().into_iter().chain(self.next_expiry()).chain(self.unread.next());
        leases.chain(attachments).chain(reserved).chain(remote).chain(ends).min()
    }

    /// The ledger so far.
    #[must_use]
    pub const fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Counts so far.
    #[must_use]
    pub const fn counts(&self) -> &Counts {
        &self.counts
    }

    const fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    const fn next_tick(&mut self) -> u64 {
        self.tick += 1;
        self.tick
    }

    /// Gives an entry's host frame back.
    fn drop_host(&mut self, id: BlockId) {
        let Some(frame) = self.catalog.get(id).host else { return };
        let bytes = u64::from(self.catalog.get(id).bytes);
        self.free_frame(frame, bytes);
        if self.catalog.update(id, |e| e.host = None) {
            self.uphold(id);
        }
    }

    fn free_frame(&mut self, frame: FrameRef, bytes: u64) {
        self.host_used_bytes -= self.frames.class(bytes);
        self.frames.free(frame, bytes);
    }

    /// Drops an entry's copy in one tier. The entry itself may go with it.
    fn drop_copy(&mut self, id: BlockId, tier: Tier) {
        let entry = self.catalog.get(id);
        let bytes = u64::from(entry.bytes);
        match tier {
            Tier::Device => self.drop_from_device(id),
            Tier::Host => self.drop_host(id),
            Tier::Disk => {
                if let Some(at) = entry.disk {
                    self.actions.push_back(Action::Forget { tier, at, bytes });
                    self.catalog.update(id, |e| e.disk = None);
                }
            }
            Tier::Object => {
                if let Some(at) = entry.object {
                    self.actions.push_back(Action::Forget { tier, at, bytes });
                    self.catalog.update(id, |e| e.object = None);
                }
            }
        }
    }

    /// Drops every copy of an entry.
    fn drop_all(&mut self, id: BlockId) {
        for tier in Tier::ALL {
            if self.catalog.try_get(id).is_some() {
                self.drop_copy(id, tier);
            }
        }
    }
}
