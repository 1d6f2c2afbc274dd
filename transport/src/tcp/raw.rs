//! The wall of the TCP transport: system calls between sockets and frames, without a copy in between.
//!
//! *Invariants*: a system call here is over when it returns, so the kernel keeps no pointer; two [`Part`]s of one
//! [`Landing`] never overlap; once [`Landing::take`] returned, no part writes any more.
//!
//! *Lock order*: a landing's lock is a leaf, held for one system call that does not wait.
#![expect(unsafe_code, reason = "vectored system calls on frames, which are raw memory shared with other processes")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvtier_memory::checksum::EMPTY;
use kvtier_memory::{FramePin, IoBuf};
use parking_lot::RwLock;

/// Most pieces of one [`send`].
pub(super) const MAX_PIECES: usize = 64;
/// Bytes of one request: a large frame is spread over streams.
pub(super) const PART_BYTES: usize = 512 << 10;
/// What is checksummed while a part arrives is a multiple of this.
const SUM_BYTES: usize = 64 << 10;

/// Something to send.
#[derive(Debug, Clone)]
pub(super) enum Piece<'a> {
    Bytes(&'a [u8]),
    /// A range of a frame.
    Frame(&'a FramePin, Range<usize>),
}

/// Sends as much of the first [`MAX_PIECES`] pieces as the socket takes without waiting.
///
/// # Panics
/// If a range is outside of its frame.
pub(super) fn send(socket: BorrowedFd<'_>, pieces: &[Piece<'_>]) -> io::Result<usize> {
    let mut vectors = [NOTHING; MAX_PIECES];
    let mut count = 0;
    for (vector, piece) in vectors.iter_mut().zip(pieces) {
        *vector = match piece {
            Piece::Bytes(bytes) => libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() },
            Piece::Frame(frame, range) => {
                assert!(range.start <= range.end && range.end <= frame.len(), "{range:?} of {} bytes", frame.len());
                let base = frame.as_mut_ptr().wrapping_add(range.start);
                libc::iovec { iov_base: base.cast(), iov_len: range.len() }
            }
        };
        count += 1;
    }
    let message = message(&mut vectors[..count]);
    // SAFETY: `message` points to `count` live vectors, each of memory that `pieces` borrows for the call; the kernel
    // only reads it. Frames may be written by other processes meanwhile, which the kernel does not mind.
    let sent =
        unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives what is there, without waiting.
pub(super) fn recv(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
    let (got, _) = rustix::net::recv(socket, into, rustix::net::RecvFlags::DONTWAIT)?;
    Ok(got)
}

/// Memory of a read while it lasts: several parts fill it, possibly at the same time.
#[derive(Debug)]
pub(super) struct Landing {
    /// Parts write under the shared lock, each its own range; `None` once the memory was given back.
    memory: RwLock<Option<IoBuf>>,
}

impl Landing {
    /// Divides `into` in parts of `part_bytes`, of which the first may be shorter; there is at least one.
    pub(super) fn divide(into: IoBuf, part_bytes: usize) -> (Arc<Self>, Vec<Part>) {
        let len = into.len();
        let landing = Arc::new(Self { memory: RwLock::new(Some(into)) });
        let part = |at, len| {
            let landing = Arc::clone(&landing);
            Part { landing, at, len, filled: 0, summed: 0, checksum: EMPTY }
        };
        let first = if len.is_multiple_of(part_bytes) { len.min(part_bytes) } else { len % part_bytes };
        let mut parts = vec![part(0, first)];
        parts.extend((first..len).step_by(part_bytes).map(|at| part(at, part_bytes)));
        (landing, parts)
    }

    /// Takes the memory back: nothing writes to it any more. `None` if that was done before.
    pub(super) fn take(&self) -> Option<IoBuf> {
        self.memory.write().take()
    }
}

/// A range of a landing that only this value fills, from its start.
#[derive(Debug)]
pub(super) struct Part {
    landing: Arc<Landing>,
    at: usize,
    len: usize,
    filled: usize,
    /// Bytes that `checksum` covers; none once the memory was given back.
    summed: usize,
    checksum: u64,
}

impl Part {
    /// Where it lies in the landing.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Bytes still to come.
    pub(super) fn missing(&self) -> usize {
        self.len - self.filled
    }

    /// The checksum of a complete part, as it lies in memory.
    pub(super) fn checksum(&self) -> u64 {
        self.checksum
    }

