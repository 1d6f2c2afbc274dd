//! The descriptor socket: how an engine gets the extents its frames lie in.
//!
//! ```text
//! request  | magic u32 | version u32 | attachment [u8; 16] | extent u32 | access u32 |          32 bytes, little-endian
//! answer   | status u32 | slot_shift u32 | bytes u64 |                                          16 bytes, little-endian
//!            + SCM_RIGHTS: extent, generation table                                             when status is 0
//! ```
//! *Invariants*: whatever a client sends, the server answers a status or hangs up; whatever a server sends, the client
//! maps only descriptors that [`MappedExtent::new`] found safe.
//!
//! *Bounds*: messages have fixed lengths; the client holds to a deadline, the server to the stream's timeouts, which its
//! owner sets.

mod client;
mod server;

pub use client::FdClient;
pub use server::{Grant, Served, serve_one};

#[cfg(doc)]
use crate::MappedExtent;
use crate::MemoryError;

/// First word of a request: "KVTF".
pub const MAGIC: u32 = 0x4654_564b;
/// Version of the protocol.
pub const VERSION: u32 = 1;
/// Bytes of a request.
pub const REQUEST_BYTES: usize = 32;
/// Bytes of an answer.
pub const ANSWER_BYTES: usize = 16;
/// Descriptors that come with a granting answer.
const FDS: usize = 2;

/// How an engine wants an extent mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To load from.
    ReadOnly,
    /// To save into, too: for extents with reservations of the attachment.
    Writable,
}

/// A request for an extent's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Which attachment asks.
    pub attachment: [u8; 16],
    /// Which extent it wants.
    pub extent: u32,
    /// How.
    pub access: Access,
}

/// Why the daemon grants no descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FdStatus {
    /// No such attachment: attach again.
    UnknownAttachment,
    /// No such extent: the frame is gone.
    UnknownExtent,
    /// The attachment may not have this extent in this way.
    Denied,
    /// The request is malformed or of another version.
    BadRequest,
}

impl FdStatus {
    fn code(self) -> u32 {
        match self {
            Self::UnknownAttachment => 1,
            Self::UnknownExtent => 2,
            Self::Denied => 3,
            Self::BadRequest => 4,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        [Self::UnknownAttachment, Self::UnknownExtent, Self::Denied, Self::BadRequest]
            .into_iter()
            .find(|status| status.code() == code)
    }
}

impl Request {
    /// As sent.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let access: u32 = match self.access {
            Access::ReadOnly => 0,
            Access::Writable => 1,
        };
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.attachment);
        bytes[24..28].copy_from_slice(&self.extent.to_le_bytes());
        bytes[28..32].copy_from_slice(&access.to_le_bytes());
        bytes
    }

    /// As received.
    ///
    /// # Errors
    /// [`FdStatus::BadRequest`], the answer to give.
    pub fn decode(bytes: &[u8]) -> Result<Self, FdStatus> {
        let bytes: &[u8; REQUEST_BYTES] = bytes.try_into().map_err(|_| FdStatus::BadRequest)?;
        if word(bytes, 0) != MAGIC || word(bytes, 4) != VERSION {
            return Err(FdStatus::BadRequest);
        }
        let access = match word(bytes, 28) {
            0 => Access::ReadOnly,
            1 => Access::Writable,
            _ => return Err(FdStatus::BadRequest),
        };
        let mut attachment = [0; 16];
        attachment.copy_from_slice(&bytes[8..24]);
        Ok(Self { attachment, extent: word(bytes, 24), access })
    }
}

/// The answer's bytes; the descriptors travel beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Answer {
    status: Result<(), FdStatus>,
    bytes: u64,
}

impl Answer {
    fn encode(&self) -> [u8; ANSWER_BYTES] {
        let mut bytes = [0; ANSWER_BYTES];
        let code = self.status.map_or_else(FdStatus::code, |()| 0);
        bytes[0..4].copy_from_slice(&code.to_le_bytes());
        bytes[4..8].copy_from_slice(&crate::SLOT_SHIFT.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; ANSWER_BYTES]) -> Result<Self, MemoryError> {
        if word(bytes, 4) != crate::SLOT_SHIFT {
            return Err(MemoryError::Protocol { reason: "the generation table has another slot length" });
        }
        let status = match word(bytes, 0) {
            0 => Ok(()),
            code => Err(FdStatus::from_code(code).ok_or(MemoryError::Protocol { reason: "unknown status" })?),
        };
        let mut long = [0; 8];
        long.copy_from_slice(&bytes[8..16]);
        Ok(Self { status, bytes: u64::from_le_bytes(long) })
    }
}

/// The u32 at `at`.
fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

#[cfg(test)]
mod tests;
