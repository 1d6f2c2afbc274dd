//! What must hold after every event, and at the end. Each checker has a name.
//!
//! | name | what it holds a run to |
//! |---|---|
//! | `no-wrong-bytes` | bytes that verified are those of one sealing of their key, whole |
//! | `leases-respected` | no frame is given back while a reader counts on its lease |
//! | `capacity-never-exceeded` | host memory and disks hold no more than they can |
//! | `every-operation-ends` | lookups, fetches, exports and leases end by their terms, and leave nothing behind |
//! | `dead-incarnations-ignored` | nothing is fetched from, or granted for, a life that is known to be over |
//! | `directory-converges` | once nothing goes wrong any more, the directory holds what the nodes hold |
//! | `ledger` | the parts sum to the whole |
//! | `bounded` | queues and maps stay within limits |

use std::collections::{BTreeMap, BTreeSet};

use kvtier_policy::directory::{DirectoryKey, Tiers};
use kvtier_policy::limits::{MAX_EXPORTS, MAX_LIST_PAGE};
use kvtier_policy::peer::PeerSession;
use kvtier_policy::{FrameRef, ListFilter, Source};
use kvtier_types::{Instant, ShardKey, Tier};

use crate::memory::BLOCK;
use crate::world::World;

/// Events that wait at once at most.
const MAX_QUEUE: usize = 20_000;

/// What a checker found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The checker's name.
    pub checker: &'static str,
    /// When.
    pub at: Instant,
    /// What it saw.
    pub what: String,
}

/// Frames that somebody counts on.
#[derive(Debug)]
pub(crate) struct Grant {
    pub(crate) frames: Vec<FrameRef>,
    pub(crate) until: Instant,
}

impl World {
    /// After an event on a node.
    pub(crate) fn check_node(&mut self, n: usize) {
        self.check_freed(n);
        let now = self.now;
        let disk = (self.nodes[n].disk.records.len(), self.nodes[n].disk.capacity);
        let live = self.live(n);
        let memory = live.pool.lock();
        let (used, capacity) = (memory.used_bytes(), memory.capacity_bytes());
        drop(memory);
        let ledger = live.core.ledger();
        let (parts, whole) = (ledger.rows().map(|(_, tokens)| tokens).sum::<u64>(), ledger.looked_up());
        let overdue = live.fetching.iter().find(|(_, f)| f.deadline < now).map(|(id, _)| *id);
        let late = live.requests.iter().find(|(_, r)| r.lease.is_none() && r.deadline < now).map(|(id, _)| *id);
        let exports = live.core.exports();
        if used > capacity || disk.0 > disk.1 {
            self.fail("capacity-never-exceeded", format_args!("node {n}: {used} of {capacity} bytes, disk {disk:?}"));
        }
        if parts != whole {
            self.fail("ledger", format_args!("node {n}: the parts sum to {parts}, the whole is {whole}"));
        }
        if let Some(id) = overdue {
            self.fail("every-operation-ends", format_args!("node {n}: fetch {id:?} outlives its deadline"));
        }
        if let Some(id) = late {
            self.fail("every-operation-ends", format_args!("node {n}: lookup {id} outlives its deadline"));
        }
        if exports > MAX_EXPORTS {
            self.fail("bounded", format_args!("node {n} has {exports} exports"));
        }
    }

    /// Frames that were given back: nobody may count on them.
    fn check_freed(&mut self, n: usize) {
        let now = self.now;
        let freed = self.live(n).pool.lock().take_freed();
        if freed.is_empty() {
            return;
        }
        let held = |grant: &Grant| grant.until > now && grant.frames.iter().any(|f| freed.contains(f));
        let life = self.live(n).life;
        let of_peer = self.grants.iter().find(|(name, g)| name.owner == n && name.owner_life == life && held(g));
        if let Some((name, _)) = of_peer {
            let name = *name;
            self.fail(
                "leases-respected",
                format_args!("a frame of {name:?} was given back while its reader counts on it"),
            );
        }
        let of_engine = self.live(n).requests.iter().find(|(_, r)| r.loading.as_ref().is_some_and(held));
        if let Some(id) = of_engine.map(|(id, _)| *id) {
            self.fail(
                "leases-respected",
                format_args!("node {n}: a frame that request {id} is loading was given back"),
            );
        }
    }

    /// Where a fetch goes.
    pub(crate) fn check_source(&mut self, n: usize, source: Source) {
        let Source::Peer { node, incarnation } = source else { return };
        let known = self.live(n).known.get(&node).copied().unwrap_or(0);
        if known > incarnation {
            self.fail(
                "dead-incarnations-ignored",
                format_args!("node {n} fetches from life {incarnation} of {node}, and knows life {known}"),
            );
        }
    }

    /// After every event, whatever it was.
    pub(crate) fn check_world(&mut self) {
        let waiting = self.queue.len();
        if waiting > MAX_QUEUE {
            self.fail("bounded", format_args!("{waiting} events wait"));
        }
    }

