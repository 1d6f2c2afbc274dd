//! One node's state and the only way to its core.

mod doors;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant as StdInstant};

use kvtier_memory::Arena;
use kvtier_policy::{Action, Core};
use kvtier_storage::BlockStore;
use kvtier_storage::disk::DiskStore;
use kvtier_storage::journal::Journal;
use kvtier_storage::object::ObjectStoreTier;
use kvtier_types::{Instant, Layout, Location, Tier};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ahead::Ahead;
use crate::cluster::Cluster;
use crate::config::{Config, Tenancy};
use crate::device::DeviceTier;
use crate::graphs;
use crate::hints::Hints;
use crate::operations::Operations;
use crate::rules::RulesFile;
use crate::services::Placements;
use crate::turns::Returns;
use doors::Door;
pub use doors::Token;

/// Layouts remembered to say which field differs.
const MAX_KNOWN_LAYOUTS: usize = 64;
/// Signals that are carried out at once: of those that come with requests, of those of calls, and of those of other nodes.
const MAX_SIGNALS: usize = 256;
/// Verbs that change what the journal has, carried out at once: of callers, and of other nodes.
const MAX_VERBS: usize = 256;

/// The stores below host memory.
#[derive(Debug, Default)]
pub struct Stores {
    /// The disk tier.
    pub disk: Option<Arc<DiskStore>>,
    /// The object tier.
    pub object: Option<Arc<ObjectStoreTier>>,
    /// Why a configured tier is absent.
    pub absent: BTreeMap<Tier, String>,
}

impl Stores {
    /// The store of a tier, `None` where there is none.
    #[must_use]
    pub fn get(&self, tier: Tier) -> Option<Arc<dyn BlockStore>> {
        match tier {
            Tier::Disk => self.disk.clone().map(|d| d as Arc<dyn BlockStore>),
            Tier::Object => self.object.clone().map(|o| o as Arc<dyn BlockStore>),
            Tier::Device | Tier::Host => None,
        }
    }

    /// A record is dead.
    pub fn forget(&self, tier: Tier, at: Location, bytes: u64) {
        if let Some(store) = self.get(tier) {
            store.forget(at, bytes);
        }
    }
}

/// Everything the services share.
pub struct Node {
    /// The configuration.
    pub config: Config,
    /// Host memory.
    pub arena: Arena,
    /// The device tier.
    pub(crate) devices: DeviceTier,
    /// The stores below it.
    pub stores: Stores,
    /// What must survive restarts.
    pub journal: Arc<Journal>,
    /// Number of this start, higher than any before.
    pub incarnation: u64,
    /// Notes of the start, for status.
    pub notes: Vec<String>,
    /// The cluster it is part of.
    pub cluster: Option<Arc<Cluster>>,
    /// Whose users and salts are whose.
    pub tenancy: Tenancy,
    /// Long work that verbs began.
    pub(crate) operations: Operations,
    /// What clients say with requests, and said ahead of them.
    pub hints: Hints,
    /// Woken when the arena wants an extent made ready.
    pub growth: Notify,
    /// Woken when an extent was made ready.
    pub grown: Notify,
    /// Woken when a movement ends.
    pub movement: Notify,
    /// Set once the node stops.
    pub stopping: CancellationToken,
    /// Every task the node started.
    pub tasks: TaskTracker,
    pub(crate) reclaiming: tokio::sync::Mutex<()>,
    /// Held by whoever changes claims, until the journal has it.
    pub(crate) claims_turn: tokio::sync::Mutex<()>,
    /// Held by whoever journals of programs, until it is durable.
    pub(crate) programs_turn: tokio::sync::Mutex<()>,
    /// What programs declared.
    pub(crate) graphs: graphs::Room,
    /// Woken when holders left something behind that is yet to be settled.
    pub(crate) left_behind: Notify,
    /// Woken when something happened that watchers may want to know.
    pub(crate) happened: Notify,
    /// Watchers there are.
    pub(crate) watchers: AtomicUsize,
    /// Held by whoever marks blocks, until the journal has it.
    pub(crate) marks_turn: tokio::sync::Mutex<()>,
    /// The rules file.
    pub(crate) rules: RulesFile,
    /// Signals that came with requests and are under way.
    pub(crate) signals: Arc<Semaphore>,
    /// Signals of calls that are under way, and those that other nodes passed on: these wait for nobody else.
    pub(crate) signal_calls: [Arc<Semaphore>; 2],
    /// Verbs that are carried out to their end, whoever gives up waiting: of callers, and of other nodes.
    pub(crate) verb_calls: [Arc<Semaphore>; 2],
    /// What is brought up before programs return.
    pub(crate) ahead: Ahead,
    /// Programs whose return watchers are told of.
    pub(crate) returns: Returns,
    /// Steps that were placed.
    pub(crate) placements: Placements,
    /// Times that room was made below for records that had been refused.
    pub(crate) rooms_made: AtomicU64,
    draining: AtomicBool,
    recovering: AtomicBool,
    peer_address: OnceLock<String>,
    core: Mutex<Core>,
    doors: Mutex<BTreeMap<Token, Door>>,
    layouts: Mutex<BTreeMap<String, Layout>>,
    origin: StdInstant,
    longest_hold_nanos: AtomicU64,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("node_id", &self.config.node_id).finish_non_exhaustive()
    }
}

