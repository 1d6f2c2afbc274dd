//! Programs between core and journal: who holds what outlives a restart, and what was abandoned does not come back.
//!
//! *Order*: whoever journals of programs holds [`Node::programs_turn`] from the change in the core until its entries are
//! durable. What a signal frees is durable before it is acknowledged; who holds what is written behind every
//! [`FLUSH_EVERY`], since after a crash a hold that is not known costs a copy at most. What calls leave behind is settled here,
//! in steps: no call of an engine waits for it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::{Core, HolderKind, HolderName, HolderRecord};
use kvtier_storage::journal::{Entry, Journal, JournalState, MAX_PROGRAM_TIPS, ProgramEnd, ProgramName, ProgramRecord};
use kvtier_types::{Instant, ShardKey};
use tokio::time::interval;

use crate::journaling::append_or_warn;
use crate::node::Node;

/// How often it is written who holds what.
const FLUSH_EVERY: Duration = Duration::from_secs(5);
/// Programs and tips of theirs that are written at once.
const FLUSH_AT_ONCE: usize = 1024;

/// What the journal said of programs at the start.
#[derive(Debug)]
pub(crate) struct Former {
    live: Vec<HolderRecord>,
    abandoned: BTreeSet<HolderName>,
    /// Abandoned ones of which some tier still had something.
    found: BTreeSet<HolderName>,
}

impl Former {
    /// Takes it from the journal's state, and tells the core what was abandoned: before the tiers are recovered.
    pub(crate) fn of(state: &mut JournalState, core: &mut Core) -> Self {
        let live = std::mem::take(&mut state.programs).into_iter().map(holder).collect();
        let mut abandoned = BTreeSet::new();
        for (name, up_to) in std::mem::take(&mut state.abandoned) {
            let name = holder_name(&name);
            core.cancel_former(name.clone(), up_to);
            // Numbers must not be given out again: what is written from now on is none of it.
            core.sequence_floor(up_to);
            abandoned.insert(name);
        }
        Self { live, abandoned, found: BTreeSet::new() }
    }

    /// Tells the core who held what, after a tier was recovered, and drops what was abandoned.
    pub(crate) fn restore(&mut self, core: &mut Core, now: Instant) {
        for record in &self.live {
            core.restore_holder(now, record);
        }
        let found = core.sweep_cancelled();
        if !found.is_empty() {
            tracing::info!(programs = found.len(), "abandoned programs left blocks behind: dropped");
        }
        self.found.extend(found);
    }

    /// Has the journal forget abandoned programs of which no tier had anything. To be called once no tier is left.
    pub(crate) fn compact(&self, journal: &Journal) {
        let idle = |name: &ProgramName| {
            let name = holder_name(name);
            self.abandoned.contains(&name) && !self.found.contains(&name)
        };
        if let Err(error) = journal.retain_abandoned(|name, _| !idle(name)) {
            tracing::warn!(%error, "the journal still has programs of which nothing is left");
        }
    }
}

fn holder_name(name: &ProgramName) -> HolderName {
    let kind = if name.session { HolderKind::Session } else { HolderKind::Program };
    HolderName { kind, id: name.id.clone(), tenant: name.tenant.clone() }
}

fn holder(record: ProgramRecord) -> HolderRecord {
    let name = holder_name(&record.name);
    let parent = record.parent.map(|id| HolderName::program(&name.tenant, &id));
    HolderRecord { name, parent, ended: record.ended, tips: record.tips, context: record.context }
}

fn program_name(name: &HolderName) -> ProgramName {
    ProgramName { session: name.kind == HolderKind::Session, tenant: name.tenant.clone(), id: name.id.clone() }
}

/// The entry that makes a program or session durable as it is, as far as an entry has room.
pub(crate) fn entry(record: HolderRecord) -> Entry {
    let bounded = |mut keys: Vec<ShardKey>| {
        keys.truncate(MAX_PROGRAM_TIPS);
        keys
    };
    Entry::Program(ProgramRecord {
        name: program_name(&record.name),
        parent: record.parent.map(|parent| parent.id),
        ended: record.ended,
        tips: bounded(record.tips),
        context: bounded(record.context),
    })
}

/// The entry that forgets a program, or keeps what it wrote from coming back.
pub(crate) fn ended(name: &HolderName, abandoned_up_to: Option<u64>) -> Entry {
    Entry::ProgramEnded(ProgramEnd { name: program_name(name), abandoned_up_to })
}

/// Writes behind who holds what and settles what is left behind, until the node stops, and then writes once more.
pub(crate) async fn run(node: Arc<Node>) {
    let mut ticks = interval(FLUSH_EVERY);
    loop {
        tokio::select! {
            () = node.stopping.cancelled() => break,
            _ = ticks.tick() => flush(&node).await,
            () = node.left_behind.notified() => settle(&node).await,
        }
    }
    flush(&node).await;
}

/// Settles what holders left behind, in steps that leave others their turn.
async fn settle(node: &Arc<Node>) {
    while !node.stopping.is_cancelled() && node.with_core(|core, _| core.settle_holders()) {
        tokio::task::yield_now().await;
    }
}

async fn flush(node: &Arc<Node>) {
    loop {
        let _turn = node.programs_turn.lock().await;
        let ((changed, gone), more) =
            node.with_core(|core, _| (core.take_holder_changes(FLUSH_AT_ONCE), core.has_holder_changes()));
        let entries: Vec<Entry> =
            changed.into_iter().map(entry).chain(gone.iter().map(|name| ended(name, None))).collect();
        if !append_or_warn(node, entries, "who holds what").await || !more {
            return;
        }
    }
}
