//! What `ApplyHints` left for requests to come, by session or program.
//!
//! *Bounds*: bytes in all and by tenant, messages by session or program, and a time for each.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use kvtier_types::hints::Said;
use kvtier_types::{Instant, TenantId};

/// Messages kept for one session or program; older ones go.
const MAX_MESSAGES: usize = 4;
/// Share of the store that one tenant may fill: a quarter. Operators may fill it.
const TENANT_SHARE: u64 = 4;
/// What a message costs beside its text.
const OVERHEAD_BYTES: u64 = 512;

/// Whose requests something was left for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Owner {
    /// Those of a session.
    Session(String),
    /// Those of a program.
    Program(String),
}

/// What was said of requests to come.
#[derive(Debug)]
pub(crate) struct Left {
    /// The client's name for the message; empty for none.
    pub(crate) message_id: String,
    /// What it said.
    pub(crate) said: Said,
    /// Bytes of its text.
    pub(crate) bytes: u64,
    /// How long it waits for requests.
    pub(crate) ttl: Duration,
}

/// The store is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room for more hints: {0} of hints.store is in use; leave them with a shorter ttl_ms, or later")]
pub(crate) struct Full(&'static str);

#[derive(Debug)]
struct Message {
    id: String,
    said: Arc<Said>,
    bytes: u64,
    expires: Instant,
}

type Key = (Option<TenantId>, Owner);

/// All of it.
#[derive(Debug)]
pub(super) struct Store {
    messages: HashMap<Key, VecDeque<Message>>,
    used: HashMap<Option<TenantId>, u64>,
    capacity: u64,
}

impl Store {
    /// Room for so many bytes.
    pub(super) fn new(capacity: u64) -> Self {
        Self { messages: HashMap::new(), used: HashMap::new(), capacity }
    }

    /// Keeps a message; newest first. False when it is the newest of its owner already.
    ///
    /// # Errors
    /// [`Full`].
    pub(super) fn put(
        &mut self,
        owners: Vec<Owner>,
        left: Left,
        tenant: Option<TenantId>,
        now: Instant,
    ) -> Result<(Arc<Said>, bool), Full> {
        if let Some(said) = self.known(&owners, &left.message_id, &tenant, now) {
            return Ok((said, false));
        }
        let keys: Vec<Key> = owners.into_iter().map(|owner| (tenant.clone(), owner)).collect();
        let bytes = (left.bytes + OVERHEAD_BYTES) * u64::try_from(keys.len()).unwrap_or(1);
        if let Err(full) = self.room(&tenant, bytes) {
            self.expire(now);
            self.room(&tenant, bytes).map_err(|_| full)?;
        }
        let (said, expires) = (Arc::new(left.said), now + left.ttl);
        for key in keys {
            let bytes = left.bytes + OVERHEAD_BYTES;
            *self.used.entry(tenant.clone()).or_default() += bytes;
            let message = Message { id: left.message_id.clone(), said: Arc::clone(&said), bytes, expires };
            let all = self.messages.entry(key).or_default();
            all.push_front(message);
            while all.len() > MAX_MESSAGES {
                let gone = all.pop_back().map_or(0, |message| message.bytes);
                give_back(&mut self.used, &tenant, gone);
            }
        }
        Ok((said, true))
    }

    /// A message that all of its owners were left already, as it was then.
    pub(super) fn known(
        &self,
        owners: &[Owner],
        message_id: &str,
        tenant: &Option<TenantId>,
        now: Instant,
    ) -> Option<Arc<Said>> {
        let one = |owner: &Owner| {
            let all = self.messages.get(&(tenant.clone(), owner.clone()))?;
            let found = all.iter().find(|m| m.id == message_id && m.expires > now && !m.id.is_empty())?;
            Some(Arc::clone(&found.said))
        };
        owners.iter().map(one).collect::<Option<Vec<_>>>()?.into_iter().next()
    }

    fn room(&self, tenant: &Option<TenantId>, bytes: u64) -> Result<(), Full> {
        let own = self.used.get(tenant).copied().unwrap_or_default();
        if tenant.is_some() && own + bytes > self.capacity / TENANT_SHARE {
            return Err(Full("the tenant's share"));
        }
        if self.used.values().sum::<u64>() + bytes > self.capacity { Err(Full("all")) } else { Ok(()) }
    }

    fn expire(&mut self, now: Instant) {
        let used = &mut self.used;
        self.messages.retain(|(tenant, _), all| {
            all.retain(|message| {
                let alive = message.expires > now;
                if !alive {
                    give_back(used, tenant, message.bytes);
                }
                alive
            });
            !all.is_empty()
        });
    }

    /// What was left for a request: by its tenant first, then by operators; newest first.
    pub(super) fn of(&self, owner: &Owner, tenant: &TenantId, now: Instant) -> Vec<Arc<Said>> {
        let keys = [(Some(tenant.clone()), owner.clone()), (None, owner.clone())];
        let found = keys.iter().filter_map(|key| self.messages.get(key)).flatten();
        found.filter(|message| message.expires > now).map(|message| Arc::clone(&message.said)).collect()
    }
}

fn give_back(used: &mut HashMap<Option<TenantId>, u64>, tenant: &Option<TenantId>, bytes: u64) {
    if let Some(left) = used.get_mut(tenant) {
        *left = left.saturating_sub(bytes);
        if *left == 0 {
            used.remove(tenant);
        }
    }
}
