//! The engine's side: one connection, made when first needed and anew after any failure.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, recvmsg, send, socket_with,
};

use super::{ANSWER_BYTES, Access, Answer, FDS, Request};
use crate::{ExtentFds, MappedExtent, MemoryError};

/// A connection to the daemon's descriptor socket.
#[derive(Debug)]
pub struct FdClient {
    path: PathBuf,
    /// Absent before the first request and after a failed one, whose answer might still come.
    connection: Option<OwnedFd>,
}

impl FdClient {
    /// For the socket at `path`; connects with the first request.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), connection: None }
    }

    /// Over a stream that is connected already.
    #[must_use]
    pub fn connected(stream: std::os::unix::net::UnixStream) -> Self {
        Self { path: PathBuf::new(), connection: Some(stream.into()) }
    }

    /// Asks for an extent and maps it, within `timeout`.
    ///
    /// # Errors
    /// [`MemoryError::Refused`] with the daemon's status; [`MemoryError::System`] when the daemon is away or late;
    /// [`MemoryError::Protocol`] and [`MemoryError::BadDescriptor`] when its answer cannot be trusted.
    pub fn map(&mut self, request: &Request, timeout: Duration) -> Result<MappedExtent, MemoryError> {
        let (fds, bytes) = self.request(request, timeout)?;
        MappedExtent::new(fds, bytes, request.access == Access::Writable)
    }

    /// Asks for an extent's descriptors, within `timeout`; also returns the extent's length in bytes.
    ///
    /// # Errors
    /// As [`FdClient::map`].
    pub fn request(&mut self, request: &Request, timeout: Duration) -> Result<(ExtentFds, u64), MemoryError> {
        let deadline = Deadline(Instant::now() + timeout);
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => dial(&self.path, &deadline)?,
        };
        let (answer, fds) = exchange(&connection, request, &deadline)?;
        // A whole answer was read: the connection is in step, whatever the answer says.
        self.connection = Some(connection);
        answer.status.map_err(|status| MemoryError::Refused { status })?;
        let mut fds = fds.into_iter();
        match (fds.next(), fds.next(), fds.next()) {
            (Some(extent), Some(generations), None) => Ok((ExtentFds { extent, generations }, answer.bytes)),
            _ => Err(MemoryError::Protocol { reason: "a grant comes with two descriptors" }),
        }
    }
}

/// A point in time that socket calls hold to.
struct Deadline(Instant);

impl Deadline {
    /// Gives the socket's next call the time that is left.
    fn arm(&self, socket: &OwnedFd, direction: Timeout) -> Result<(), MemoryError> {
        let left = self.0.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(MemoryError::System { call: "descriptor request", source: Errno::TIMEDOUT.into() });
        }
        // Below a microsecond the option would mean "no timeout".
        let left = left.max(Duration::from_micros(1));
        set_socket_timeout(socket, direction, Some(left)).map_err(MemoryError::system("setsockopt(SO_*TIMEO)"))
    }
}

fn dial(path: &Path, deadline: &Deadline) -> Result<OwnedFd, MemoryError> {
    let address = SocketAddrUnix::new(path).map_err(MemoryError::system("socket path"))?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(MemoryError::system("socket"))?;
    deadline.arm(&socket, Timeout::Send)?;
    retry_on_intr(|| connect(&socket, &address)).map_err(MemoryError::system("connect"))?;
    Ok(socket)
}

fn exchange(socket: &OwnedFd, request: &Request, deadline: &Deadline) -> Result<(Answer, Vec<OwnedFd>), MemoryError> {
    let request = request.encode();
    let mut sent = 0;
    while sent < request.len() {
        deadline.arm(socket, Timeout::Send)?;
        match send(socket, &request[sent..], SendFlags::NOSIGNAL) {
            Ok(more) => sent += more,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(MemoryError::System { call: "send", source: errno.into() }),
        }
    }
    let mut bytes = [0; ANSWER_BYTES];
    let mut have = 0;
    let mut fds = Vec::with_capacity(FDS);
    while have < bytes.len() {
        deadline.arm(socket, Timeout::Recv)?;
        have += receive(socket, &mut bytes[have..], &mut fds)?;
    }
    Ok((Answer::decode(&bytes)?, fds))
}

/// Receives some bytes, and the descriptors that came with them.
fn receive(socket: &OwnedFd, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, MemoryError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    match recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, RecvFlags::CMSG_CLOEXEC) {
        Ok(message) if message.bytes == 0 => Err(MemoryError::Protocol { reason: "hung up before the answer" }),
        Ok(message) => {
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
            Ok(message.bytes)
        }
        Err(Errno::INTR) => Ok(0),
        Err(errno) => Err(MemoryError::System { call: "recvmsg", source: errno.into() }),
    }
}