/// What a node is made of.
#[derive(Debug)]
pub struct Parts {
    /// The configuration.
    pub config: Config,
    /// Host memory.
    pub arena: Arena,
    /// The device tier.
    pub(crate) devices: DeviceTier,
    /// The stores below it.
    pub stores: Stores,
    /// What must survive restarts.
    pub journal: Arc<Journal>,
    /// The core, recovered.
    pub core: Core,
    /// Number of this start.
    pub incarnation: u64,
    /// Notes of the start.
    pub notes: Vec<String>,
    /// The rules file; its rules are in force in the core.
    pub rules: RulesFile,
    /// When the core's time began.
    pub origin: StdInstant,
    /// The cluster it is part of.
    pub cluster: Option<Arc<Cluster>>,
    /// Whose users and salts are whose.
    pub tenancy: Tenancy,
}

impl Node {
    /// A node of these parts.
    #[must_use]
    pub fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self {
            ahead: Ahead::new(parts.config.prefetch_budget()),
            returns: Returns::default(),
            signals: Arc::new(Semaphore::new(MAX_SIGNALS)),
            signal_calls: [MAX_SIGNALS; 2].map(|most| Arc::new(Semaphore::new(most))),
            verb_calls: [MAX_VERBS; 2].map(|most| Arc::new(Semaphore::new(most))),
            hints: Hints::new(&parts.config.hints),
            config: parts.config,
            arena: parts.arena,
            devices: parts.devices,
            stores: parts.stores,
            journal: parts.journal,
            incarnation: parts.incarnation,
            notes: parts.notes,
            cluster: parts.cluster,
            tenancy: parts.tenancy,
            operations: Operations::default(),
            growth: Notify::new(),
            grown: Notify::new(),
            movement: Notify::new(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
            reclaiming: tokio::sync::Mutex::new(()),
            claims_turn: tokio::sync::Mutex::new(()),
            programs_turn: tokio::sync::Mutex::new(()),
            graphs: graphs::Room::default(),
            left_behind: Notify::new(),
            happened: Notify::new(),
            watchers: AtomicUsize::new(0),
            marks_turn: tokio::sync::Mutex::new(()),
            rules: parts.rules,
            placements: Placements::default(),
            rooms_made: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            recovering: AtomicBool::new(false),
            peer_address: OnceLock::new(),
            core: Mutex::new(parts.core),
            doors: Mutex::new(BTreeMap::new()),
            layouts: Mutex::new(BTreeMap::new()),
            origin: parts.origin,
            longest_hold_nanos: AtomicU64::new(0),
        })
    }

    /// The time as the core counts it.
    #[must_use]
    pub fn now(&self) -> Instant {
        Instant::from_nanos(u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Time since start.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Calls the core, then carries out what it wants done.
    pub fn with_core<R>(self: &Arc<Self>, call: impl FnOnce(&mut Core, Instant) -> R) -> R {
        let mut actions: Vec<Action> = Vec::new();
        let (unpublished, happened, left_behind);
        let result = {
            let mut core = self.core.lock();
            let held = StdInstant::now();
            let now = self.now();
            core.tell_time(now);
            let before = core.last_event();
            let result = call(&mut core, now);
            actions.extend(std::iter::from_fn(|| core.poll_action()));
            unpublished = !core.publication_settled();
            happened = core.last_event() != before;
            left_behind = core.has_left_holdings();
            self.note_hold(held);
            result
        };
        crate::mover::execute_all(self, actions);
        if happened {
            self.happened.notify_waiters();
        }
        if left_behind {
            self.left_behind.notify_one();
        }
        if let Some(cluster) = self.cluster.as_ref().filter(|_| unpublished) {
            cluster.publishing.notify_one();
        }
        if self.arena.needs_growth() {
            self.growth.notify_one();
        }
        result
    }

    /// Calls the core in steps until one says that it was the last. Between two of them others have their turn; whoever
    /// waits for this cannot give up in the midst of it.
    pub fn with_core_in_steps(self: &Arc<Self>, mut more: impl FnMut(&mut Core, Instant) -> bool) {
        while self.with_core(&mut more) {
            std::thread::yield_now();
        }
    }

    /// As [`Self::with_core`], from a thread outside the runtime.
    pub fn with_core_on<R>(
        self: &Arc<Self>,
        runtime: &tokio::runtime::Handle,
        call: impl FnOnce(&mut Core, Instant) -> R,
    ) -> R {
        let _inside = runtime.enter();
        self.with_core(call)
    }

    /// Reads the core; actions wait for the next call.
    pub fn read_core<R>(&self, read: impl FnOnce(&Core) -> R) -> R {
        let core = self.core.lock();
        let held = StdInstant::now();
        let result = read(&core);
        self.note_hold(held);
        result
    }

    /// Reads the core in steps until one says that it was the last. Between two of them others have their turn.
    ///
    /// # Errors
    /// The first of a step.
    pub fn read_core_in_steps<E>(&self, mut more: impl FnMut(&Core) -> Result<bool, E>) -> Result<(), E> {
        let mut core = self.core.lock();
        loop {
            let held = StdInstant::now();
            let more = more(&core)?;
            self.note_hold(held);
            if !more {
                return Ok(());
            }
            MutexGuard::bump(&mut core);
        }
    }

    fn note_hold(&self, since: StdInstant) {
        let nanos = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.longest_hold_nanos.fetch_max(nanos, Ordering::Relaxed);
    }

    /// Waits until `done` says so, asking again whenever a movement ends, or until the deadline.
    ///
    /// # Errors
    /// The first that `done` answers with.
    pub async fn wait_until<E>(
        &self,
        deadline: tokio::time::Instant,
        done: impl Fn(&Core) -> Result<bool, E>,
    ) -> Result<(), E> {
        loop {
            let moved = self.movement.notified();
            tokio::pin!(moved);
            // Before the look, so that no end in between is missed.
            moved.as_mut().enable();
            if self.read_core(&done)? || tokio::time::timeout_at(deadline, moved).await.is_err() {
                return Ok(());
            }
        }
    }

    /// The longest the core's lock was held, since the last call.
    pub fn take_longest_hold(&self) -> Duration {
        Duration::from_nanos(self.longest_hold_nanos.swap(0, Ordering::Relaxed))
    }

    /// Remembers a model's layout, and says how it differs from the one last seen.
    pub fn note_layout(&self, model: &str, layout: &Layout) -> Vec<String> {
        let mut known = self.layouts.lock();
        let differences = known.get(model).map(|old| layout.differences(old)).unwrap_or_default();
        if known.len() < MAX_KNOWN_LAYOUTS || known.contains_key(model) {
            known.insert(model.to_owned(), layout.clone());
        }
        differences
    }

    /// Whether there is an object store that does not lie in this node's own data directory: one that outlives the node.
    #[must_use]
    pub fn has_outer_store(&self) -> bool {
        self.config.object.url.is_some() && self.stores.get(Tier::Object).is_some()
    }

    /// Takes no more attachments or reservations from now on.
    pub fn start_draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Says whether a tier's records are still being read.
    pub fn set_recovering(&self, recovering: bool) {
        self.recovering.store(recovering, Ordering::Release);
    }

    /// Whether a tier's records are still being read: blocks may come in that were not there before.
    #[must_use]
    pub fn is_recovering(&self) -> bool {
        self.recovering.load(Ordering::Acquire)
    }

    /// Where peers reach this node's Peer service; unknown before it listens.
    #[must_use]
    pub fn peer_address(&self) -> Option<String> {
        self.peer_address.get().cloned()
    }

    /// Tells where the Peer service listens; the first word counts.
    pub fn set_peer_address(&self, address: String) {
        drop(self.peer_address.set(address));
    }

    /// Whether the node is on its way out.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
}
