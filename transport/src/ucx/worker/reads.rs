//! The worker's links and the reads of each, from their start to their end.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bytes::Bytes;

use super::confirm::{self, Confirming};
use super::{Engine, GRACE, MAX_KEYS, MAX_READS, Why};
use crate::TransportError;
use crate::ucx::job::{Job, Sum};
use crate::ucx::raw::{Completion, Endpoint, Failure, Get, RemoteKey};

/// A link.
#[derive(Debug)]
pub(super) struct PeerLink {
    /// `None` once it failed.
    pub(super) endpoint: Option<Endpoint>,
    keys: HashMap<Bytes, Rc<RemoteKey>>,
    /// Reads that are not started whole, in order.
    pub(super) waiting: VecDeque<u64>,
    /// Reads that have not ended.
    reads: usize,
    pub(super) in_flight_bytes: usize,
    pub(super) confirming: Confirming,
    alive: Arc<AtomicBool>,
}

impl PeerLink {
    pub(super) fn new(endpoint: Endpoint, confirming: Confirming, alive: Arc<AtomicBool>) -> Self {
        let (keys, waiting) = (HashMap::new(), VecDeque::new());
        Self { endpoint: Some(endpoint), keys, waiting, reads: 0, in_flight_bytes: 0, confirming, alive }
    }

    /// The peer's key, unpacked once.
    fn key(&mut self, packed: &Bytes) -> Result<Rc<RemoteKey>, Failure> {
        if let Some(key) = self.keys.get(packed) {
            return Ok(Rc::clone(key));
        }
        let endpoint = self.endpoint.as_ref().expect("only living links are asked for keys");
        let key = Rc::new(endpoint.unpack(packed)?);
        if self.keys.len() >= MAX_KEYS {
            self.keys.clear();
        }
        // A copy, because the packed key is a part of a message that need not stay.
        self.keys.insert(Bytes::copy_from_slice(packed), Rc::clone(&key));
        Ok(key)
    }
}

/// A read that has not ended.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) job: Arc<Job>,
    pub(super) link: u64,
    pub(super) key: Rc<RemoteKey>,
    /// Bytes whose operations were started.
    pub(super) started: usize,
    /// Operations in flight.
    pub(super) in_flight: usize,
    /// Bytes that arrived without a gap.
    arrived: usize,
    /// Parts that arrived before what precedes them: length by offset.
    early: BTreeMap<usize, usize>,
    /// Of what arrived, as far as the worker came.
    pub(super) sum: Sum,
    /// The peer was there after.
    pub(super) confirmed: bool,
    pub(super) failure: Option<TransportError>,
    given_up_at: Option<Instant>,
}

impl Active {
    fn new(job: Arc<Job>, link: u64, key: Rc<RemoteKey>) -> Self {
        Self {
            job,
            link,
            key,
            started: 0,
            in_flight: 0,
            arrived: 0,
            early: BTreeMap::new(),
            sum: Sum::new(),
            confirmed: false,
            failure: None,
            given_up_at: None,
        }
    }

    /// A part has arrived.
    fn arrive(&mut self, at: usize, len: usize) {
        self.early.insert(at, len);
        while let Some(len) = self.early.remove(&self.arrived) {
            self.arrived += len;
        }
    }

    /// Checksums at most `most` bytes of what arrived; returns how many.
    fn add_to_sum(&mut self, most: usize) -> usize {
        let len = most.min(self.arrived - self.sum.bytes);
        if len > 0 {
            self.job.add_to(&mut self.sum, len);
        }
        len
    }

    /// Whether all bytes are there.
    pub(super) fn is_whole(&self) -> bool {
        self.arrived == self.job.len
    }

    fn has_ended(&self) -> bool {
        self.in_flight == 0 && (self.failure.is_some() || self.confirmed || self.job.is_given_up())
    }
}

impl Engine {
    /// A new read.
    pub(super) fn add_job(&mut self, link_id: u64, job: Arc<Job>) {
        let Some(link) = self.links.get_mut(&link_id).filter(|link| link.endpoint.is_some()) else {
            return job.fail(TransportError::LinkDown { source: None });
        };
        if link.reads >= MAX_READS {
            return job.fail(TransportError::Limit { what: "reads of one UCX link", max: MAX_READS });
        }
        let key = match link.key(&job.place.key) {
            Ok(key) => key,
            Err(failure) => {
                tracing::debug!(%failure, "a peer's key was refused");
                return job.fail(TransportError::BadDescriptor { what: "a key that UCX refuses" });
            }
        };
        self.next_id += 1;
        self.look_at = self.look_at.min(job.deadline + GRACE);
        link.reads += 1;
        link.waiting.push_back(self.next_id);
        self.jobs.insert(self.next_id, Active::new(job, link_id, key));
    }

