//! Verbs that wait for nodes that are away: in memory for sending, on disk for a restart of this node.
//!
//! ```text
//! <data_dir>/outbox/<number>.verb   PassedOn (prost) | CRC-64/NVME u64     deleted once its last node was told
//! <data_dir>/outbox/nodes           one node id a line: who is told, should it be away
//! ```
//! *Invariants*: what one node is told, it is told in the order in which it was said. A verb is on disk before anybody is
//! answered that it is deferred.
//! *Bounds*: [`MAX_WAITING`] verbs a node, [`MAX_BYTES`] for all nodes that are away and as much again for those that
//! answer, [`KEEP`] of age, [`MAX_NODES`] nodes. What does not fit is refused, and the caller told so: what waits for
//! nodes that are away takes no room from those that answer.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvtier_memory::checksum::checksum;
use kvtier_policy::limits::MAX_NODES;
use kvtier_proto::v1;
use kvtier_types::NodeId;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::oneshot;

use super::fanout::Verb;

/// Verbs that wait for one node.
pub(crate) const MAX_WAITING: usize = 4096;
/// Bytes of all verbs that wait for nodes that are away, each counted once.
pub(crate) const MAX_BYTES: usize = 64 << 20;
/// Bytes of all verbs that wait, those on their way to nodes that answer among them.
const MAX_BYTES_IN_ALL: usize = 2 * MAX_BYTES;
/// How long a verb waits, and a node that fell silent is remembered.
pub(crate) const KEEP: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why a verb is not for a node.
const TOO_MUCH: &str = "too much waits for this node already: repeat it once the node is back";
const NODES_FILE: &str = "nodes";
const SUFFIX: &str = ".verb";

/// A verb on its way to several nodes.
#[derive(Debug)]
pub(super) struct Letter {
    pub(super) number: u64,
    pub(super) verb: Verb,
    at_ms: u64,
    bytes: usize,
}

/// A verb in one node's queue.
#[derive(Debug)]
struct Waiting {
    letter: Arc<Letter>,
    waiter: Option<oneshot::Sender<v1::NodeOutcome>>,
    /// Whether the node was away since it was said.
    behind: bool,
}

/// How far a letter is.
#[derive(Debug, Default)]
struct Progress {
    nodes_left: usize,
    /// Those of them in whose queues it is behind.
    behind: usize,
    on_disk: bool,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    queues: BTreeMap<NodeId, VecDeque<Waiting>>,
    letters: BTreeMap<u64, Progress>,
    /// Of all letters.
    bytes: usize,
    /// Of those that are behind in some queue.
    behind_bytes: usize,
    sending: BTreeSet<NodeId>,
    /// Nodes that live, as heard last.
    living: BTreeSet<NodeId>,
    /// Nodes that something waits for and that could not be told when it was tried last.
    failing: BTreeSet<NodeId>,
    /// Nodes ever heard of, with the time in milliseconds since 1970.
    known: BTreeMap<NodeId, u64>,
    dropped: u64,
}

/// All that waits.
#[derive(Debug)]
pub(crate) struct Outbox {
    dir: PathBuf,
    state: Mutex<State>,
}

/// What a letter is queued for: the nodes that answer, later, and those it was refused for.
pub(super) struct Queued {
    pub(super) letter: Arc<Letter>,
    pub(super) answers: Vec<(NodeId, oneshot::Receiver<v1::NodeOutcome>)>,
    pub(super) refused: Vec<NodeId>,
}

impl Outbox {
    /// Opens the outbox of a data directory, with what waited when the last life of this node ended.
    ///
    /// # Errors
    /// When the directory cannot be had.
    pub(crate) fn open(data_dir: &Path) -> io::Result<Self> {
        let dir = data_dir.join("outbox");
        fs::create_dir_all(&dir)?;
        let mut state = State { next: 1, ..State::default() };
        let now = unix_ms();
        if let Ok(nodes) = fs::read_to_string(dir.join(NODES_FILE)) {
            state.known =
                nodes.lines().filter_map(|l| NodeId::new(l).ok()).take(MAX_NODES).map(|id| (id, now)).collect();
        }
        let mut files: Vec<(u64, PathBuf)> = fs::read_dir(&dir)?.filter_map(|e| numbered(&e.ok()?.path())).collect();
        files.sort_unstable();
        for (number, path) in files {
            state.next = state.next.max(number + 1);
            if !state.take_in(number, &path, now) {
                tracing::warn!(path = %path.display(), "dropped a verb for other nodes: too old, too much or damaged");
                fs::remove_file(&path)?;
            }
        }
        Ok(Self { dir, state: Mutex::new(state) })
    }

