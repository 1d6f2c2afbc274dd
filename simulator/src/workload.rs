//! Engines: they look prompts up, load and check what is offered, compute and seal the rest, and sometimes die.

use std::time::Duration;

use kvtier_policy::directory::{DirectoryKey, Replica};
use kvtier_policy::{
    AnswerFrame, AttachmentId, FrameRef, LeaseId, LoadReport, LoadResult, Located, Look, LookupAnswer, LookupRange,
    LookupRequest, ReleaseReport, Reservation, ReserveRequest, SealRequest,
};
use kvtier_types::{BlockKey, Instant, RequestHints, ShardKey, TenantId};

use crate::checkers::Grant;
use crate::events::Duty;
use crate::memory::{checksum, words_of};
use crate::network::{Ask, Message, Party};
use crate::node::{CALL_TIMEOUT, Locating, Pending};
use crate::prompts::TOKENS;
use crate::world::World;

/// How long a lookup may take.
const LOOKUP_DEADLINE: Duration = Duration::from_millis(1200);
/// Engines of a node.
const ENGINES: usize = 2;
/// Shards of a node that ask for care elsewhere at once.
const ADOPTED: usize = 12;

/// An engine's process.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) attachment: AttachmentId,
    silent: bool,
}

/// A request of an engine.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) attachment: AttachmentId,
    keys: Vec<BlockKey>,
    pub(crate) deadline: Instant,
    pub(crate) lease: Option<LeaseId>,
    answer: Option<LookupAnswer>,
    /// What the engine loads, and until when it may.
    pub(crate) loading: Option<Grant>,
    loaded: u32,
    lost: u32,
    written: Vec<(ShardKey, FrameRef, u64)>,
}

impl World {
    pub(crate) fn attach_engines(&mut self, n: usize) {
        let now = self.now;
        while self.live(n).engines.len() < ENGINES {
            let id = self.take_id();
            let spec = self.prompts.spec(format!("engine-{id}"));
            match self.live(n).core.attach(now, spec) {
                Ok(attachment) => self.live(n).engines.push(Engine { attachment, silent: false }),
                Err(error) => {
                    self.fail("bounded", format_args!("node {n} refuses an engine: {error}"));
                    return;
                }
            }
        }
    }

    pub(crate) fn engines_beat(&mut self, n: usize) {
        let now = self.now;
        let live = self.live(n);
        let mut refused = 0;
        for engine in live.engines.iter().filter(|e| !e.silent) {
            refused += usize::from(live.core.heartbeat(now, engine.attachment).is_err());
        }
        for _ in 0..refused {
            self.stats.count("engines", "told to attach again");
        }
        self.schedule(n, Duration::from_millis(900), Duty::EngineBeat);
    }

    pub(crate) fn engines_reaped(&mut self, n: usize, reaped: &[AttachmentId]) {
        let live = self.live(n);
        live.engines.retain(|e| !reaped.contains(&e.attachment));
        live.requests.retain(|_, r| !reaped.contains(&r.attachment));
        self.attach_engines(n);
    }

    pub(crate) fn engine_acts(&mut self, n: usize) {
        if self.now >= self.ends || self.steps_left == 0 {
            return;
        }
        self.steps_left -= 1;
        let nodes = self.nodes.len() as u64;
        let next = self.rng.micros(500, 48_000 * nodes);
        self.schedule(n, next, Duty::Engine);
        let engine = self.rng.index(ENGINES);
        match self.rng.below(1000) {
            0..8 => {
                let attachment = self.live(n).engines[engine].attachment;
                self.stats.count("engines", "detached");
                self.live(n).core.detach(attachment);
                self.engines_reaped(n, &[attachment]);
            }
            8..14 => {
                self.stats.count("engines", "fell silent");
                self.live(n).engines[engine].silent = true;
            }
            14..40 => self.evict_some(n),
            40..50 => self.drain(n),
            _ => self.ask_prompt(n, engine),
        }
    }

    fn evict_some(&mut self, n: usize) {
        self.stats.count("operations", "evict");
        let keys = self.prompts.pick(&mut self.rng);
        self.evict(n, &keys[keys.len() / 2..]);
    }

