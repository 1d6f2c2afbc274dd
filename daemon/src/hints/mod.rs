//! What clients say with requests: trusted as configured, joined with what `ApplyHints` left, and counted.
//!
//! ```text
//! client_hints (JSON) --read--> carriers --admit--> what is trusted of them
//! ApplyHints ------------------ store ------------> joined by session, then by program, before kv_transfer_params
//! ```
//! *Invariants*: a tenant's requests are joined only with what an operator or the same tenant left
//! (`what_was_left_is_joined_within_its_tenant`); what is not trusted is dropped and told
//! (`identity_takes_no_priorities_taints_or_ends`).
//!
//! *Bounds*: those of `kvtier_types::hints`, of the store, and `hints.max_ttl`.

mod counts;
mod hold;
mod store;
mod trust;

use std::sync::Arc;
use std::time::Duration;

use kvtier_proto::v1;
use kvtier_types::hints::{BadHints, ClientHints, Note, Resolution, Said, Signal};
use kvtier_types::{BlockHints, Instant, Outcome, RequestHints, TenantId};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::config::Hints as Config;
pub(crate) use counts::Counts;
pub(crate) use hold::{Hold, Holder, retain_or_pin};
use store::Store;
pub(crate) use store::{Left, Owner};
pub use trust::Trust;

/// What the daemon keeps of hints.
#[derive(Debug)]
pub struct Hints {
    trust: Trust,
    max_ttl: Duration,
    store: Mutex<Store>,
    /// A permit for each request whose blocks are being held.
    pub(crate) holding: Arc<Semaphore>,
    /// Hints so far, by what became of them.
    pub(crate) counts: Counts,
}

impl Hints {
    /// As configured.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            trust: config.trust,
            max_ttl: config.max_ttl.0,
            store: Mutex::new(Store::new(config.store.0)),
            holding: Arc::new(Semaphore::new(hold::MAX_AT_ONCE)),
            counts: Counts::default(),
        }
    }

    /// What counts of a request's hints.
    ///
    /// # Errors
    /// [`BadHints`] when they cannot be read at all.
    pub(crate) fn hear(&self, json: &[u8], tenant: &TenantId, now: Instant) -> Result<Heard, BadHints> {
        let mut client = ClientHints::read(json)?;
        for said in client.carriers_mut() {
            trust::admit(said, self.trust, self.max_ttl);
        }
        let left = if json.is_empty() { Vec::new() } else { self.left_for(&client, tenant, now) };
        Ok(Heard { client, left })
    }

    fn left_for(&self, client: &ClientHints, tenant: &TenantId, now: Instant) -> Vec<Arc<Said>> {
        let first = |field: fn(&Said) -> &Option<String>| client.carriers().into_iter().find_map(|s| field(s).as_ref());
        let store = self.store.lock();
        let mut left = Vec::new();
        if let Some(session) = first(|said| &said.session_id) {
            left.extend(store.of(&Owner::Session(session.clone()), tenant, now));
        }
        // What was left for the session may say which program it is.
        let of_session = left.iter().find_map(|said| said.program_id.clone());
        if let Some(program) = first(|said| &said.program_id).cloned().or(of_session) {
            left.extend(store.of(&Owner::Program(program), tenant, now));
        }
        left
    }

    /// Keeps what an authenticated caller said of requests to come; `tenant` is `None` for operators, whose word counts
    /// for every tenant. Notes tell what was clipped. False when it was said before.
    ///
    /// # Errors
    /// When there is no room.
    pub(crate) fn leave(
        &self,
        owners: Vec<Owner>,
        mut left: Left,
        tenant: Option<TenantId>,
        now: Instant,
    ) -> Result<(Arc<Said>, bool), store::Full> {
        trust::admit(&mut left.said, Trust::All, self.max_ttl);
        self.store.lock().put(owners, left, tenant, now)
    }

    /// What became of a message that was left before: it is not carried out again.
    pub(crate) fn left_before(
        &self,
        owners: &[Owner],
        message_id: &str,
        tenant: &Option<TenantId>,
        now: Instant,
    ) -> Option<Arc<Said>> {
        self.store.lock().known(owners, message_id, tenant, now)
    }
}

/// What counts of one request's hints.
#[derive(Debug, Clone)]
pub(crate) struct Heard {
    client: ClientHints,
    left: Vec<Arc<Said>>,
}

impl Heard {
    /// One answer from all of it.
    pub(crate) fn resolution(&self) -> Resolution<'_> {
        let [envelope, xargs, session, params] = self.client.carriers();
        let mut carriers = vec![envelope, xargs, session];
        carriers.extend(self.left.iter().map(Arc::as_ref));
        carriers.push(params);
        Resolution::new(carriers, self.client.prompt_tokens)
    }

    /// Whether it tells that the request ended.
    pub(crate) const fn is_over(&self) -> bool {
        self.client.finished
    }

    /// What the client asked to be told of its program.
    pub(crate) fn signals(&self) -> impl Iterator<Item = (usize, &Signal)> {
        self.client.carriers().into_iter().enumerate().flat_map(|(n, said)| said.signals.iter().map(move |s| (n, s)))
    }

    /// Tells of pins that they are held later, and of retentions when there is no room for more.
    pub(crate) fn settle_holds(&mut self, full: bool) {
        for Said { spans, notes, .. } in self.client.carriers_mut() {
            for span in spans {
                let note = &mut notes[span.note];
                if span.pin {
                    note.settle(Outcome::Accepted, "held within the budgets of claims once its blocks are here");
                } else if full && (span.ttl.is_some() || span.priority.is_some()) {
                    note.refuse("as many blocks are retained as there is room for; these are if some end");
                }
            }
        }
    }

    /// The note of an action of a carrier.
    pub(crate) fn note_mut(&mut self, carrier: usize, note: usize) -> Option<&mut Note> {
        self.client.carriers_mut().into_iter().nth(carrier).and_then(|said| said.notes.get_mut(note))
    }

    /// What became of each action.
    pub(crate) fn notes(&self) -> impl Iterator<Item = &Note> {
        self.client.carriers().into_iter().flat_map(Said::told)
    }
}

/// The engine's own word, and the client's where it is silent.
pub(crate) fn joined(own: RequestHints, client: RequestHints) -> RequestHints {
    fn first<T: Default + PartialEq>(own: T, client: T) -> T {
        if own == T::default() { client } else { own }
    }
    RequestHints {
        block: BlockHints {
            program_id: first(own.block.program_id, client.block.program_id),
            semantic: first(own.block.semantic, client.block.semantic),
            taints: first(own.block.taints, client.block.taints),
        },
        session_id: first(own.session_id, client.session_id),
        parent_program_id: first(own.parent_program_id, client.parent_program_id),
        agent_role: first(own.agent_role, client.agent_role),
        blocks_parent: own.blocks_parent.or(client.blocks_parent),
        tolerations: first(own.tolerations, client.tolerations),
        retain: own.retain.or(client.retain),
    }
}

/// A note as a message.
pub(crate) fn outcome(note: &Note) -> v1::HintOutcome {
    v1::HintOutcome {
        action_id: note.action_id.clone(),
        action_type: note.action_type.clone(),
        outcome: v1::Outcome::from(note.outcome()).into(),
        reason: note.reason().to_owned(),
    }
}

#[cfg(test)]
mod tests;
