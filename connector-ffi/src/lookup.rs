//! Lookups of the scheduler side: submitted without waiting, answered in the background, polled from local state.
//!
//! # Bounds
//! Blocks asked for in one lookup: [`MAX_BLOCK_SHARDS`] over all groups and shards, so that a reply fits a message; a
//! longer prefix is looked up as far as that.
//!
//! After a lookup's deadline passed without an answer, further ones are zero at once until the daemon answers anything: a
//! stalled daemon delays one request, not each. The same while it takes no releases: it would only lease more.
//!
//! # Cancellation
//! A call is never cancelled halfway: a lease could be left behind. It ends with its reply or its timeout.

pub mod answer;
pub mod table;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvtier_proto::{convert, v1};
use kvtier_types::EngineHash;
use parking_lot::Mutex;

use crate::error::Error;
use crate::frame::FrameRef;
use crate::keys::KeySpace;
use crate::link::Attachment;
use crate::report::releases::EndedRequest;
use crate::shared::Shared;
use answer::{Answer, Hit, RangeKeys};
use table::{Poll, Release, Settlement, Table, Voided};

/// Most frames of a reply: the wire's bound of 8 MiB.
pub const MAX_BLOCK_SHARDS: usize = 65_536;
/// Longest deadline of a lookup: an engine that waits longer should recompute.
pub const MAX_DEADLINE: Duration = Duration::from_secs(60);
/// Longest request id.
pub const MAX_REQUEST_ID_BYTES: usize = 1024;
/// Releases that may wait to be told, for each lookup there is room for, while further ones are asked.
const RELEASES_PER_LOOKUP: usize = 4;

/// A question.
#[derive(Debug, Clone)]
pub struct Query {
    /// Names the request; also names its lease.
    pub request_id: String,
    /// The request's chained hashes, one a hash block, from its first token.
    pub hashes: Vec<EngineHash>,
    /// Tokens the engine holds itself.
    pub local_tokens: u32,
    /// Salt of the request, empty for none.
    pub cache_salt: String,
    /// What the request's client said, as JSON.
    pub hints: Bytes,
    /// When to answer zero.
    pub deadline: Duration,
}

/// What a poll answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HitPoll {
    /// No such lookup.
    Unknown,
    /// Ask again.
    Pending,
    /// The answer, for good.
    Ready(Hit),
}

/// The lookups of one session.
#[derive(Debug)]
pub struct Lookups {
    table: Mutex<Table>,
    /// Releases that may wait while lookups are asked.
    max_releases: usize,
}

impl Lookups {
    /// Room for `capacity` lookups.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let max_releases = capacity.saturating_mul(RELEASES_PER_LOOKUP);
        Self { table: Mutex::new(Table::new(capacity)), max_releases }
    }

    /// Begins a lookup; the call itself runs on `runtime`.
    ///
    /// # Errors
    /// [`Error::Limit`] when too many are held already.
    pub fn submit(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        runtime: &tokio::runtime::Handle,
        query: Query,
    ) -> Result<(), Error> {
        shared.counters.lookups.one();
        let keys = shared.keys();
        let attachment = shared.link.current_in(keys.id());
        let attachment = attachment.filter(|_| shared.reports.releases_waiting() < self.max_releases);
        let deadline = Instant::now() + query.deadline.min(MAX_DEADLINE);
        let epoch = attachment.as_ref().map(|a| a.epoch);
        let serial = self.table.lock().begin(&query.request_id, epoch, deadline)?;
        let Some(attachment) = attachment else {
            shared.counters.lookups_unavailable.one();
            return Ok(());
        };
        let call = Call { lookups: Arc::clone(self), shared: Arc::clone(shared), attachment, keys, serial, deadline };
        runtime.spawn(call.run(query));
        Ok(())
    }

    /// What is known of a lookup, from local state only.
    #[must_use]
    pub fn poll(&self, shared: &Shared, request_id: &str, computed_tokens: u32, max_tokens: u32) -> HitPoll {
        match self.answer(shared, request_id) {
            Poll::Unknown => HitPoll::Unknown,
            Poll::Pending => HitPoll::Pending,
            Poll::Zero => HitPoll::Ready(Hit::default()),
            Poll::Answered(answer) => {
                HitPoll::Ready(answer.hit(&shared.spec.layout.groups, computed_tokens, max_tokens))
            }
        }
    }

    /// Hands the frames of `blocks` of a group and shard to `each`, `None` for a block that was not found.
    pub fn frames(
        &self,
        shared: &Shared,
        request_id: &str,
        (group, shard): (u32, u32),
        blocks: std::ops::Range<u32>,
    ) -> FramesPoll {
        match self.answer(shared, request_id) {
            Poll::Unknown => FramesPoll::Unknown,
            Poll::Pending => FramesPoll::Pending,
            Poll::Zero => FramesPoll::Ready(blocks.map(|_| None).collect()),
            Poll::Answered(answer) => {
                FramesPoll::Ready(blocks.map(|block| answer.frame(group, shard, block)).collect())
            }
        }
    }

    /// Ends a request. Answers false when the lookup is unknown.
    pub fn release(&self, shared: &Shared, request_id: &str, settlement: Settlement) -> bool {
        match self.table.lock().release(request_id, settlement) {
            Release::Unknown => false,
            Release::Nothing => true,
            Release::Now(epoch) => {
                shared.reports.release(EndedRequest { epoch, request_id: request_id.to_owned(), settlement });
                true
            }
        }
    }

    /// Turns every lookup to zero.
    pub fn void_all(&self, shared: &Shared) {
        shared.counters.lookups_voided.count(self.table.lock().void_all());
    }

    fn answer(&self, shared: &Shared, request_id: &str) -> Poll {
        let (poll, voided) = self.table.lock().poll(request_id, shared.link.epoch(), Instant::now());
        match voided {
            Some(Voided::Expired { is_owed }) => {
                shared.counters.lookups_expired.one();
                if let Some(attachment) = shared.link.current().filter(|_| is_owed) {
                    attachment.heard(false);
                }
            }
            Some(Voided::Detached) => shared.counters.lookups_voided.one(),
            None => {}
        }
        poll
    }
}

