//! Doors: each attachment's wire side.

use std::sync::Arc;

use kvtier_policy::AttachmentId;
use kvtier_types::{FieldHasher, TenantId};
use tokio::sync::mpsc;

use super::Node;

/// Random name of an attachment on the wire.
pub type Token = [u8; 16];

/// Detach events queued for one attachment's stream.
const DETACH_QUEUE: usize = 4;

/// An attachment's wire side.
#[derive(Debug)]
pub(super) struct Door {
    id: AttachmentId,
    /// The tenant of the user that attached it, if it has one.
    tenant: Option<TenantId>,
    detach: mpsc::Sender<String>,
}

impl Node {
    /// Opens a door for an attachment; the receiver gets the reason when it is shut.
    pub fn open_door(
        &self,
        id: AttachmentId,
        tenant: Option<TenantId>,
    ) -> Result<(Token, mpsc::Receiver<String>), rustix::io::Errno> {
        let mut token = Token::default();
        let mut filled = 0;
        while filled < token.len() {
            filled += rustix::rand::getrandom(&mut token[filled..], rustix::rand::GetRandomFlags::empty())?;
        }
        let (detach, events) = mpsc::channel(DETACH_QUEUE);
        self.doors.lock().insert(token, Door { id, tenant, detach });
        Ok((token, events))
    }

    /// The attachment behind a token.
    #[must_use]
    pub fn attachment(&self, token: &[u8]) -> Option<AttachmentId> {
        let token: Token = token.try_into().ok()?;
        self.doors.lock().get(&token).map(|d| d.id)
    }

    /// Whose blocks a request with a cache salt reads and writes, made through the attachment behind a token. Unsalted
    /// blocks are shared; a salt that the configuration lists is its tenant's; others belong to the tenant of the user that
    /// attached, or else to whoever knows the salt, named by its digest.
    #[must_use]
    pub fn tenant_of_salt(&self, token: &[u8], salt: &str) -> TenantId {
        if salt.is_empty() {
            return TenantId::shared();
        }
        let attached = || {
            let token: Token = token.try_into().ok()?;
            self.doors.lock().get(&token).and_then(|door| door.tenant.clone())
        };
        self.tenancy.of_salt(salt).cloned().or_else(attached).unwrap_or_else(|| {
            let digest = FieldHasher::new("kvtier cache salt v1").text(salt).finish();
            let name = format!("salt-{}", hex::encode(&digest[..8]));
            TenantId::new(&name).expect("hexadecimal digits make a valid id")
        })
    }

    /// Shuts an attachment's door and lets it go.
    pub fn shut_door(self: &Arc<Self>, token: &Token) {
        let door = self.doors.lock().remove(token);
        if let Some(door) = door {
            self.with_core(|core, _| core.detach(door.id));
        }
    }

    /// Tells attachments why they are let go; their streams end.
    pub fn tell_detached(&self, ids: &[AttachmentId], reason: &str) {
        let mut doors = self.doors.lock();
        for door in doors.values().filter(|d| ids.contains(&d.id)) {
            // A full queue already holds a reason.
            drop(door.detach.try_send(reason.to_owned()));
        }
        doors.retain(|_, d| !ids.contains(&d.id));
    }

    /// Tells every attachment that the node stops.
    pub fn tell_all(&self, reason: &str) {
        for door in self.doors.lock().values() {
            drop(door.detach.try_send(reason.to_owned()));
        }
    }
}