    /// Queues a verb for all nodes known but `own`.
    pub(super) fn queue(&self, own: &NodeId, verb: Verb) -> Queued {
        let bytes = v1::PassedOn { verb: Some(verb.clone()), ..Default::default() }.encoded_len();
        let mut state = self.state.lock();
        let letter = Arc::new(Letter { number: state.next, verb, at_ms: unix_ms(), bytes });
        state.next += 1;
        let (mut answers, mut refused, mut progress) = (Vec::new(), Vec::new(), Progress::default());
        let fits = state.bytes + bytes <= MAX_BYTES_IN_ALL;
        let fits_behind = fits && state.behind_bytes + bytes <= MAX_BYTES;
        let nodes: Vec<NodeId> = state.known.keys().filter(|id| *id != own).cloned().collect();
        for id in nodes {
            let behind = state.is_away(&id);
            let queue = state.queues.entry(id.clone()).or_default();
            let has_room = if behind { fits_behind } else { fits };
            if !has_room || queue.len() >= MAX_WAITING {
                refused.push(id);
                continue;
            }
            let (sender, receiver) = oneshot::channel();
            queue.push_back(Waiting { letter: Arc::clone(&letter), waiter: Some(sender), behind });
            answers.push((id, receiver));
            progress.nodes_left += 1;
            progress.behind += usize::from(behind);
        }
        if progress.nodes_left > 0 {
            state.bytes += bytes;
            if progress.behind > 0 {
                state.behind_bytes += bytes;
            }
            state.letters.insert(letter.number, progress);
        }
        state.dropped += refused.len() as u64;
        Queued { letter, answers, refused }
    }

    /// Makes a letter durable for nodes that were not told yet. Blocks on the disk.
    ///
    /// # Errors
    /// When it cannot be written: a restart of this node forgets it.
    pub(super) fn keep(&self, letter: &Letter, nodes: &[NodeId]) -> io::Result<()> {
        let path = self.path(letter.number);
        let node_ids = nodes.iter().map(ToString::to_string).collect();
        let message = v1::PassedOn { verb: Some(letter.verb.clone()), node_ids, at_ms: letter.at_ms };
        let mut bytes = message.encode_to_vec();
        let crc = checksum(&bytes);
        bytes.extend(crc.to_le_bytes());
        write_durably(&self.dir, &path, &bytes)?;
        let mut state = self.state.lock();
        match state.letters.get_mut(&letter.number) {
            Some(progress) => progress.on_disk = true,
            // Everybody was told meanwhile.
            None => remove(&path),
        }
        Ok(())
    }

    /// Takes a node for sending, unless somebody sends to it already or nothing waits for it.
    pub(super) fn begin(&self, id: &NodeId) -> bool {
        let mut state = self.state.lock();
        let waits = state.queues.get(id).is_some_and(|q| !q.is_empty());
        waits && state.sending.insert(id.clone())
    }

    /// What is to be said to a node next; `None` ends the sending.
    pub(super) fn next(&self, id: &NodeId) -> Option<Arc<Letter>> {
        let mut state = self.state.lock();
        let letter = state.queues.get(id).and_then(|q| q.front()).map(|w| Arc::clone(&w.letter));
        if letter.is_none() {
            state.sending.remove(id);
        }
        letter
    }

    /// A node was told what [`Self::next`] named, and answered.
    pub(super) fn told(&self, id: &NodeId, outcome: v1::NodeOutcome) {
        let mut state = self.state.lock();
        let Some(waiting) = state.queues.get_mut(id).and_then(VecDeque::pop_front) else { return };
        state.failing.remove(id);
        if let Some(waiter) = waiting.waiter {
            // Whoever asked may have stopped waiting.
            drop(waiter.send(outcome));
        }
        if state.one_less(&waiting.letter, waiting.behind) {
            remove(&self.path(waiting.letter.number));
        }
    }

