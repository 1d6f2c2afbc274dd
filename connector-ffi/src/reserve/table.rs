//! The state machine of reservations: pure, told the time and the epoch.
//!
//! # Invariants
//! Every granted frame goes to the caller or is given back, also when its reply came after the ticket's end
//! (`grants_nobody_collects_are_given_back`).
//!
//! # Bounds
//! `capacity` tickets; one that nobody polls ends after [`COLLECT_WITHIN`].

use std::collections::HashMap;
use std::time::{Duration, Instant};

use kvtier_proto::v1;
use kvtier_types::BlockKey;

use crate::error::Error;
use crate::frame::FrameRef;

/// How long an answer waits to be polled before its frames are given back.
const COLLECT_WITHIN: Duration = Duration::from_secs(60);

/// A checked answer to a reservation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// One byte a block: 1 granted, 2 present, 3 busy.
    pub states: Vec<u8>,
    /// `[block][shard]`, `None` where not granted.
    pub frames: Vec<Option<FrameRef>>,
}

/// The blocks a reservation asks for.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Their group.
    pub group: u32,
    /// Their keys, consecutive in the prefix.
    pub keys: Vec<BlockKey>,
    /// Shards of a block.
    pub shards: u32,
    /// Bytes of a shard.
    pub block_bytes: u64,
}

impl Grant {
    /// Checks a reply; `None` when it does not fit the request.
    #[must_use]
    pub fn check(wanted: &Wanted, reply: &v1::ReserveReply) -> Option<Self> {
        if reply.states.len() != wanted.keys.len() {
            return None;
        }
        let granted_state = u8::try_from(i32::from(v1::Reservation::Granted)).ok()?;
        let mut granted = reply.frames.iter();
        let mut frames = Vec::with_capacity(wanted.keys.len() * wanted.shards as usize);
        for (&key, &state) in wanted.keys.iter().zip(&reply.states) {
            for shard in 0..wanted.shards {
                frames.push(if state == granted_state {
                    let frame = granted.next().filter(|frame| frame.bytes == wanted.block_bytes)?;
                    Some(FrameRef::from_wire(key, wanted.group, shard, frame))
                } else {
                    None
                });
            }
        }
        let known = reply.states.iter().all(|state| (1..=3).contains(state));
        (known && granted.next().is_none()).then(|| Self { states: reply.states.to_vec(), frames })
    }

    /// The granted frames.
    fn granted(&self) -> Vec<FrameRef> {
        self.frames.iter().flatten().copied().collect()
    }
}

/// What a poll answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TicketPoll {
    /// No such ticket, or it ended without an answer: busy.
    Unknown,
    /// Ask again.
    Pending,
    /// The answer; the ticket is gone.
    Ready(Grant),
}

#[derive(Debug)]
struct Ticket {
    epoch: u64,
    began: Instant,
    answer: Option<Grant>,
}

/// Frames to give back, with their epoch.
pub type GivenBack = Vec<(u64, Vec<FrameRef>)>;

/// All tickets of a session.
#[derive(Debug)]
pub struct Table {
    tickets: HashMap<u64, Ticket>,
    capacity: usize,
    patience: Duration,
    last: u64,
}

impl Table {
    /// A table of at most `capacity` tickets, whose calls are waited for as long as `patience`.
    #[must_use]
    pub fn new(capacity: usize, patience: Duration) -> Self {
        Self { tickets: HashMap::new(), capacity, patience, last: 0 }
    }