    /// What a node says it holds, by its catalog.
    fn held_by(&mut self, n: usize) -> BTreeMap<ShardKey, Tiers> {
        let mut held: BTreeMap<ShardKey, Tiers> = BTreeMap::new();
        let mut from = Some(0);
        while let Some(at) = from {
            let (page, next) = self.live(n).core.list(at, MAX_LIST_PAGE, &ListFilter::default(), None);
            for (view, replica) in page.iter().flat_map(|view| view.replicas.iter().map(move |r| (view, r))) {
                let key = ShardKey { block: view.key, layout: replica.layout, shard: replica.shard };
                let tiers = held.entry(key).or_default();
                *tiers = tiers.with(replica.tier);
            }
            from = next;
        }
        held
    }

    /// The faults have ended and some time has passed: the directory holds exactly what the living nodes hold.
    pub(crate) fn check_convergence(&mut self) {
        let entries = self.directory.table.page(None, usize::MAX);
        for n in 0..self.nodes.len() {
            if self.nodes[n].live.is_none() {
                self.fail("every-operation-ends", format_args!("node {n} did not come back"));
                return;
            }
            let held = self.held_by(n);
            let want: BTreeMap<DirectoryKey, Tiers> = held.iter().map(|(k, t)| (DirectoryKey::of(k), *t)).collect();
            let (number, edition) = (self.nodes[n].number, self.live(n).core.edition());
            let own = entries.iter().filter(|(_, r)| r.node == number && Some(r.edition) == edition);
            let told: BTreeMap<DirectoryKey, Tiers> = own.map(|(key, r)| (*key, r.tiers)).collect();
            if !self.live(n).core.publication_settled() {
                self.fail("directory-converges", format_args!("node {n} still has something to publish"));
            }
            if told != want {
                let missing = want.keys().filter(|k| !told.contains_key(k)).count();
                let stale = told.keys().filter(|k| !want.contains_key(k)).count();
                self.fail(
                    "directory-converges",
                    format_args!(
                        "node {n} holds {} shards, of which the directory lacks {missing}; it has {stale} more",
                        want.len()
                    ),
                );
            }
            self.check_located(n, &held);
        }
    }

    /// What a node makes of the whole directory: only present lives count.
    fn check_located(&mut self, n: usize, held: &BTreeMap<ShardKey, Tiers>) {
        let (now, keys): (_, Vec<ShardKey>) = (self.now, held.keys().copied().collect());
        let digests: Vec<DirectoryKey> = keys.iter().map(DirectoryKey::of).collect();
        let replicas = self.directory.table.locate(&digests);
        let located = self.live(n).core.located(now, &keys, &replicas, &[]);
        let sources = keys.iter().flat_map(|k| located.get(k).unwrap_or_default().to_vec());
        let sources: BTreeSet<Source> = sources.collect();
        for source in sources {
            let Source::Peer { node, incarnation } = source else { continue };
            let current = self.nodes[self.numbers[&node]].incarnation;
            if incarnation != current {
                self.fail(
                    "dead-incarnations-ignored",
                    format_args!("node {n} takes life {incarnation} of {node} for a source; it is in life {current}"),
                );
            }
        }
    }

    pub(crate) fn evict_everything(&mut self) {
        let keys = self.prompts.all();
        for n in 0..self.nodes.len() {
            if self.failure.is_none() {
                self.check_idle(n);
                self.evict(n, &keys);
                self.settle(n);
            }
        }
    }

    /// Nothing was asked for a long time: nothing may be under way.
    fn check_idle(&mut self, n: usize) {
        let live = self.live(n);
        let core = &live.core;
        let infos = core.attachments();
        let left = [
            ("export leases", core.exports()),
            ("offloads", core.pending_offloads()),
            ("movements upwards", core.pending_onboards()),
            ("fetches", live.fetching.len()),
            ("stagings", live.staging.len()),
            ("requests", live.requests.len()),
            ("leases", infos.iter().map(|a| a.leases).sum()),
            ("reservations", infos.iter().map(|a| a.reservations).sum()),
            ("busy sessions", live.sessions.values().filter(|s: &&PeerSession<_>| !s.is_idle()).count()),
        ];
        let used = live.pool.lock().used_bytes();
        let resident = core.tier_use(Tier::Host).copies * BLOCK;
        for (what, count) in left {
            if count > 0 {
                self.fail("every-operation-ends", format_args!("node {n}: {count} {what} are left over"));
            }
        }
        if used != resident {
            self.fail(
                "every-operation-ends",
                format_args!("node {n}: frames of {used} bytes are taken, blocks of {resident} are there"),
            );
        }
    }

    /// Everything was evicted by verb: no entry, frame or word of it may be left.
    pub(crate) fn check_nothing_left(&mut self) {
        for n in 0..self.nodes.len() {
            self.check_idle(n);
            let live = self.live(n);
            let entries = live.core.catalog_size().0;
            let used = live.pool.lock().used_bytes();
            if entries > 0 || used > 0 {
                self.fail(
                    "every-operation-ends",
                    format_args!("node {n}: {entries} entries and {used} bytes outlived everything they were for"),
                );
            }
        }
        if !self.reads.is_empty() {
            let count = self.reads.len();
            self.fail("every-operation-ends", format_args!("{count} reads never ended"));
        }
    }
}
