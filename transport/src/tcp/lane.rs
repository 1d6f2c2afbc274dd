//! One stream of a link, on the reader's side: writes requests, receives replies straight into the reads' memory.
//!
//! Replies come in the order of their requests. While a reply's bytes arrive, the head of the next comes with the same
//! system call; small replies come many at a time.
//!
//! *Bounds*: what a lane has under way is bounded by the link's bytes in flight.
//!
//! *Cancellation*: the task ends with its link; whatever is under way then fails.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep_until};

use super::raw::{Part, recv};
use super::read::Piece;
use super::wire::{REPLY_BYTES, Reply, Request, Status, Token};
use crate::TransportError;

/// Bytes received at once into a read's memory.
const STEP_BYTES: usize = 256 << 10;
/// Bytes received at once that may hold many small replies.
const SPILL_BYTES: usize = 64 << 10;
/// A reply with fewer bytes comes through the spill buffer, with its neighbors.
const SMALL_BYTES: usize = 16 << 10;
/// Steps before other tasks get a turn.
const TURN_STEPS: usize = 4;

/// A part to be asked for.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) piece: Piece,
    pub(super) capability: Token,
}

/// Where readers leave what a lane is to ask for.
#[derive(Debug)]
pub(super) struct Lane {
    /// `None` once the lane ended.
    asks: Mutex<Option<Vec<Ask>>>,
    wake: Notify,
    /// Bytes asked for and not here.
    load: AtomicU64,
}

impl Lane {
    pub(super) fn new() -> Self {
        Self { asks: Mutex::new(Some(Vec::new())), wake: Notify::new(), load: AtomicU64::new(0) }
    }

    pub(super) fn load(&self) -> u64 {
        self.load.load(Ordering::Relaxed)
    }

    /// Asks for a part; on a lane that ended the read fails.
    pub(super) fn ask(&self, ask: Ask) {
        // A head's worth too, so that small parts are spread as well.
        self.load.fetch_add(cost(&ask.piece), Ordering::Relaxed);
        let refused = match self.asks.lock().as_mut() {
            Some(asks) => {
                asks.push(ask);
                None
            }
            None => Some(ask),
        };
        drop(refused);
        self.wake.notify_one();
    }

    fn take(&self) -> Vec<Ask> {
        self.asks.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Fails what was not asked for yet, and all that comes.
    pub(super) fn end(&self) {
        let asks = self.asks.lock().take();
        drop(asks);
    }

    /// Moves bytes until the stream ends; never returns `Ok`.
    pub(super) async fn run(&self, socket: TcpStream, silence: Duration) -> io::Error {
        let error = Stream::new(self, &socket, silence).run().await;
        self.end();
        error
    }
}

fn cost(piece: &Piece) -> u64 {
    (piece.part.len() + REPLY_BYTES) as u64
}

/// The task's side of a lane.
struct Stream<'a> {
    lane: &'a Lane,
    socket: &'a TcpStream,
    silence: Duration,
    outbox: Vec<u8>,
    next_id: u64,
    /// What was asked for, in order; the front's head is awaited, unless `head_came`.
    under_way: VecDeque<(u64, Piece)>,
    head_came: bool,
    spill: Box<[u8]>,
    spilled: std::ops::Range<usize>,
    /// When bytes last came, or the first request was made.
    progress: Instant,
}

impl<'a> Stream<'a> {
    fn new(lane: &'a Lane, socket: &'a TcpStream, silence: Duration) -> Self {
        Self {
            lane,
            socket,
            silence,
            outbox: Vec::new(),
            next_id: 0,
            under_way: VecDeque::new(),
            head_came: false,
            spill: vec![0; SPILL_BYTES].into(),
            spilled: 0..0,
            progress: Instant::now(),
        }
    }

    async fn run(mut self) -> io::Error {
        let stuck = sleep_until(self.progress + self.silence);
        tokio::pin!(stuck);
        loop {
            match self.turn() {
                Ok(true) => tokio::task::yield_now().await,
                Ok(false) => {
                    if let Err(error) = self.wait(stuck.as_mut()).await {
                        return error;
                    }
                }
                Err(error) => return error,
            }
        }
    }

    /// Does what can be done without waiting, up to a turn's worth; false when there is nothing more.
    fn turn(&mut self) -> io::Result<bool> {
        self.collect();
        self.write()?;
        for _ in 0..TURN_STEPS {
            if !self.receive()? {
                return Ok(false);
            }
            self.progress = Instant::now();
            self.digest()?;
        }
        Ok(true)
    }

    async fn wait(&self, mut stuck: std::pin::Pin<&mut Sleep>) -> io::Result<()> {
        let interest = match self.outbox.is_empty() {
            true => Interest::READABLE,
            false => Interest::READABLE | Interest::WRITABLE,
        };
        tokio::select! {
            ready = self.socket.ready(interest) => ready.map(|_| ()),
            () = self.lane.wake.notified() => Ok(()),
            () = stuck.as_mut(), if !self.under_way.is_empty() => {
                let until = self.progress + self.silence;
                if until <= Instant::now() {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not answer"));
                }
                stuck.reset(until);
                Ok(())
            }
        }
    }