    /// A node could not be told: it is away until it is, and whoever waits for its answer need not wait on.
    pub(super) fn failed(&self, id: &NodeId) {
        let mut state = self.state.lock();
        state.sending.remove(id);
        for number in state.fall_behind(id) {
            remove(&self.path(number));
        }
        let mut waits = false;
        for waiting in state.queues.get_mut(id).into_iter().flatten() {
            waiting.waiter = None;
            waits = true;
        }
        if waits {
            state.failing.insert(id.clone());
        }
    }

    /// Takes note of the nodes that live, and drops what waited too long. Blocks on the disk when that changed anything.
    pub(super) fn tend(&self, living: impl Iterator<Item = NodeId>) {
        let now = unix_ms();
        let mut state = self.state.lock();
        let before: Vec<NodeId> = state.known.keys().cloned().collect();
        let mut files = state.hear(living.collect(), now);
        state.forget_silent(now);
        files.extend(state.drop_old(now));
        for number in files {
            remove(&self.path(number));
        }
        if state.known.keys().ne(before.iter()) {
            let nodes: String = state.known.keys().map(|id| format!("{id}\n")).collect();
            drop(state);
            if let Err(error) = write_durably(&self.dir, &self.dir.join(NODES_FILE), nodes.as_bytes()) {
                tracing::warn!(%error, "the list of nodes to tell of verbs was not written");
            }
        }
    }

    /// Verbs that wait, all nodes together; their bytes; and how many were refused or dropped.
    pub(crate) fn size(&self) -> (usize, usize, u64) {
        let state = self.state.lock();
        (state.queues.values().map(VecDeque::len).sum(), state.bytes, state.dropped)
    }

    /// Whether half of what may wait does: what is large and can be said again should not take the rest.
    pub(super) fn is_crowded(&self) -> bool {
        let state = self.state.lock();
        state.bytes > MAX_BYTES / 2 || state.queues.values().any(|queue| queue.len() > MAX_WAITING / 2)
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:020}{SUFFIX}"))
    }
}

impl State {
    /// Whether what is said to a node now waits until it is back.
    fn is_away(&self, id: &NodeId) -> bool {
        !self.living.contains(id) || self.failing.contains(id)
    }

    /// Takes note of the nodes that live. Returns files to delete.
    fn hear(&mut self, living: BTreeSet<NodeId>, now_ms: u64) -> Vec<u64> {
        self.known.extend(living.iter().map(|id| (id.clone(), now_ms)));
        let gone: Vec<NodeId> = self.living.difference(&living).cloned().collect();
        self.living = living;
        gone.iter().flat_map(|id| self.fall_behind(id)).collect()
    }

    /// A node is away: what is on its way to it is behind from now on, or refused where there is no room. Returns files
    /// to delete.
    fn fall_behind(&mut self, id: &NodeId) -> Vec<u64> {
        let (mut kept, mut files) = (VecDeque::new(), Vec::new());
        let queue = self.queues.remove(id).unwrap_or_default();
        for mut waiting in queue {
            // What is being said is not taken from the sender.
            let is_said = kept.is_empty() && self.sending.contains(id);
            if waiting.behind || self.put_behind(&waiting.letter, is_said) {
                waiting.behind = true;
                kept.push_back(waiting);
                continue;
            }
            if let Some(waiter) = waiting.waiter {
                // Whoever asked may have stopped waiting.
                drop(waiter.send(refused(id)));
            }
            self.dropped += 1;
            if self.one_less(&waiting.letter, false) {
                files.push(waiting.letter.number);
            }
        }
        self.queues.insert(id.clone(), kept);
        files
    }

    /// Counts a letter as behind in one queue more, if there is room or it must be.
    fn put_behind(&mut self, letter: &Letter, must: bool) -> bool {
        let Some(progress) = self.letters.get_mut(&letter.number) else { return false };
        if progress.behind == 0 {
            if !must && self.behind_bytes + letter.bytes > MAX_BYTES {
                return false;
            }
            self.behind_bytes += letter.bytes;
        }
        progress.behind += 1;
        true
    }

