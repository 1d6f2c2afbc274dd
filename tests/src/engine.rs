//! An engine: a scheduler's session and a worker's for each shard, in this process, over fake KV memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvtier::Session;
use kvtier::frame::FrameRef;
use kvtier::jobs::JobPoll;
use kvtier::jobs::job::{Fate, Kind, Transfer};
use kvtier::link::LinkState;
use kvtier::lookup::answer::Hit;
use kvtier::lookup::table::Settlement;
use kvtier::lookup::{FramesPoll, HitPoll, Query};
use kvtier::reserve::Reserve;
use kvtier::reserve::table::TicketPoll;
use kvtier_types::GroupSpec;

use crate::daemon::{Daemon, SLACK};
use crate::kv::Kv;
use crate::shape::{Prompt, Shape, content};
use crate::wait::{until, within};

/// How long a lookup or a job may take by default.
const DEADLINE: Duration = Duration::from_secs(5);
/// Numbers engines of this process: every start has another id.
static ENGINES: AtomicU64 = AtomicU64::new(0);

/// What became of a put, in block shards of all groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Put {
    /// Blocks granted.
    pub granted: u32,
    /// Blocks that were there already.
    pub present: u32,
    /// Blocks refused for now.
    pub busy: u32,
    /// Shards copied into frames.
    pub saved: u32,
    /// Shards that could not be.
    pub lost: u32,
}

/// What became of a get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Got {
    /// The answer of the lookup.
    pub hit: Hit,
    /// Shards loaded, each verified against what was put.
    pub loaded: u32,
    /// Shards whose load was reported corrupt.
    pub corrupt: u32,
    /// Shards whose load was reported lost.
    pub lost: u32,
}

impl Got {
    /// Tokens answered, when all of them could be loaded.
    #[must_use]
    pub const fn whole(&self) -> Option<u32> {
        if self.corrupt == 0 && self.lost == 0 { Some(self.hit.tokens) } else { None }
    }
}

/// Which part of an answered request is loaded.
struct Asked<'a> {
    prompt: &'a Prompt,
    request_id: &'a str,
    group: usize,
    shard: u16,
}

/// One engine.
#[derive(Debug)]
pub struct Engine {
    shape: Shape,
    groups: Vec<GroupSpec>,
    scheduler: Session,
    workers: Vec<(Session, Kv)>,
    requests: AtomicU64,
    /// How long lookups and jobs may take.
    pub deadline: Duration,
    /// Cache salt of its requests.
    pub cache_salt: String,
    /// What the client of every request says, as JSON.
    pub hints: Bytes,
}

impl Engine {
    /// Opens the sessions and waits until they are attached.
    ///
    /// # Panics
    /// When that does not happen in time.
    #[must_use]
    pub fn attach(daemon: &Daemon, shape: &Shape) -> Self {
        let this = Self::open(&daemon.socket().to_string_lossy(), shape);
        this.wait_attached();
        this
    }

    /// Opens the sessions and waits for nothing.
    ///
    /// # Panics
    /// When threads cannot be had.
    #[must_use]
    pub fn open(socket: &str, shape: &Shape) -> Self {
        let id = format!("engine-{}-{}", std::process::id(), ENGINES.fetch_add(1, Ordering::Relaxed));
        let spec = shape.spec(socket, &id, "scheduler", 0);
        let groups = spec.layout.groups.clone();
        let scheduler = Session::open(spec).expect("a session");
        let worker = |shard| {
            let session = Session::open(shape.spec(socket, &id, "worker", shard)).expect("a session");
            let kv = Kv::new(shape);
            session.register_regions(&kv.regions()).expect("the regions fit the layout");
            (session, kv)
        };
        let workers = (0..shape.shards).map(worker).collect();
        Self {
            shape: shape.clone(),
            groups,
            scheduler,
            workers,
            requests: AtomicU64::new(0),
            deadline: DEADLINE,
            cache_salt: String::new(),
            hints: Bytes::new(),
        }
    }

