//! The owner's side: accepts streams and answers their requests straight from exposed frames.
//!
//! *Bounds*: `max_connections` streams, [`MAX_REPLIES`] unsent replies a stream and those of one inbox more (then requests
//! wait in the socket), [`TURN_BYTES`] sent before other tasks get a turn.
//!
//! *Cancellation*: a stream's task ends when the transport closes, when its peer takes no bytes for `silence`, and on the
//! first input that is no request.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvtier_memory::FramePin;
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::exposures::Exposures;
use super::raw::{MAX_PIECES, Piece, send};
use super::socket::{prepare, receive_hello, send_hello, shorten};
use super::wire::{Hello, REPLY_BYTES, REQUEST_BYTES, Reply, Request, Status, VERSION, Welcome};

/// Replies that one stream can have unsent.
const MAX_REPLIES: usize = 256;
/// Bytes of requests read at once.
const INBOX_BYTES: usize = 16 << 10;
/// Bytes of one send: the task's turn on its thread is well below a millisecond.
const TURN_BYTES: usize = 1 << 20;
/// Pause after a failed accept, which usually means that descriptors ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the server counts.
#[derive(Debug, Default)]
pub(super) struct ServerCounters {
    pub(super) served_bytes: AtomicU64,
    /// Connections closed for what they sent, or for sending nothing.
    pub(super) garbage: AtomicU64,
    /// Connections refused because there were too many.
    pub(super) refused: AtomicU64,
}

/// What every stream of the server shares.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) exposures: Arc<Exposures>,
    pub(super) counters: Arc<ServerCounters>,
    pub(super) connections: Arc<Semaphore>,
    pub(super) silence: Duration,
    pub(super) handshake: Duration,
    pub(super) closed: CancellationToken,
    pub(super) tasks: TaskTracker,
}

impl Server {
    /// Accepts until the transport closes.
    pub(super) async fn accept(self: Arc<Self>, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                () = self.closed.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let server = Arc::clone(&self);
                    self.tasks.spawn(async move {
                        if let Err(error) = server.serve(stream).await {
                            tracing::debug!(%peer, %error, "a transport connection ended");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept transport connections");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        let Ok(_permit) = Arc::clone(&self.connections).try_acquire_owned() else {
            // Closed without reading a byte: a flood costs nothing but this.
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
            return self.refuse(&mut stream).await;
        };
        prepare(&stream, self.silence)?;
        shorten(&stream);
        tokio::select! {
            () = self.closed.cancelled() => Ok(()),
            ended = self.converse(&mut stream) => ended,
        }
    }

    async fn refuse(&self, stream: &mut TcpStream) -> io::Result<()> {
        let hello = Hello::new(Welcome::Full, self.exposures.instance());
        let bytes = hello.encode();
        // A new socket's buffer takes that at once.
        let _sent = stream.try_write(&bytes)?;
        Ok(())
    }

    async fn converse(&self, stream: &mut TcpStream) -> io::Result<()> {
        let greeted = timeout(self.handshake, self.greet(stream)).await.unwrap_or_else(|late| Err(late.into()));
        let served = match greeted {
            Ok(true) => Stream::new(self, stream).run().await,
            other => other.map(|_| ()),
        };
        if served.as_ref().is_err_and(|error| is_garbage(error.kind())) {
            self.counters.garbage.fetch_add(1, Ordering::Relaxed);
        }
        served
    }

    /// Whether the peer is to be served.
    async fn greet(&self, stream: &mut TcpStream) -> io::Result<bool> {
        let theirs = receive_hello(stream).await?;
        let ours = self.exposures.instance();
        let right = theirs.instance == ours;
        let welcome = if right { Welcome::Ok } else { Welcome::OtherInstance };
        send_hello(stream, Hello::new(welcome, ours)).await?;
        Ok(right && theirs.version == VERSION)
    }
}

fn is_garbage(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::TimedOut)
}

/// One stream being served.
struct Stream<'a> {
    server: &'a Server,
    socket: &'a TcpStream,
    inbox: Vec<u8>,
    received: usize,
    replies: VecDeque<Outgoing>,
    /// When the peer last took bytes, or the first reply was queued.
    progress: Instant,
}

/// A reply, partly sent.
struct Outgoing {
    head: [u8; REPLY_BYTES],
    body: Option<Body>,
    sent: usize,
}

struct Body {
    frame: Arc<FramePin>,
    at: usize,
    len: usize,
}

impl<'a> Stream<'a> {
    fn new(server: &'a Server, socket: &'a TcpStream) -> Self {
        let (inbox, replies) = (vec![0; INBOX_BYTES], VecDeque::new());
        Self { server, socket, inbox, received: 0, replies, progress: Instant::now() }
    }

