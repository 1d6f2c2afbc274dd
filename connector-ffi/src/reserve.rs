//! Reservations of the scheduler side: tickets submitted without waiting and polled from local state.
//!
//! # Bounds
//! Frames of one reservation: [`MAX_BLOCK_SHARDS`].

pub mod table;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvtier_proto::{convert, v1};
use kvtier_types::EngineHash;
use parking_lot::Mutex;

use crate::error::Error;
use crate::link::Attachment;
use crate::lookup::MAX_BLOCK_SHARDS;
use crate::shared::Shared;
use table::{GivenBack, Grant, Table, TicketPoll, Wanted};

/// How much longer than its ticket a call is waited for, so that its frames can be given back.
const LATE_REPLY: Duration = Duration::from_secs(30);

/// A wish for frames.
#[derive(Debug, Clone)]
pub struct Reserve {
    /// The group.
    pub group: u32,
    /// Index of the first block.
    pub first_block: u32,
    /// Hashes of the blocks, at the group's granularity.
    pub hashes: Vec<EngineHash>,
    /// Hash of the block before; `None` for the first of a prefix.
    pub parent: Option<EngineHash>,
    /// Salt of the request, empty for none.
    pub cache_salt: String,
    /// What the request's client said, as JSON.
    pub hints: Bytes,
}

/// The reservations of one session.
#[derive(Debug)]
pub struct Reservations {
    table: Mutex<Table>,
}

impl Reservations {
    /// Room for `capacity` tickets, each waited for as long as `patience`.
    #[must_use]
    pub fn new(capacity: usize, patience: Duration) -> Self {
        Self { table: Mutex::new(Table::new(capacity, patience)) }
    }

    /// Begins a reservation and answers its ticket; the call runs on `runtime`. Without a daemon the ticket is void from
    /// the start.
    ///
    /// # Errors
    /// [`Error::Limit`] for too many tickets, [`Error::InvalidArgument`] for an unknown group or too many blocks.
    pub fn submit(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        runtime: &tokio::runtime::Handle,
        reserve: Reserve,
    ) -> Result<u64, Error> {
        let keys = shared.keys();
        let group = reserve.group as usize;
        let layout = &shared.spec.layout;
        let &block_bytes = layout.block_bytes.get(group).ok_or_else(|| Error::invalid("unknown group"))?;
        let shards = u32::from(layout.shards);
        if reserve.hashes.is_empty() || reserve.hashes.len() * shards as usize > MAX_BLOCK_SHARDS {
            return Err(Error::invalid("a reservation has 1 to 65,536 block shards"));
        }
        shared.counters.reserves.one();
        let Some(attachment) = shared.link.current_in(keys.id()) else {
            shared.counters.reserves_failed.one();
            return Ok(self.table.lock().void());
        };
        let (began, expired) = self.table.lock().begin(attachment.epoch, Instant::now());
        give_back(shared, expired);
        let ticket = began?;
        let wanted = Wanted {
            group: reserve.group,
            keys: reserve.hashes.iter().filter_map(|hash| keys.key(group, hash)).collect(),
            shards,
            block_bytes,
        };
        let parent = reserve.parent.and_then(|hash| keys.key(group, &hash));
        let request = v1::ReserveRequest {
            attachment: attachment.token_bytes(),
            parent_key: parent.map(|key| convert::pack_keys([&key])).unwrap_or_default(),
            range: Some(v1::BlockRange {
                group: reserve.group,
                first_block: reserve.first_block,
                keys: convert::pack_keys(&wanted.keys),
            }),
            cache_salt: reserve.cache_salt,
            hints: None,
            client_hints: reserve.hints,
        };
        let call = Call { reservations: Arc::clone(self), shared: Arc::clone(shared), attachment, ticket, wanted };
        runtime.spawn(call.run(request));
        Ok(ticket)
    }

    /// What is known of a ticket, from local state only.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] when the answer has more than `frame_capacity` frames.
    pub fn poll(&self, shared: &Shared, ticket: u64, frame_capacity: usize) -> Result<TicketPoll, Error> {
        self.table.lock().poll(ticket, shared.link.epoch(), Instant::now(), frame_capacity)
    }

    /// Drops every ticket and gives back what they hold.
    pub fn clear(&self, shared: &Shared) {
        let held = self.table.lock().clear();
        give_back(shared, held);
    }
}

fn give_back(shared: &Shared, held: GivenBack) {
    for (epoch, frames) in held {
        shared.reports.abandon(epoch, &frames);
    }
}

/// One call to the daemon.
struct Call {
    reservations: Arc<Reservations>,
    shared: Arc<Shared>,
    attachment: Arc<Attachment>,
    ticket: u64,
    wanted: Wanted,
}

impl Call {
    async fn run(self, request: v1::ReserveRequest) {
        let mut client = self.attachment.client.clone();
        let limit = self.shared.spec.call_timeout + LATE_REPLY;
        let reply = tokio::time::timeout(limit, client.reserve(request)).await;
        let grant = reply.ok().and_then(Result::ok).and_then(|reply| Grant::check(&self.wanted, reply.get_ref()));
        self.count(grant.as_ref());
        let unwanted = self.reservations.table.lock().end(self.ticket, grant);
        self.shared.reports.abandon(self.attachment.epoch, &unwanted);
    }

    fn count(&self, grant: Option<&Grant>) {
        let counters = &self.shared.counters;
        let Some(grant) = grant else { return counters.reserves_failed.one() };
        for state in &grant.states {
            match state {
                1 => counters.blocks_granted.one(),
                2 => counters.blocks_present.one(),
                _ => counters.blocks_busy.one(),
            }
        }
    }
}