    /// Copies the next bytes in; drops them if the memory was given back.
    ///
    /// # Panics
    /// If they are more than are missing.
    pub(super) fn copy_in(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.missing(), "more bytes than a part has");
        let landing = Arc::clone(&self.landing);
        // Exclusive: a copy through `&mut`. Such parts are small, and alone in their landing.
        if let Some(memory) = landing.memory.write().as_mut() {
            let checksum = memory.copy_in_at(self.at + self.filled, bytes);
            self.filled += bytes.len();
            if bytes.len() == self.len {
                (self.summed, self.checksum) = (self.len, checksum);
            } else {
                self.sum(memory);
            }
        } else {
            self.filled += bytes.len();
        }
    }

    /// Counts bytes that arrived elsewhere because the memory was given back.
    pub(super) fn skip(&mut self, len: usize) {
        assert!(len <= self.missing(), "more bytes than a part has");
        self.filled += len;
    }

    /// Receives at most `most` bytes straight into memory and what follows this part into `spill`, without waiting.
    /// Returns bytes for the part and bytes in `spill`; `None` if the memory was given back.
    pub(super) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        most: usize,
        spill: &mut [u8],
    ) -> Option<io::Result<(usize, usize)>> {
        let landing = Arc::clone(&self.landing);
        let memory = landing.memory.read();
        let memory = memory.as_ref()?;
        let start = self.at + self.filled;
        let here = self.missing().min(most);
        assert!(start + here <= memory.len(), "a part outside of its landing");
        let base = memory.as_ptr().cast_mut().wrapping_add(start);
        // Bytes for `spill` may only follow when the part ends with this call.
        let spill_len = if here == self.missing() { spill.len() } else { 0 };
        let mut vectors = [
            libc::iovec { iov_base: base.cast(), iov_len: here },
            libc::iovec { iov_base: spill.as_mut_ptr().cast(), iov_len: spill_len },
        ];
        let mut message = message(&mut vectors);
        // SAFETY: both vectors are live and writable for the call: the first inside memory that the landing owns and
        // holds (the shared lock is ours), in a range no other part has and nobody reads before the parts have ended; the
        // second is borrowed mutably.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        let Ok(got) = usize::try_from(got) else { return Some(Err(io::Error::last_os_error())) };
        let mine = got.min(here);
        self.filled += mine;
        self.sum(memory);
        Some(Ok((mine, got - mine)))
    }

    /// Checksums what has arrived, while the cache has it; a part's last bytes however few they are.
    fn sum(&mut self, memory: &IoBuf) {
        let arrived = self.filled - self.summed;
        // Sockets bring odd numbers of bytes, and what is not aligned is read more slowly.
        let whole = if self.filled == self.len { arrived } else { arrived - arrived % SUM_BYTES };
        if whole > 0 {
            self.checksum = memory.checksum_after(self.checksum, self.at + self.summed, whole);
            self.summed += whole;
        }
    }
}

const NOTHING: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

fn message(vectors: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all-zero is a valid header: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvtier_memory::checksum::checksum;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn parts_fill_their_own_range_and_stop_when_the_memory_is_taken() {
        let (mut from, to) = UnixStream::pair().unwrap();
        let (landing, mut parts) = Landing::divide(IoBuf::heap(10), 4);
        assert_eq!(parts.iter().map(|part| (part.at(), part.len())).collect::<Vec<_>>(), [(0, 2), (2, 4), (6, 4)]);
        from.write_all(b"abcdefXY").unwrap();
        let mut spill = [0; 4];
        assert_eq!(parts[1].receive(to.as_fd(), 3, &mut spill).unwrap().unwrap(), (3, 0));
        assert_eq!(parts[1].receive(to.as_fd(), 3, &mut spill).unwrap().unwrap(), (1, 4));
        assert_eq!((&spill, parts[1].missing(), parts[1].checksum()), (b"efXY", 0, checksum(b"abcd")));
        assert!(parts[2].receive(to.as_fd(), 4, &mut spill).unwrap().is_err(), "would block");
        parts[0].copy_in(b"z");
        let memory = landing.take().unwrap();
        parts[0].copy_in(b"z");
        from.write_all(b"late").unwrap();
        assert!(parts[2].receive(to.as_fd(), 4, &mut spill).is_none());
        assert!(landing.take().is_none());
        let mut bytes = [0; 10];
        memory.copy_out(&mut bytes);
        assert_eq!(&bytes, b"z\0abcd\0\0\0\0");
    }

    #[test]
    fn an_empty_read_has_one_empty_part() {
        let (_, parts) = Landing::divide(IoBuf::heap(0), 4);
        assert_eq!(parts.iter().map(Part::len).collect::<Vec<_>>(), [0]);
    }
}