    async fn run(mut self) -> io::Result<()> {
        loop {
            let open = self.receive()?;
            let sent = self.send()?;
            if !open {
                return Ok(());
            }
            if sent {
                tokio::task::yield_now().await;
                continue;
            }
            self.wait().await?;
        }
    }

    async fn wait(&self) -> io::Result<()> {
        let (full, idle) = (self.replies.len() >= MAX_REPLIES, self.replies.is_empty());
        let interest = match (full, idle) {
            (_, true) => Interest::READABLE,
            (true, _) => Interest::WRITABLE,
            _ => Interest::READABLE | Interest::WRITABLE,
        };
        let stuck = self.progress + self.server.silence;
        tokio::select! {
            ready = self.socket.ready(interest) => ready.map(|_| ()),
            () = sleep_until(stuck), if !idle => Err(io::Error::new(io::ErrorKind::TimedOut, "the peer takes no bytes")),
        }
    }

    /// Takes what requests have arrived; false once the peer has closed.
    fn receive(&mut self) -> io::Result<bool> {
        while self.replies.len() < MAX_REPLIES {
            match self.socket.try_read(&mut self.inbox[self.received..]) {
                Ok(0) => return Ok(false),
                Ok(got) => self.received += got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            }
            self.parse()?;
        }
        Ok(true)
    }

    fn parse(&mut self) -> io::Result<()> {
        let was_idle = self.replies.is_empty();
        let whole = self.received - self.received % REQUEST_BYTES;
        for bytes in self.inbox[..whole].as_chunks().0 {
            let request = Request::decode(bytes);
            let request = request.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "that is no request"))?;
            self.replies.push_back(answer(&self.server.exposures, request));
        }
        self.inbox.copy_within(whole..self.received, 0);
        self.received -= whole;
        if was_idle {
            self.progress = Instant::now();
        }
        Ok(())
    }

    /// Sends what the socket takes, up to a turn's worth; whether it took anything.
    fn send(&mut self) -> io::Result<bool> {
        if self.replies.is_empty() {
            return Ok(false);
        }
        let (pieces, socket) = (pieces(&self.replies), self.socket);
        let sent = match socket.try_io(Interest::WRITABLE, || send(socket.as_fd(), &pieces)) {
            Ok(sent) => sent,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        self.progress = Instant::now();
        self.server.counters.served_bytes.fetch_add(advance(&mut self.replies, sent), Ordering::Relaxed);
        Ok(true)
    }
}

fn answer(exposures: &Exposures, request: Request) -> Outgoing {
    let Request { id, capability, offset, len } = request;
    let body = exposures.find(&capability).ok_or(Status::Gone).and_then(|frame| {
        let end = offset.checked_add(u64::from(len)).filter(|end| *end <= frame.len() as u64);
        let at = usize::try_from(offset).ok().filter(|_| end.is_some()).ok_or(Status::Range)?;
        Ok(Body { frame, at, len: usize::try_from(len).map_err(|_| Status::Range)? })
    });
    let (status, len) = match &body {
        Ok(_) => (Status::Ok, len),
        Err(status) => (*status, 0),
    };
    Outgoing { head: Reply { id, status, len }.encode(), body: body.ok(), sent: 0 }
}

/// What to send next, at most a turn's worth.
fn pieces(replies: &VecDeque<Outgoing>) -> Vec<Piece<'_>> {
    let (mut pieces, mut left) = (Vec::with_capacity(8), TURN_BYTES);
    for reply in replies {
        if pieces.len() + 2 > MAX_PIECES || left == 0 {
            break;
        }
        if reply.sent < REPLY_BYTES {
            pieces.push(Piece::Bytes(&reply.head[reply.sent..]));
        }
        if let Some(body) = &reply.body {
            let done = reply.sent.saturating_sub(REPLY_BYTES);
            let take = left.min(body.len - done);
            let from = body.at + done;
            pieces.push(Piece::Frame(&body.frame, from..from + take));
            left -= take;
        }
    }
    pieces
}

/// Drops what was sent; returns bytes of bodies.
fn advance(replies: &mut VecDeque<Outgoing>, mut sent: usize) -> u64 {
    let mut served = 0;
    while let Some(reply) = replies.front_mut() {
        let whole = REPLY_BYTES + reply.body.as_ref().map_or(0, |body| body.len);
        let step = sent.min(whole - reply.sent);
        let before = reply.sent.max(REPLY_BYTES);
        reply.sent += step;
        served += (reply.sent.max(REPLY_BYTES) - before) as u64;
        sent -= step;
        if reply.sent < whole {
            break;
        }
        replies.pop_front();
    }
    served
}
