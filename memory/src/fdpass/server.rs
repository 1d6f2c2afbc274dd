//! The daemon's side: synchronous, one request at a time, for a thread per connection.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::{Access, Answer, FDS, FdStatus, REQUEST_BYTES, Request};
use crate::{Extent, ExtentFds, MemoryError};

/// Leave to have an extent as requested.
#[derive(Debug)]
pub enum Grant {
    /// Of host memory.
    Host(Arc<Extent>),
    /// Of a device's memory.
    Device {
        /// The memory, as its device exports it, and its generation table.
        fds: ExtentFds,
        /// Bytes of the extent.
        bytes: u64,
    },
}

impl Grant {
    fn descriptors(self, access: Access) -> Result<(ExtentFds, u64), MemoryError> {
        match self {
            Self::Host(extent) => Ok((extent.fds(access == Access::Writable)?, extent.len())),
            Self::Device { fds, bytes } => Ok((fds, bytes)),
        }
    }
}

/// How a call of [`serve_one`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// Descriptors were sent.
    Granted(Request),
    /// The request was refused with this status, which was sent.
    Refused(Request, FdStatus),
    /// The client is gone.
    HungUp,
    /// The client does not speak the protocol, and was told: close the connection.
    Hostile,
}

/// Reads one request, has `decide` judge it, answers. Blocks for as long as the stream's timeouts let it.
///
/// # Errors
/// [`MemoryError::System`] when a read or write failed or timed out: close the connection. What a client can cause is a
/// value of [`Served`].
pub fn serve_one(
    stream: &UnixStream,
    decide: impl FnOnce(&Request) -> Result<Grant, FdStatus>,
) -> Result<Served, MemoryError> {
    let mut bytes = [0; REQUEST_BYTES];
    match read_request(stream, &mut bytes)? {
        0 => return Ok(Served::HungUp),
        REQUEST_BYTES => {}
        _ => return refuse(stream, FdStatus::BadRequest, Served::Hostile),
    }
    let request = match Request::decode(&bytes) {
        Ok(request) => request,
        Err(status) => return refuse(stream, status, Served::Hostile),
    };
    match decide(&request) {
        Err(status) => refuse(stream, status, Served::Refused(request, status)),
        Ok(grant) => {
            let (fds, bytes) = grant.descriptors(request.access)?;
            let answer = Answer { status: Ok(()), bytes };
            send(stream, answer, Some(&fds), Served::Granted(request))
        }
    }
}

/// Reads until the request is whole or the client hangs up; returns how much came.
fn read_request(stream: &UnixStream, bytes: &mut [u8; REQUEST_BYTES]) -> Result<usize, MemoryError> {
    let mut stream = stream;
    let mut have = 0;
    while have < bytes.len() {
        match stream.read(&mut bytes[have..]) {
            Ok(0) => break,
            Ok(more) => have += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(0),
            Err(error) => return Err(MemoryError::System { call: "read", source: error }),
        }
    }
    Ok(have)
}

fn refuse(stream: &UnixStream, status: FdStatus, served: Served) -> Result<Served, MemoryError> {
    send(stream, Answer { status: Err(status), bytes: 0 }, None, served)
}

/// Sends an answer whole (it is far smaller than any socket buffer, so a partial write is a client that stopped reading).
fn send(stream: &UnixStream, answer: Answer, fds: Option<&ExtentFds>, served: Served) -> Result<Served, MemoryError> {
    let bytes = answer.encode();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let borrowed = fds.map(|fds| [fds.extent.as_fd(), fds.generations.as_fd()]);
    if let Some(borrowed) = &borrowed {
        let fits = control.push(SendAncillaryMessage::ScmRights(borrowed));
        assert!(fits, "the buffer has room for {FDS} descriptors");
    }
    loop {
        return match sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) if sent == bytes.len() => Ok(served),
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(Served::HungUp),
            Err(Errno::INTR) => continue,
            Err(errno) => Err(MemoryError::System { call: "sendmsg", source: errno.into() }),
        };
    }
}
