//! Carries out the core's actions: movements between tiers, and fetches handed to sessions.

use std::collections::BTreeMap;
use std::time::Duration;

use kvtier_policy::peer::Wanted;
use kvtier_policy::{Action, FetchEnd, FrameRef, MoveEnd, MoveId, Source};
use kvtier_types::{Expect, Location, NodeNumber, RecordMeta, ShardKey, Tier};

use crate::disk::Record;
use crate::events::{Duty, Work};
use crate::memory::{BLOCK, checksum};
use crate::peers::Fetching;
use crate::world::World;

/// How long a record may be lost by a crash after it was written.
const UNSYNCED: Duration = Duration::from_millis(300);

impl World {
    /// Does what a node's core and sessions want done until they want nothing more, then sets its timer.
    pub(crate) fn settle(&mut self, n: usize) {
        let mut rounds = 0;
        loop {
            let core = self.run_core(n);
            let sessions = self.run_sessions(n);
            let staging = self.run_staging(n);
            let lookups = self.run_lookups(n);
            rounds += 1;
            if !(core || sessions || staging || lookups) {
                break;
            }
            if rounds > 1000 {
                self.fail("every-operation-ends", format_args!("node {n} wants more and more done at one moment"));
                return;
            }
        }
        self.arm(n);
        self.check_node(n);
    }

    fn run_core(&mut self, n: usize) -> bool {
        let actions: Vec<Action> = {
            let core = &mut self.live(n).core;
            std::iter::from_fn(|| core.poll_action()).collect()
        };
        let any = !actions.is_empty();
        let mut wants: BTreeMap<(NodeNumber, u64), Vec<Wanted>> = BTreeMap::new();
        for action in actions {
            if let Action::Fetch { id, key, from, into, bytes, deadline } = action {
                self.check_source(n, from);
                self.live(n).fetching.insert(id, Fetching { source: from, into, deadline });
                match from {
                    Source::Peer { node, incarnation } => {
                        wants.entry((node, incarnation)).or_default().push(Wanted { id, key, bytes, deadline });
                    }
                    Source::Floor => {
                        let takes = self.store_takes();
                        self.schedule(n, takes, Duty::Moved(Work::Floor { id, key, into }));
                    }
                }
            } else {
                if let Action::CancelFetch { id } = action {
                    // It may have been wanted in the same call.
                    wants.values_mut().for_each(|shards| shards.retain(|w| w.id != id));
                }
                self.act(n, action);
            }
        }
        self.want(n, wants);
        any
    }

    fn act(&mut self, n: usize, action: Action) {
        match action {
            Action::Offload { id, to, meta, frame } => {
                let takes = self.tier_takes(n, to);
                self.schedule(n, takes, Duty::Moved(Work::Offload { id, to, meta: Box::new(meta), frame }));
            }
            Action::Onboard { id, key, from, at, expect, into } => {
                let takes = self.tier_takes(n, from);
                self.schedule(n, takes, Duty::Moved(Work::Onboard { id, key, from, at, expect, into }));
            }
            Action::CancelFetch { id } => self.cancel_fetch(n, id),
            Action::Forget { tier, at, .. } => {
                if tier == Tier::Disk {
                    self.nodes[n].disk.records.remove(&at);
                } else {
                    self.store.forget(n, at);
                }
            }
            Action::Fetch { .. } => {}
            Action::Copy { .. } => unreachable!("no node of the simulator has devices"),
        }
    }

    fn tier_takes(&mut self, n: usize, tier: Tier) -> Duration {
        if tier == Tier::Object {
            return self.store_takes();
        }
        if self.nodes[n].disk_slow { self.rng.millis(100, 1500) } else { self.rng.micros(200, 4000) }
    }

    fn store_takes(&mut self) -> Duration {
        if self.store.away { self.rng.millis(500, 2000) } else { self.rng.millis(5, 60) }
    }

    /// A movement ends.
    pub(crate) fn moved(&mut self, n: usize, work: Work) {
        match work {
            Work::Offload { id, to, meta, frame } => {
                let end = self.offloaded(n, to, (*meta, frame));
                self.live(n).core.moved(id, end);
            }
            Work::Onboard { id, key, from, at, expect, into } => {
                let end = self.onboarded(n, (key, from, at), expect, into);
                self.live(n).core.moved(id, end);
            }
            Work::Floor { id, key, into } => self.floor_read(n, id, (&key, into)),
        }
    }

    fn offloaded(&mut self, n: usize, to: Tier, (meta, frame): (RecordMeta, FrameRef)) -> MoveEnd {
        let words = self.live(n).pool.lock().read(frame);
        if checksum(&words) != meta.checksum {
            return MoveEnd::Corrupt;
        }
        let record = Record { meta, words, durable: self.now + UNSYNCED };
        if to == Tier::Object {
            if self.store.away {
                return MoveEnd::Failed;
            }
            return MoveEnd::Done(Some(self.store.put(n, record)));
        }
        if self.nodes[n].disk.is_full() {
            self.live(n).core.reclaim(Tier::Disk, 3 * BLOCK);
            // What was dropped is forgotten on the disk before anything new is written.
            self.run_core(n);
        }
        if self.nodes[n].disk.is_full() || self.rng.chance(5) {
            return MoveEnd::Failed;
        }
        MoveEnd::Done(Some(self.nodes[n].disk.put(record)))
    }

    fn onboarded(
        &mut self,
        n: usize,
        (key, from, at): (ShardKey, Tier, Location),
        expect: Expect,
        into: FrameRef,
    ) -> MoveEnd {
        if self.rng.chance(5) || (from == Tier::Object && self.store.away) {
            return MoveEnd::Failed;
        }
        let record = if from == Tier::Disk { self.nodes[n].disk.records.get(&at) } else { self.store.get(n, at) };
        let Some(record) = record.filter(|r| r.meta.key == key) else { return MoveEnd::Gone };
        let words = record.words;
        self.live(n).pool.lock().write(into, &words);
        if checksum(&words) == expect.checksum { MoveEnd::Done(None) } else { MoveEnd::Corrupt }
    }

    fn floor_read(&mut self, n: usize, id: MoveId, (key, into): (&ShardKey, FrameRef)) {
        if !self.live(n).fetching.contains_key(&id) {
            return;
        }
        let end = if self.store.away {
            FetchEnd::Failed
        } else {
            match self.store.of_others(n, key).cloned() {
                None => FetchEnd::Gone,
                Some(record) if checksum(&record.words) != record.meta.checksum => FetchEnd::Corrupt,
                Some(record) => {
                    self.live(n).pool.lock().write(into, &record.words);
                    FetchEnd::Done(Box::new(record.meta))
                }
            }
        };
        self.fetch_ended(n, id, end);
    }
}
