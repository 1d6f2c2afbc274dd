//! Connected engine processes.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvtier_types::{DeviceNumber, Instant, Layout, Namespace, NamespaceId};

use crate::lease::LeaseId;

/// Number of an attachment, never reused within a run of the core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttachmentId(pub(crate) u64);

impl AttachmentId {
    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// What a process does in its engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Looks up and reserves for all ranks.
    Scheduler,
    /// Copies and seals for one rank.
    Worker,
}

impl Role {
    /// The name in status and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scheduler => "scheduler",
            Self::Worker => "worker",
        }
    }
}

/// What a process says of itself when it attaches.
#[derive(Debug, Clone)]
pub struct AttachSpec {
    /// The same for all processes of one engine, another at every start.
    pub engine: String,
    /// What the process does.
    pub role: Role,
    /// Its rank.
    pub rank: u32,
    /// The shard that it reads and writes; a scheduler's says nothing.
    pub shard: u16,
    /// Devices whose pools it can read, the one it reads first before the others.
    pub devices: Vec<DeviceNumber>,
    /// Its process id, for people.
    pub pid: i32,
    /// Logical identity of its KV.
    pub namespace: Namespace,
    /// Physical identity of its KV, validated.
    pub layout: Layout,
}

/// One attachment.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) spec: AttachSpec,
    pub(crate) namespace: NamespaceId,
    pub(crate) layout: Arc<Layout>,
    pub(crate) layout_number: u16,
    /// Number of the engine, shared by its attachments.
    pub(crate) engine: u32,
    pub(crate) since: Instant,
    pub(crate) seen: Instant,
    /// By device, loads from it that failed since the last that went well.
    pub(crate) device_losses: [u8; DeviceNumber::MAX],
    /// Leases by request id.
    pub(crate) leases: BTreeMap<String, LeaseId>,
}

/// An attachment as status shows it.
#[derive(Debug, Clone)]
pub struct AttachmentInfo {
    /// Its number.
    pub id: AttachmentId,
    /// What it said of itself.
    pub spec: AttachSpec,
    /// Leases it holds.
    pub leases: usize,
    /// Frames its engine has reserved and not sealed.
    pub reservations: usize,
    /// Since when it is attached.
    pub since: Instant,
}