    pub(crate) fn evict(&mut self, n: usize, keys: &[BlockKey]) {
        let plan = self.live(n).core.plan_evict(keys, &[]);
        self.nodes[n].journal.extend(plan.journal);
        self.live(n).core.apply_evict(keys, &[]);
    }

    /// A node gives a part of what only it has to another.
    fn drain(&mut self, n: usize) {
        self.stats.count("operations", "drain");
        let (now, from) = (self.now, self.nodes[n].number);
        let live = self.live(n);
        live.draining = !live.draining;
        let (metas, _) = live.core.holdings(0, ADOPTED, true);
        let to = live.core.members().roomiest(now, &[]).map(|(number, _)| number);
        let incarnation = live.life;
        if let Some(to) = to.and_then(|number| self.numbers.get(&number)).copied() {
            self.send(Party::Node(n), Party::Node(to), Message::Adopt { from, incarnation, metas });
        }
    }

    fn ask_prompt(&mut self, n: usize, engine: usize) {
        self.stats.count("operations", "lookup");
        let keys = self.prompts.pick(&mut self.rng);
        let attachment = self.live(n).engines[engine].attachment;
        let id = self.take_id();
        let request = Request {
            attachment,
            keys,
            deadline: self.now + LOOKUP_DEADLINE,
            lease: None,
            answer: None,
            loading: None,
            loaded: 0,
            lost: 0,
            written: Vec::new(),
        };
        let asked = lookup_of(id, &request);
        self.live(n).requests.insert(id, request);
        self.schedule(n, LOOKUP_DEADLINE, Duty::Deadline { request: id });
        match self.live(n).core.look_whole(&asked) {
            Err(_) => {
                self.stats.count("engines", "told to attach again");
                self.live(n).requests.remove(&id);
            }
            Ok(look) if look.unknown().is_empty() => self.located(n, id, (&look, &Located::default())),
            Ok(look) => self.locate_part(n, Locating { request: id, look, part: 0, answers: true }),
        }
    }

    /// Asks the directory for the next part of a lookup's shards.
    fn locate_part(&mut self, n: usize, locating: Locating) {
        if !locating.answers {
            return self.located_part(n, locating, &[]);
        }
        let digests = locating.keys().iter().map(DirectoryKey::of).collect();
        self.call(n, Ask::Locate(digests), Pending::Locate(locating));
    }

    /// The directory said where the shards of a part are, or nothing in time. If they can be had and there are more, these are
    /// fetched and the next are asked for, as the daemon does.
    pub(crate) fn located_part(&mut self, n: usize, mut locating: Locating, replicas: &[Vec<Replica>]) {
        let (now, id) = (self.now, locating.request);
        let Some(request) = self.live(n).requests.get(&id) else { return };
        let asked = lookup_of(id, request);
        // Another answer may come too late for what follows it.
        let no_time = now + 2 * CALL_TIMEOUT > request.deadline;
        let keys = locating.keys();
        let floor = self.floor_of(n, keys);
        let live = self.live(n);
        let located = live.core.located(now, keys, replicas, &floor);
        let look = &locating.look;
        let mut begin = || live.core.begin_part(now, &asked, (look, locating.range(), &located)).unwrap_or(false);
        if no_time || locating.is_last() || located.is_empty() || !begin() {
            return self.located(n, id, (look, &located));
        }
        self.stats.count("operations", "lookup begun");
        locating.part += 1;
        self.locate_part(n, locating);
    }

    /// Whether other nodes' packs have shards.
    fn floor_of(&self, n: usize, keys: &[ShardKey]) -> Vec<bool> {
        let away = self.store.away;
        keys.iter().map(|key| !away && self.store.of_others(n, key).is_some()).collect()
    }