    /// One node less to tell. Returns whether there is a file to delete.
    fn one_less(&mut self, letter: &Letter, behind: bool) -> bool {
        let Some(progress) = self.letters.get_mut(&letter.number) else { return false };
        progress.nodes_left -= 1;
        if behind {
            progress.behind -= 1;
            if progress.behind == 0 {
                self.behind_bytes -= letter.bytes;
            }
        }
        if progress.nodes_left > 0 {
            return false;
        }
        let on_disk = progress.on_disk;
        self.letters.remove(&letter.number);
        self.bytes -= letter.bytes;
        on_disk
    }

    fn take_in(&mut self, number: u64, path: &Path, now_ms: u64) -> bool {
        let Some(message) = read(path) else { return false };
        let Some(verb) = message.verb else { return false };
        let nodes: Vec<NodeId> = message.node_ids.iter().filter_map(|id| NodeId::new(id).ok()).collect();
        if nodes.is_empty() || now_ms.saturating_sub(message.at_ms) > as_ms(KEEP) {
            return false;
        }
        let bytes = v1::PassedOn { verb: Some(verb.clone()), ..Default::default() }.encoded_len();
        if self.behind_bytes + bytes > MAX_BYTES {
            self.dropped += nodes.len() as u64;
            return false;
        }
        let letter = Arc::new(Letter { number, verb, at_ms: message.at_ms, bytes });
        self.bytes += bytes;
        self.behind_bytes += bytes;
        self.letters.insert(number, Progress { nodes_left: nodes.len(), behind: nodes.len(), on_disk: true });
        for id in nodes {
            self.known.entry(id.clone()).or_insert(now_ms);
            let waiting = Waiting { letter: Arc::clone(&letter), waiter: None, behind: true };
            self.queues.entry(id).or_default().push_back(waiting);
        }
        true
    }

    fn forget_silent(&mut self, now_ms: u64) {
        self.known.retain(|_, seen| now_ms.saturating_sub(*seen) <= as_ms(KEEP));
        while self.known.len() > MAX_NODES {
            let oldest = self.known.iter().min_by_key(|(_, seen)| **seen).map(|(id, _)| id.clone());
            let Some(oldest) = oldest else { break };
            self.known.remove(&oldest);
        }
    }

    /// Drops verbs beyond their age, and those for nodes that are forgotten. Returns files to delete.
    fn drop_old(&mut self, now_ms: u64) -> Vec<u64> {
        let mut dropped = Vec::new();
        for (id, queue) in &mut self.queues {
            let sending = self.sending.contains(id);
            let forgotten = !self.known.contains_key(id);
            let old = |w: &Waiting| forgotten || now_ms.saturating_sub(w.letter.at_ms) > as_ms(KEEP);
            while !sending && queue.front().is_some_and(old) {
                dropped.extend(queue.pop_front().map(|w| (w.letter, w.behind)));
            }
        }
        self.queues.retain(|_, queue| !queue.is_empty());
        self.failing.retain(|id| self.queues.contains_key(id));
        self.dropped += dropped.len() as u64;
        dropped.iter().filter(|(l, behind)| self.one_less(l, *behind)).map(|(l, _)| l.number).collect()
    }
}

fn refused(id: &NodeId) -> v1::NodeOutcome {
    let outcome = v1::Outcome::Rejected.into();
    v1::NodeOutcome { node_id: id.to_string(), outcome, reason: TOO_MUCH.to_owned(), ..Default::default() }
}

fn numbered(path: &Path) -> Option<(u64, PathBuf)> {
    let number = path.file_name()?.to_str()?.strip_suffix(SUFFIX)?.parse().ok()?;
    Some((number, path.to_owned()))
}

fn read(path: &Path) -> Option<v1::PassedOn> {
    let bytes = fs::read(path).ok()?;
    let (body, crc) = bytes.split_last_chunk::<8>()?;
    (checksum(body) == u64::from_le_bytes(*crc)).then(|| v1::PassedOn::decode(body).ok())?
}

fn write_durably(dir: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    fs::File::open(dir)?.sync_all()
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        // It is told again after a restart, which changes nothing.
        tracing::debug!(%error, path = %path.display(), "a told verb was not deleted");
    }
}

fn as_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn unix_ms() -> u64 {
    as_ms(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

#[cfg(test)]
mod tests;
