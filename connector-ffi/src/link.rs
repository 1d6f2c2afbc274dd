//! The session's attachment to the daemon: at most one at a time, each with an epoch of its own.
//!
//! # Invariants
//! Everything the daemon grants (leases, frames) is void once its attachment is: whoever holds such a thing remembers
//! the epoch and asks [`Link::is_current`] before using it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use kvtier_proto::v1::engine_client::EngineClient;
use kvtier_types::NamespaceId;
use parking_lot::{Mutex, RwLock};
use tonic::transport::Channel;

/// Bytes of the token that names an attachment.
pub const ATTACHMENT_BYTES: usize = 16;

/// A living attachment.
#[derive(Debug)]
pub struct Attachment {
    /// Counts the attachments of this session, from 1.
    pub epoch: u64,
    /// The token that names it in every call.
    pub token: [u8; ATTACHMENT_BYTES],
    /// The connection.
    pub client: EngineClient<Channel>,
    /// Where descriptors of extents are had.
    pub fd_socket: PathBuf,
    /// The namespace the daemon knows this engine to be in.
    pub told: Mutex<NamespaceId>,
    /// Whether the daemon owes an answer: until it gives one, nobody waits for it again.
    pub silent: AtomicBool,
}

impl Attachment {
    /// The daemon did, or did not, answer in time.
    pub fn heard(&self, answered: bool) {
        self.silent.store(!answered, Ordering::Relaxed);
    }

    /// The token as a message field.
    #[must_use]
    pub fn token_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(&self.token)
    }
}

/// What [`Link::state`] answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum LinkState {
    /// No daemon, or not yet.
    Absent = 0,
    /// Attached.
    Attached = 1,
    /// The daemon answered and will not have this session.
    Refused = 2,
}

/// The one place that knows whether there is a daemon.
#[derive(Debug)]
pub struct Link {
    inner: RwLock<Inner>,
}

#[derive(Debug)]
struct Inner {
    attachment: Option<Arc<Attachment>>,
    state: LinkState,
    message: String,
    epochs: u64,
}

impl Default for Link {
    fn default() -> Self {
        let inner =
            Inner { attachment: None, state: LinkState::Absent, message: "not attached yet".to_owned(), epochs: 0 };
        Self { inner: RwLock::new(inner) }
    }
}

impl Link {
    /// The living attachment.
    #[must_use]
    pub fn current(&self) -> Option<Arc<Attachment>> {
        self.inner.read().attachment.clone()
    }

    /// The living attachment, if the daemon answers and has been told that the engine is in `namespace`.
    #[must_use]
    pub fn current_in(&self, namespace: &NamespaceId) -> Option<Arc<Attachment>> {
        let ready = |a: &Arc<Attachment>| !a.silent.load(Ordering::Relaxed) && *a.told.lock() == *namespace;
        self.current().filter(ready)
    }

    /// Epoch of the living attachment.
    #[must_use]
    pub fn epoch(&self) -> Option<u64> {
        self.inner.read().attachment.as_ref().map(|a| a.epoch)
    }

    /// Whether the attachment of `epoch` still lives.
    #[must_use]
    pub fn is_current(&self, epoch: u64) -> bool {
        self.epoch() == Some(epoch)
    }

    /// State and message.
    #[must_use]
    pub fn state(&self) -> (LinkState, String) {
        let inner = self.inner.read();
        (inner.state, inner.message.clone())
    }

    /// The epoch that the next attachment will have.
    pub fn next_epoch(&self) -> u64 {
        let mut inner = self.inner.write();
        inner.epochs += 1;
        inner.epochs
    }

    /// A new attachment lives; `message` holds the daemon's notes.
    pub fn attached(&self, attachment: Arc<Attachment>, message: String) {
        let mut inner = self.inner.write();
        inner.attachment = Some(attachment);
        inner.state = LinkState::Attached;
        inner.message = message;
    }

    /// There is no attachment, for the reason in `message`. Answers whether there was one.
    pub fn lost(&self, state: LinkState, message: String) -> bool {
        let mut inner = self.inner.write();
        inner.state = state;
        inner.message = message;
        inner.attachment.take().is_some()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use tonic::transport::Endpoint;

    use super::*;
    use crate::shared::Shared;

    /// An attachment of a session to a daemon that is not there. To be made inside of a runtime.
    pub(crate) fn attachment(shared: &Shared, token: [u8; ATTACHMENT_BYTES], fd_socket: &Path) -> Arc<Attachment> {
        let channel = Endpoint::from_static("unix:///nonexistent").connect_lazy();
        Arc::new(Attachment {
            epoch: shared.link.next_epoch(),
            token,
            client: EngineClient::new(channel),
            fd_socket: fd_socket.to_owned(),
            told: Mutex::new(*shared.keys().id()),
            silent: AtomicBool::new(false),
        })
    }
}