    /// From now on its requests say this of themselves, as clients do in `kv_transfer_params`.
    pub fn says(&mut self, params: &serde_json::Value) {
        self.hints = serde_json::json!({"v": 1, "params": params}).to_string().into();
    }

    /// From now on its requests are of a program, started by a parent, and of a session; none where a name is empty.
    pub fn speak_for(&mut self, program: &str, parent: &str, session: &str) {
        let named = [("program_id", program), ("parent_program_id", parent), ("session_id", session)];
        let named = named.into_iter().filter(|(_, name)| !name.is_empty());
        self.says(
            &named.map(|(field, name)| (field.to_owned(), name.into())).collect::<serde_json::Map<_, _>>().into(),
        );
    }

    fn sessions(&self) -> impl Iterator<Item = &Session> {
        std::iter::once(&self.scheduler).chain(self.workers.iter().map(|(session, _)| session))
    }

    /// Whether all sessions are attached.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.sessions().all(|session| session.state().0 == LinkState::Attached)
    }

    /// Waits until all sessions are attached.
    pub fn wait_attached(&self) {
        until("the sessions to attach", || self.is_attached().then_some(()));
    }

    /// Waits until no session is.
    pub fn wait_detached(&self) {
        let gone = || self.sessions().all(|session| session.state().0 != LinkState::Attached);
        until("the sessions to notice that the daemon is gone", || gone().then_some(()));
    }

    /// States of the sessions, for messages.
    #[must_use]
    pub fn states(&self) -> Vec<(LinkState, String)> {
        self.sessions().map(Session::state).collect()
    }

    /// The scheduler's session.
    #[must_use]
    pub const fn scheduler(&self) -> &Session {
        &self.scheduler
    }

    /// A worker's session and memory.
    #[must_use]
    pub fn worker(&self, shard: u16) -> (&Session, &Kv) {
        let (session, kv) = &self.workers[usize::from(shard)];
        (session, kv)
    }

    /// Sum of a counter over the sessions.
    ///
    /// # Panics
    /// When there is no such counter.
    #[must_use]
    pub fn counter(&self, name: &str) -> u64 {
        let of = |session: &Session| {
            let json: serde_json::Value = serde_json::from_str(&session.counters()).expect("counters are JSON");
            json[name].as_u64().unwrap_or_else(|| panic!("a counter named {name}"))
        };
        self.sessions().map(of).sum()
    }

    /// Puts a prompt and waits until the daemon took all of it: busy blocks (the arena grows, another writes them) are
    /// tried again. `present` counts those of the first try.
    ///
    /// # Panics
    /// When any of it was not taken in time, or was refused for good.
    pub fn put_all(&self, prompt: &Prompt) -> Put {
        let applied = self.counter("seals_applied");
        let mut sum = self.put(prompt);
        until("room for all blocks", || {
            if sum.busy == 0 {
                return Some(());
            }
            let again = self.put(prompt);
            sum.granted += again.granted;
            sum.saved += again.saved;
            sum.lost += again.lost;
            sum.busy = again.busy;
            None
        });
        assert_eq!(sum.lost, 0, "{prompt:?} was not put as a whole: {sum:?}");
        let wanted = applied + u64::from(sum.saved);
        until("the seals", || (self.counter("seals_applied") >= wanted).then_some(()));
        sum
    }

    /// Puts a prompt: reserves, copies; the seals follow in the background.
    pub fn put(&self, prompt: &Prompt) -> Put {
        let mut put = Put::default();
        for group in 0..self.shape.groups.len() {
            self.put_group(prompt, group, &mut put);
        }
        put
    }

    fn put_group(&self, prompt: &Prompt, group: usize, put: &mut Put) {
        let hashes = prompt.block_hashes(self.shape.groups[group].block_tokens);
        let mut parent = None;
        for (chunk, first) in hashes.chunks(self.shape.slots as usize).zip((0..).step_by(self.shape.slots as usize)) {
            let number = u32::try_from(group).expect("few groups");
            let granted = self.reserve(number, first, chunk.to_vec(), parent);
            parent = chunk.last().copied();
            let Some((states, frames)) = granted else {
                put.busy += u32::try_from(chunk.len()).expect("few blocks");
                continue;
            };
            for state in states {
                match state {
                    1 => put.granted += 1,
                    2 => put.present += 1,
                    _ => put.busy += 1,
                }
            }
            for shard in 0..self.shape.shards {
                let (saved, lost) = self.save(group, shard, chunk, &frames);
                put.saved += saved;
                put.lost += lost;
            }
        }
    }

    /// Reserves blocks; `None` when the daemon did not answer in time, or is not there.
    ///
    /// # Panics
    /// When the ticket is not over in time.
    pub fn reserve(
        &self,
        group: u32,
        first_block: u32,
        hashes: Vec<kvtier_types::EngineHash>,
        parent: Option<kvtier_types::EngineHash>,
    ) -> Option<(Vec<u8>, Vec<Option<FrameRef>>)> {
        let room = hashes.len() * usize::from(self.shape.shards);
        let (cache_salt, hints) = (self.cache_salt.clone(), self.hints.clone());
        let reserve = Reserve { group, first_block, hashes, parent, cache_salt, hints };
        let ticket = self.scheduler.submit_reserve(reserve).expect("a valid reservation");
        let limit = Duration::from_millis(self.shape.call_timeout_ms.into()) + SLACK;
        let polled = within(limit, || match self.scheduler.poll_reserve(ticket, room).expect("room enough") {
            TicketPoll::Pending => None,
            TicketPoll::Unknown => Some(None),
            TicketPoll::Ready(grant) => Some(Some((grant.states, grant.frames))),
        });
        polled.unwrap_or_else(|| panic!("a reservation was pending beyond {limit:?}"))
    }

    fn save(
        &self,
        group: usize,
        shard: u16,
        hashes: &[kvtier_types::EngineHash],
        frames: &[Option<FrameRef>],
    ) -> (u32, u32) {
        let (session, kv) = self.worker(shard);
        let bytes = self.shape.groups[group].block_bytes;
        let number = u32::try_from(group).expect("few groups");
        let mut transfers = Vec::new();
        for ((hash, frames), slot) in hashes.iter().zip(frames.chunks(self.shape.shards.into())).zip(0..) {
            if let Some(frame) = frames[usize::from(shard)] {
                kv.fill(group, slot, &content(hash, number, shard, bytes));
                transfers.push(Transfer { frame, block_id: slot });
            }
        }
        if transfers.is_empty() {
            return (0, 0);
        }
        let fates = self.run_job(session, Kind::Save, transfers);
        let saved = fates.iter().filter(|fate| **fate == Fate::Done).count();
        let count = |n| u32::try_from(n).expect("few blocks");
        (count(saved), count(fates.len() - saved))
    }

    /// Submits a job and waits until it is over.
    ///
    /// # Panics
    /// When it is not over soon after its deadline.
    #[must_use]
    pub fn run_job(&self, session: &Session, kind: Kind, transfers: Vec<Transfer>) -> Vec<Fate> {
        let count = transfers.len();
        let job = session.submit_job(kind, transfers, (self.deadline, 0)).expect("a valid job");
        match session.wait_job(job, self.deadline + SLACK, count).expect("room enough") {
            JobPoll::Over(fates) => fates,
            other => panic!("a job of {count} transfers was {other:?} after {:?}", self.deadline + SLACK),
        }
    }

    /// Looks a prompt up; `Ok` holds the request, to be released, and the answer.
    ///
    /// # Panics
    /// When the lookup is not over soon after its deadline.
    #[must_use]
    pub fn lookup(&self, prompt: &Prompt) -> (String, Hit) {
        let request_id = format!("request-{}", self.requests.fetch_add(1, Ordering::Relaxed));
        let query = Query {
            request_id: request_id.clone(),
            hashes: prompt.hashes(),
            local_tokens: 0,
            cache_salt: self.cache_salt.clone(),
            hints: self.hints.clone(),
            deadline: self.deadline,
        };
        let began = Instant::now();
        self.scheduler.submit_lookup(query).expect("a valid lookup");
        let hit = within(self.deadline + SLACK, || match self.scheduler.poll_lookup(&request_id, 0, u32::MAX) {
            HitPoll::Pending => None,
            HitPoll::Ready(hit) => Some(hit),
            HitPoll::Unknown => panic!("the lookup of {request_id} is unknown"),
        });
        let hit = hit.unwrap_or_else(|| panic!("a lookup was pending for {:?}", began.elapsed()));
        (request_id, hit)
    }

    /// Ends a request.
    pub fn release(&self, request_id: &str, claimed_tokens: u32, lost_tokens: u32) {
        let settlement = Settlement { local_tokens: 0, claimed_tokens, lost_tokens };
        assert!(self.scheduler.release(request_id, settlement), "{request_id} is known");
    }

    /// Frames of the blocks of `group` that a hit of `tokens` needs, by shard.
    ///
    /// # Panics
    /// When the request is unknown, or the answer lacks a frame it promised.
    #[must_use]
    pub fn frames(&self, request_id: &str, group: usize, shard: u16, tokens: u32) -> Vec<(u32, FrameRef)> {
        let needed = self.groups[group].needed_blocks(tokens);
        let number = u32::try_from(group).expect("few groups");
        match self.scheduler.lookup_frames(request_id, (number, shard.into()), needed.clone()) {
            FramesPoll::Ready(frames) => {
                needed.zip(frames).filter_map(|(block, frame)| Some((block, frame?))).collect()
            }
            other => panic!("the frames of {request_id} are {other:?}"),
        }
    }

    /// Gets a prompt: looks up, loads what was found, and checks every byte that counts as loaded.
    ///
    /// # Panics
    /// When bytes differ from what was put, or something takes longer than it may.
    pub fn get(&self, prompt: &Prompt) -> Got {
        let (request_id, hit) = self.lookup(prompt);
        let mut got = Got { hit, ..Got::default() };
        for group in 0..self.shape.groups.len() {
            for shard in 0..self.shape.shards {
                let frames = self.frames(&request_id, group, shard, hit.tokens);
                let asked = Asked { prompt, request_id: &request_id, group, shard };
                for chunk in frames.chunks(self.shape.slots as usize) {
                    self.load(&asked, chunk, &mut got);
                }
            }
        }
        let lost = if got.whole().is_some() { 0 } else { hit.tokens };
        self.release(&request_id, hit.tokens, lost);
        got
    }

    fn load(&self, asked: &Asked<'_>, frames: &[(u32, FrameRef)], got: &mut Got) {
        let Asked { prompt, request_id, group, shard } = *asked;
        let (session, kv) = self.worker(shard);
        let spec = &self.shape.groups[group];
        let hashes = prompt.block_hashes(spec.block_tokens);
        let mut transfers = Vec::new();
        for ((_, frame), slot) in frames.iter().zip(0..) {
            kv.spoil(group, slot);
            transfers.push(Transfer { frame: *frame, block_id: slot });
        }
        if transfers.is_empty() {
            return;
        }
        let fates = self.run_job(session, Kind::Load { request_id: request_id.to_owned() }, transfers);
        for (((block, _), fate), slot) in frames.iter().zip(fates).zip(0..) {
            match fate {
                Fate::Done => {
                    let number = u32::try_from(group).expect("few groups");
                    let want = content(&hashes[*block as usize], number, shard, spec.block_bytes);
                    let same = kv.read(group, slot) == want;
                    assert!(same, "WRONG BYTES: {prompt:?} group {group} shard {shard} block {block}");
                    got.loaded += 1;
                }
                Fate::Corrupt => got.corrupt += 1,
                Fate::Open | Fate::Lost | Fate::Cancelled => got.lost += 1,
            }
        }
    }

    /// Closes the sessions as an engine that ends well does.
    pub fn close(self) {
        for session in self.sessions() {
            session.close(DEADLINE);
        }
    }
}