/// What a request for frames answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FramesPoll {
    /// No such lookup.
    Unknown,
    /// Ask again.
    Pending,
    /// One entry a block.
    Ready(Vec<Option<FrameRef>>),
}

/// One call to the daemon.
struct Call {
    lookups: Arc<Lookups>,
    shared: Arc<Shared>,
    attachment: Arc<Attachment>,
    keys: Arc<KeySpace>,
    serial: u64,
    deadline: Instant,
}

impl Call {
    async fn run(self, query: Query) {
        let request_id = query.request_id.clone();
        let (heard, answer) = self.ask(query).await;
        let counters = &self.shared.counters;
        if answer.is_none() {
            counters.lookups_failed.one();
        }
        let (settlement, in_time) = self.lookups.table.lock().end(self.serial, answer, Instant::now());
        if in_time {
            counters.lookups_answered.one();
        }
        if heard {
            // Only now that the call has ended: a poll before that finds it owed, and takes the daemon for silent.
            self.attachment.heard(true);
        }
        if let Some(settlement) = settlement {
            self.shared.reports.release(EndedRequest { epoch: self.attachment.epoch, request_id, settlement });
        }
    }

    /// Asks. Answers whether the daemon answered, and what can be used of it.
    async fn ask(&self, query: Query) -> (bool, Option<Answer>) {
        // The daemon knows leases by their request: a former one of this name must not be released after this one began.
        let released = self.shared.reports.released(&query.request_id);
        if tokio::time::timeout_at(self.deadline.into(), released).await.is_err() {
            return (false, None);
        }
        let layout = &self.shared.spec.layout;
        let asked = ranges(&self.keys, &query, layout);
        self.shared.counters.lookup_blocks.count(asked.iter().map(|r| r.keys.len()).sum());
        let remaining = self.deadline.saturating_duration_since(Instant::now());
        let request = request(&self.attachment, query, &asked, remaining);
        let mut client = self.attachment.client.clone();
        let limit = remaining + self.shared.spec.call_timeout;
        let Ok(reply) = tokio::time::timeout(limit, client.lookup(request)).await else { return (false, None) };
        let answer = reply.ok().and_then(|reply| Answer::check(asked, reply.into_inner(), layout).ok());
        (true, answer)
    }
}

/// The blocks to ask for: in every group those that do not lie wholly in what the engine holds.
fn ranges(keys: &KeySpace, query: &Query, layout: &kvtier_types::Layout) -> Vec<RangeKeys> {
    let hash_tokens = keys.namespace().hash_block_tokens as usize;
    let shards = usize::from(layout.shards);
    // Entries a hash block costs, summed over groups, in units of one block shard per `hash_tokens`.
    let cost: usize = layout.groups.iter().map(|g| shards * hash_tokens.div_ceil(g.block_tokens as usize)).sum();
    let skipped = query.local_tokens as usize / hash_tokens;
    let hashes = &query.hashes[..query.hashes.len().min(skipped + MAX_BLOCK_SHARDS / cost.max(1))];
    let groups = layout.groups.iter().enumerate();
    groups
        .map(|(index, group)| {
            let first_block = query.local_tokens / group.block_tokens;
            RangeKeys { first_block, keys: keys.keys_of(index, first_block as usize, hashes) }
        })
        .collect()
}

fn request(attachment: &Attachment, query: Query, asked: &[RangeKeys], remaining: Duration) -> v1::LookupRequest {
    let ranges = asked.iter().zip(0..).map(|(range, group)| v1::BlockRange {
        group,
        first_block: range.first_block,
        keys: convert::pack_keys(&range.keys),
    });
    // The daemon answers what it has a little before we stop waiting, or the answer would always be late.
    let margin = (remaining / 4).min(Duration::from_millis(20));
    let deadline_ms = (remaining - margin).as_millis();
    v1::LookupRequest {
        attachment: attachment.token_bytes(),
        ranges: ranges.collect(),
        deadline_ms: u32::try_from(deadline_ms).unwrap_or(u32::MAX),
        cache_salt: query.cache_salt,
        hints: None,
        client_hints: query.hints,
        local_tokens: query.local_tokens,
        request_id: query.request_id,
    }
}

#[cfg(test)]
mod tests;