    /// As much of a lookup's shards was located as will be.
    fn located(&mut self, n: usize, id: u64, (look, located): (&Look, &Located)) {
        let now = self.now;
        let Some(request) = self.live(n).requests.get(&id) else { return };
        let asked = lookup_of(id, request);
        let live = self.live(n);
        match live.core.lookup_located(now, asked, (look, located)) {
            Ok(lease) => {
                if let Some(request) = live.requests.get_mut(&id) {
                    request.lease = Some(lease);
                }
            }
            Err(_) => {
                live.requests.remove(&id);
            }
        }
    }

    /// Answers lookups that wait for nothing more. Answers whether there were any.
    pub(crate) fn run_lookups(&mut self, n: usize) -> bool {
        let live = self.live(n);
        let waits_no_more = |lease: LeaseId| live.core.waiting(lease).is_ok_and(|waiting| waiting == 0);
        let open = live.requests.iter().filter(|(_, r)| r.answer.is_none());
        let ready: Vec<u64> = open.filter(|(_, r)| r.lease.is_some_and(waits_no_more)).map(|(id, _)| *id).collect();
        for id in &ready {
            self.collect(n, *id);
        }
        !ready.is_empty()
    }

    pub(crate) fn deadline(&mut self, n: usize, id: u64) {
        let Some(request) = self.live(n).requests.get(&id) else { return };
        match (request.lease, &request.answer) {
            (Some(_), None) => {
                self.stats.count("lookups", "at their deadline");
                self.collect(n, id);
            }
            (None, _) => {
                self.fail("every-operation-ends", format_args!("lookup {id} is not even leased at its deadline"))
            }
            (Some(_), Some(_)) => {}
        }
    }

    fn collect(&mut self, n: usize, id: u64) {
        let now = self.now;
        let live = self.live(n);
        let Some(request) = live.requests.get_mut(&id) else { return };
        let Some(lease) = request.lease else { return };
        let Ok(answer) = live.core.collect(lease) else {
            // The lease ran out with its attachment.
            live.requests.remove(&id);
            return;
        };
        let frames = answer.ranges[0].frames.iter().map(|f| f.frame).collect();
        request.loading = Some(Grant { frames, until: now + Duration::from_millis(2500) });
        request.answer = Some(answer);
        let takes = if self.rng.chance(50) { self.rng.millis(100, 1500) } else { self.rng.millis(1, 30) };
        self.schedule(n, takes, Duty::Loaded { request: id });
    }

    /// The engine copied and checked what it was offered; then it computes and writes the rest.
    pub(crate) fn loaded(&mut self, n: usize, id: u64) {
        let shards = usize::from(self.prompts.shards());
        let Some(request) = self.live(n).requests.get_mut(&id) else { return };
        let (keys, attachment) = (request.keys.clone(), request.attachment);
        request.loading = None;
        let frames = request.answer.as_ref().map(|a| a.ranges[0].frames.clone()).unwrap_or_default();
        let mut reports = Vec::with_capacity(frames.len());
        let (mut loaded, mut offered) = (0, 0);
        for (key, of_block) in keys.iter().zip(frames.chunks(shards)) {
            let mut good = true;
            for (shard, frame) in (0..).zip(of_block) {
                let result = self.load(n, &self.prompts.shard_key(*key, shard), frame);
                good &= result == LoadResult::Loaded;
                reports.push(LoadReport {
                    key: *key,
                    shard,
                    source: frame.source,
                    generation: frame.frame.generation,
                    result,
                });
            }
            offered += 1;
            loaded += u32::from(good && loaded + 1 == offered);
        }
        let reported = self.live(n).core.report_loads(attachment, &id.to_string(), &reports).is_ok();
        if let Some(request) = self.live(n).requests.get_mut(&id) {
            (request.loaded, request.lost) = (loaded, offered - loaded);
        }
        let takes = if reported { self.reserve_rest(n, id) } else { Duration::ZERO };
        self.schedule(n, takes, Duty::Computed { request: id });
    }