    /// A number for a ticket that is not kept: polling it answers [`TicketPoll::Unknown`].
    pub fn void(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// Begins a reservation; also answers what old tickets held.
    ///
    /// # Errors
    /// [`Error::Limit`].
    pub fn begin(&mut self, epoch: u64, now: Instant) -> (Result<u64, Error>, GivenBack) {
        let expired = if self.tickets.len() >= self.capacity { self.sweep(now) } else { GivenBack::new() };
        if self.tickets.len() >= self.capacity {
            return (Err(Error::Limit("reservations")), expired);
        }
        let number = self.void();
        self.tickets.insert(number, Ticket { epoch, began: now, answer: None });
        (Ok(number), expired)
    }

    /// The call ended. Answers the frames to give back when nobody waits for them.
    pub fn end(&mut self, number: u64, grant: Option<Grant>) -> Vec<FrameRef> {
        match (self.tickets.get_mut(&number), grant) {
            (Some(ticket), Some(grant)) => {
                ticket.answer = Some(grant);
                Vec::new()
            }
            (Some(_), None) => {
                self.tickets.remove(&number);
                Vec::new()
            }
            (None, grant) => grant.map(|g| g.granted()).unwrap_or_default(),
        }
    }

    /// What is known of a ticket.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] when the answer has more than `frame_capacity` frames; the ticket stays.
    pub fn poll(
        &mut self,
        number: u64,
        current: Option<u64>,
        now: Instant,
        frame_capacity: usize,
    ) -> Result<TicketPoll, Error> {
        let Some(ticket) = self.tickets.get(&number) else { return Ok(TicketPoll::Unknown) };
        if Some(ticket.epoch) != current {
            self.tickets.remove(&number);
            return Ok(TicketPoll::Unknown);
        }
        match &ticket.answer {
            None if now.saturating_duration_since(ticket.began) < self.patience => Ok(TicketPoll::Pending),
            None => {
                self.tickets.remove(&number);
                Ok(TicketPoll::Unknown)
            }
            Some(grant) if grant.frames.len() > frame_capacity => {
                Err(Error::BufferTooSmall { needed: grant.frames.len() })
            }
            Some(_) => {
                let grant = self.tickets.remove(&number).and_then(|ticket| ticket.answer);
                Ok(grant.map_or(TicketPoll::Unknown, TicketPoll::Ready))
            }
        }
    }

    /// Drops every ticket; answers what they held.
    pub fn clear(&mut self) -> GivenBack {
        self.tickets.drain().map(|(_, ticket)| ticket.held()).collect()
    }

    /// Drops tickets nobody will poll anymore; answers what they held.
    fn sweep(&mut self, now: Instant) -> GivenBack {
        let old = |_: &u64, t: &mut Ticket| now.saturating_duration_since(t.began) >= COLLECT_WITHIN;
        self.tickets.extract_if(old).map(|(_, ticket)| ticket.held()).collect()
    }
}

impl Ticket {
    fn held(self) -> (u64, Vec<FrameRef>) {
        (self.epoch, self.answer.map(|grant| grant.granted()).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(blocks: u8, shards: u32) -> Wanted {
        let keys = (0..blocks).map(|i| BlockKey::new([i; 32])).collect();
        Wanted { group: 0, keys, shards, block_bytes: 64 }
    }

    fn wire(offset: u64) -> v1::Frame {
        v1::Frame { extent: 1, offset, bytes: 64, generation: 9, ..v1::Frame::default() }
    }

    fn reply(states: &'static [u8], frames: u64) -> v1::ReserveReply {
        v1::ReserveReply { states: states.into(), frames: (0..frames).map(|i| wire(i * 4096)).collect() }
    }

    fn table() -> (Table, Instant) {
        (Table::new(2, Duration::from_secs(1)), Instant::now())
    }

    #[test]
    fn frames_go_to_the_granted_blocks_shard_by_shard() {
        let grant = Grant::check(&wanted(3, 2), &reply(&[1, 2, 1], 4)).unwrap();
        let offsets: Vec<_> = grant.frames.iter().map(|f| f.map(|f| (f.key, f.shard, f.offset))).collect();
        let key = |i| BlockKey::new([i; 32]);
        assert_eq!(
            offsets,
            [
                Some((key(0), 0, 0)),
                Some((key(0), 1, 4096)),
                None,
                None,
                Some((key(2), 0, 8192)),
                Some((key(2), 1, 12288))
            ]
        );
    }

    #[test]
    fn replies_that_contradict_the_request_are_refused() {
        let cases: [(&'static [u8], u64); 5] =
            [(&[1, 1], 2), (&[1, 2, 1], 3), (&[1, 2, 1], 5), (&[0, 2, 2], 0), (&[4, 2, 2], 0)];
        for (states, frames) in cases {
            assert!(Grant::check(&wanted(3, 2), &reply(states, frames)).is_none(), "{states:?} {frames}");
        }
        let mut other_size = reply(&[1], 1);
        other_size.frames[0].bytes = 65;
        assert!(Grant::check(&wanted(1, 1), &other_size).is_none());
    }

    #[test]
    fn an_answer_consumes_its_ticket_unless_the_buffer_is_too_small() {
        let (mut table, now) = table();
        let number = table.begin(1, now).0.unwrap();
        assert_eq!(table.poll(number, Some(1), now, 9), Ok(TicketPoll::Pending));
        assert!(table.end(number, Grant::check(&wanted(1, 2), &reply(&[1], 2))).is_empty());
        assert_eq!(table.poll(number, Some(1), now, 1), Err(Error::BufferTooSmall { needed: 2 }));
        assert!(matches!(table.poll(number, Some(1), now, 2), Ok(TicketPoll::Ready(_))));
        assert_eq!(table.poll(number, Some(1), now, 2), Ok(TicketPoll::Unknown));
    }

    #[test]
    fn grants_nobody_collects_are_given_back() {
        let (mut table, now) = table();
        let grant = || Grant::check(&wanted(1, 1), &reply(&[1], 1));
        let late = table.begin(1, now).0.unwrap();
        let after = now + Duration::from_secs(2);
        assert_eq!(table.poll(late, Some(1), after, 9), Ok(TicketPoll::Unknown), "its patience is over");
        assert_eq!(table.end(late, grant()).len(), 1, "the reply came too late");
        let collected = table.begin(1, now).0.unwrap();
        table.end(collected, grant());
        assert_eq!(table.clear().iter().map(|(_, frames)| frames.len()).sum::<usize>(), 1);
    }

    #[test]
    fn a_lost_attachment_voids_tickets() {
        let (mut table, now) = table();
        let number = table.begin(1, now).0.unwrap();
        table.end(number, Grant::check(&wanted(1, 1), &reply(&[1], 1)));
        assert_eq!(table.poll(number, Some(2), now, 9), Ok(TicketPoll::Unknown));
        assert_eq!(table.poll(number, Some(1), now, 9), Ok(TicketPoll::Unknown), "it does not come back");
    }

    #[test]
    fn tickets_are_bounded_and_old_ones_make_room() {
        let (mut table, now) = table();
        let first = table.begin(1, now).0.unwrap();
        table.end(first, Grant::check(&wanted(1, 1), &reply(&[1], 1)));
        table.begin(1, now).0.unwrap();
        assert!(table.begin(1, now).0.is_err());
        let (again, given_back) = table.begin(1, now + COLLECT_WITHIN);
        assert!(again.is_ok());
        assert_eq!(given_back.iter().map(|(_, frames)| frames.len()).sum::<usize>(), 1);
    }
}