    fn collect(&mut self) {
        for Ask { piece, capability } in self.lane.take() {
            if self.under_way.is_empty() {
                self.progress = Instant::now();
            }
            let id = self.next_id;
            self.next_id += 1;
            let (offset, len) = (piece.part.at() as u64, piece.part.len());
            let len = u32::try_from(len).expect("parts are at most PART_BYTES");
            self.outbox.extend_from_slice(&Request { id, capability, offset, len }.encode());
            self.under_way.push_back((id, piece));
        }
    }

    fn write(&mut self) -> io::Result<()> {
        while !self.outbox.is_empty() {
            match self.socket.try_write(&self.outbox) {
                Ok(sent) => drop(self.outbox.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// One system call; false when nothing has come.
    fn receive(&mut self) -> io::Result<bool> {
        self.spill.copy_within(self.spilled.clone(), 0);
        self.spilled = 0..self.spilled.len();
        let large = self.head_came && self.under_way.front().is_some_and(|(_, piece)| is_large(piece));
        // What follows a large body comes with it, up to the next large one.
        let most = self.small_bytes(usize::from(large)).clamp(self.spilled.end + 1, SPILL_BYTES);
        let (socket, spill) = (self.socket, &mut self.spill[self.spilled.end..most]);
        let received = match self.under_way.front_mut() {
            Some((_, piece)) if large => {
                let part = &mut piece.part;
                socket.try_io(Interest::READABLE, || match part.receive(socket.as_fd(), STEP_BYTES, spill) {
                    Some(received) => received,
                    None => discard(socket, part, spill),
                })
            }
            _ => socket.try_read(spill).map(|got| (0, got)),
        };
        match received {
            Ok((0, 0)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((_, spilled)) => {
                self.spilled.end += spilled;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Bytes to come from the `skip`th reply under way on, up to the head of the first large one: what may go through the
    /// spill buffer.
    fn small_bytes(&self, skip: usize) -> usize {
        let mut sum = 0;
        for (n, (_, piece)) in self.under_way.iter().enumerate().skip(skip) {
            let head = if n == 0 && self.head_came { 0 } else { REPLY_BYTES };
            sum += head;
            if is_large(piece) || sum >= SPILL_BYTES {
                break;
            }
            sum += piece.part.missing();
        }
        sum
    }

    /// Gives what was spilled to the replies it belongs to.
    fn digest(&mut self) -> io::Result<()> {
        loop {
            let spilled = &self.spill[self.spilled.clone()];
            if !self.head_came {
                let Some((head, _)) = spilled.split_first_chunk::<REPLY_BYTES>() else { return Ok(()) };
                let reply = Reply::decode(head).ok_or_else(|| garbage("that is no reply"))?;
                self.spilled.start += REPLY_BYTES;
                self.head(reply)?;
                continue;
            }
            let Some((_, piece)) = self.under_way.front_mut() else { return Ok(()) };
            let here = spilled.len().min(piece.part.missing());
            if here > 0 {
                piece.part.copy_in(&spilled[..here]);
                self.spilled.start += here;
            }
            if piece.part.missing() > 0 {
                return Ok(());
            }
            self.head_came = false;
            self.pop(Piece::end);
        }
    }

    fn head(&mut self, reply: Reply) -> io::Result<()> {
        let expected = self.under_way.front().map(|(id, piece)| (*id, piece.part.len()));
        let Some((id, len)) = expected else { return Err(garbage("a reply that nobody asked for")) };
        let whole = usize::try_from(reply.len).is_ok_and(|theirs| theirs == len);
        match reply.status {
            _ if reply.id != id => return Err(garbage("replies are out of order")),
            Status::Ok if whole => self.head_came = true,
            Status::Ok => return Err(garbage("a reply of another length")),
            Status::Gone => self.pop(|piece| piece.fail(TransportError::Gone)),
            Status::Range => {
                let what = "it names more bytes than are exposed";
                self.pop(|piece| piece.fail(TransportError::BadDescriptor { what }));
            }
        }
        Ok(())
    }

    fn pop(&mut self, end: impl FnOnce(Piece)) {
        if let Some((_, piece)) = self.under_way.pop_front() {
            self.lane.load.fetch_sub(cost(&piece), Ordering::Relaxed);
            end(piece);
        }
    }
}

fn is_large(piece: &Piece) -> bool {
    piece.part.missing() >= SMALL_BYTES
}

fn garbage(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Receives bytes of a part whose memory was given back.
fn discard(socket: &TcpStream, part: &mut Part, scratch: &mut [u8]) -> io::Result<(usize, usize)> {
    let here = scratch.len().min(part.missing());
    let got = recv(socket.as_fd(), &mut scratch[..here])?;
    part.skip(got);
    Ok((got, 0))
}