    fn load(&mut self, n: usize, key: &ShardKey, frame: &AnswerFrame) -> LoadResult {
        let memory = self.live(n).pool.lock();
        let (words, holds) = (memory.read(frame.frame), memory.holds(frame.frame));
        drop(memory);
        let result = match (holds, checksum(&words) == frame.checksum) {
            (false, _) => LoadResult::Lost,
            (true, false) => LoadResult::Corrupt,
            (true, true) => LoadResult::Loaded,
        };
        self.stats.count("loads", if result == LoadResult::Loaded { frame.source.name() } else { "failed" });
        if result == LoadResult::Loaded && !self.sealings.is_one_of(key, &words) {
            self.fail("no-wrong-bytes", format_args!("node {n} loaded bytes that were never sealed under {key:?}"));
        }
        result
    }

    /// Reserves what was not offered and begins to write it. Answers how long that takes.
    fn reserve_rest(&mut self, n: usize, id: u64) -> Duration {
        let now = self.now;
        let Some(request) = self.live(n).requests.get(&id) else { return Duration::ZERO };
        let first = (request.loaded + request.lost) as usize;
        let (attachment, keys) = (request.attachment, request.keys.clone());
        let reserve = ReserveRequest {
            attachment,
            parent: first.checked_sub(1).map(|at| keys[at]),
            group: 0,
            first_block: request.loaded + request.lost,
            keys: keys[first..].to_vec(),
            tenant: TenantId::shared(),
            hints: RequestHints::default(),
        };
        let Ok(answers) = self.live(n).core.reserve(now, &reserve) else { return Duration::ZERO };
        let mut written = Vec::new();
        for (key, answer) in keys[first..].iter().zip(answers) {
            let Reservation::Granted(frames) = answer else { continue };
            for (shard, frame) in (0..).zip(frames) {
                let sealing = self.sealings.take();
                let mut words = words_of(sealing);
                // Half of it for now.
                words[3] = self.live(n).pool.lock().read(frame)[3];
                self.live(n).pool.lock().write(frame, &words);
                written.push((self.prompts.shard_key(*key, shard), frame, sealing));
            }
        }
        if let Some(request) = self.live(n).requests.get_mut(&id) {
            request.written = written;
        }
        // Some engines stall for longer than reservations last.
        if self.rng.chance(6) { self.rng.millis(1900, 3000) } else { self.rng.millis(1, 60) }
    }

    /// The engine finished writing: it seals, and lets the request go.
    pub(crate) fn computed(&mut self, n: usize, id: u64) {
        let Some(request) = self.live(n).requests.remove(&id) else { return };
        let abandons = self.rng.chance(20);
        let mut seals = Vec::with_capacity(request.written.len());
        for (key, frame, sealing) in &request.written {
            let words = words_of(*sealing);
            // A writer that stalled does not know that the frame is somebody else's by now.
            self.live(n).pool.lock().write_anyway(*frame, &words);
            let sum = checksum(&words);
            seals.push(SealRequest {
                key: key.block,
                shard: key.shard,
                frame: *frame,
                checksum: sum,
                abandoned: abandons,
            });
            if !abandons {
                self.sealings.sealed(*key, *sealing);
            }
        }
        let sealed = self.live(n).core.seal(request.attachment, &seals);
        for outcome in sealed.unwrap_or_default() {
            self.stats.count("seals", seal_name(outcome));
        }
        let claimed_tokens = (request.loaded + request.lost) * TOKENS;
        let report = ReleaseReport { local_tokens: 0, claimed_tokens, lost_tokens: request.lost * TOKENS };
        self.live(n).core.release(request.attachment, &id.to_string(), report);
    }
}

const fn seal_name(outcome: kvtier_policy::SealOutcome) -> &'static str {
    match outcome {
        kvtier_policy::SealOutcome::Applied => "applied",
        kvtier_policy::SealOutcome::Duplicate => "duplicate",
        kvtier_policy::SealOutcome::Missing => "missing",
        kvtier_policy::SealOutcome::Rejected => "rejected",
    }
}

fn lookup_of(id: u64, request: &Request) -> LookupRequest {
    LookupRequest {
        attachment: request.attachment,
        request_id: id.to_string(),
        ranges: vec![LookupRange { group: 0, first_block: 0, keys: request.keys.clone() }],
        local_tokens: 0,
        tenant: TenantId::shared(),
        hints: RequestHints::default(),
    }
}