    /// Handles what callbacks noted.
    pub(super) fn take_events(&mut self) -> bool {
        let completions = self.worker.take_completions();
        let failures = self.worker.take_failures();
        let some = !completions.is_empty() || !failures.is_empty();
        for completion in completions {
            self.complete(completion);
        }
        for (link, failure) in failures {
            tracing::debug!(link, %failure, "a peer failed");
            self.fail_link(link, &Why::Failed(failure));
        }
        some
    }

    fn complete(&mut self, completion: Completion) {
        let Completion { get: Get { tag, at, len, landing, .. }, result } = completion;
        if let Some(link) = confirm::link_of(tag) {
            return self.answered(link, result);
        }
        // Before anybody hears that the bytes arrived: who hears it takes the buffer.
        drop(landing);
        let active = self.jobs.get_mut(&tag).expect("a read stays until its last operation has returned");
        active.in_flight -= 1;
        let id = active.link;
        if let Some(link) = self.links.get_mut(&id) {
            link.in_flight_bytes -= len;
        }
        match result {
            Ok(()) => self.arrive(tag, at, len),
            Err(failure) => self.fail_link(id, &Why::Failed(failure)),
        }
        self.retire(tag);
    }

    /// A part of a read has arrived.
    pub(super) fn arrive(&mut self, tag: u64, at: usize, len: usize) {
        let active = self.jobs.get_mut(&tag).expect("a read stays until its last part has arrived");
        active.arrive(at, len);
        self.may_sum -= active.add_to_sum(self.may_sum);
        let whole = active.is_whole().then_some(active.link);
        if let Some(link) = whole.and_then(|link| self.links.get_mut(&link)) {
            link.confirming.whole.push(tag);
        }
    }

    /// Forgets a read if it has ended, and tells its reader if it failed.
    pub(super) fn retire(&mut self, tag: u64) {
        if !self.jobs.get(&tag).is_some_and(Active::has_ended) {
            return;
        }
        let active = self.jobs.remove(&tag).expect("it was there just now");
        let link = self.links.get_mut(&active.link).expect("a link stays until its last read has ended");
        link.reads -= 1;
        if active.started < active.job.len {
            link.waiting.retain(|waiting| *waiting != tag);
        }
        if let Some(failure) = active.failure {
            active.job.fail(failure);
        }
        if link.reads == 0 && link.endpoint.is_none() {
            self.forget_link(active.link);
        }
    }

    fn forget_link(&mut self, link: u64) {
        self.links.remove(&link);
        self.shared.counters.links.store(self.links.len() as u64, Ordering::Relaxed);
    }

    /// Ends a link whose user dropped it.
    pub(super) fn drop_link(&mut self, link_id: u64) {
        let Some(link) = self.links.get_mut(&link_id) else { return };
        if link.reads > 0 {
            return self.fail_link(link_id, &Why::Dropped);
        }
        link.alive.store(false, Ordering::Release);
        let endpoint = link.endpoint.take();
        link.keys.clear();
        if let Some(endpoint) = endpoint {
            endpoint.close_gently();
        }
        self.forget_link(link_id);
    }

    /// Ends a link by force, and its reads with an error as soon as UCX has returned them.
    pub(super) fn fail_link(&mut self, link_id: u64, why: &Why) {
        let Some(link) = self.links.get_mut(&link_id) else { return };
        let Some(endpoint) = link.endpoint.take() else { return };
        link.alive.store(false, Ordering::Release);
        link.waiting.clear();
        link.keys.clear();
        let idle = link.reads == 0;
        tracing::debug!(link = link_id, ?why, "a UCX link is closed by force");
        // Its reads come back through `take_events`, perhaps from within this call.
        drop(endpoint);
        let tags: Vec<u64> =
            self.jobs.iter().filter(|(_, active)| active.link == link_id).map(|(tag, _)| *tag).collect();
        for tag in tags {
            if let Some(active) = self.jobs.get_mut(&tag) {
                active.failure.get_or_insert_with(|| why.error());
            }
            self.retire(tag);
        }
        if idle {
            self.forget_link(link_id);
        }
    }

    /// Forgets reads that nobody waits for and that are not in flight; returns links with reads that were in flight for too
    /// long after. `next` becomes when to come again, if that is earlier.
    pub(super) fn give_up(&mut self, now: Instant, next: &mut Instant) -> Vec<u64> {
        let mut stuck = Vec::new();
        let mut ended = Vec::new();
        for (tag, active) in &mut self.jobs {
            if active.job.is_given_up() {
                active.given_up_at.get_or_insert(now);
            }
            if active.has_ended() {
                ended.push(*tag);
                continue;
            }
            let due = active.given_up_at.map_or(active.job.deadline, |at| at.min(active.job.deadline)) + GRACE;
            let closed = self.links.get(&active.link).is_none_or(|link| link.endpoint.is_none());
            match due <= now {
                true if !closed => stuck.push(active.link),
                true => {}
                false => *next = due.min(*next),
            }
        }
        for tag in ended {
            self.retire(tag);
        }
        stuck
    }
}
