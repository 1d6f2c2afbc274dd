//! Peer reads: sessions drive exports, one-sided reads and releases; owners grant and stage.

use std::collections::BTreeMap;
use std::time::Duration;

use kvtier_policy::peer::{ExportNumber, PeerSession, ReadEnd, SessionAction, Wanted};
use kvtier_policy::{ExportError, ExportRequest, Exported, FetchEnd, FrameRef, LeaseId, MoveId, Source};
use kvtier_types::{Instant, NodeNumber, RecordMeta};

use crate::checkers::Grant;
use crate::events::Event;
use crate::memory::{CHUNKS, Words, checksum};
use crate::network::{ExportName, Message, Party, Place};
use crate::node::SESSION;
use crate::world::{Sabotage, World};

/// A shard on its way from elsewhere.
#[derive(Debug)]
pub(crate) struct Fetching {
    pub(crate) source: Source,
    pub(crate) into: FrameRef,
    pub(crate) deadline: Instant,
}

/// What an owner is bringing into memory for somebody.
#[derive(Debug)]
pub(crate) struct Staging {
    /// `None`: an adoption.
    pub(crate) name: Option<(ExportName, Instant)>,
    pub(crate) lease: LeaseId,
    pub(crate) until: Instant,
}

/// A one-sided read under way.
#[derive(Debug)]
pub(crate) struct Read {
    name: ExportName,
    id: MoveId,
    place: Place,
    words: Words,
    done: usize,
    stopped: bool,
}

impl World {
    pub(crate) fn want(&mut self, n: usize, wants: BTreeMap<(NodeNumber, u64), Vec<Wanted>>) {
        let now = self.now;
        let live = self.live(n);
        for (peer, shards) in wants {
            live.sessions.entry(peer).or_insert_with(|| PeerSession::new(SESSION)).want_all(now, shards);
        }
    }

    /// Carries out what sessions want. Answers whether there was anything.
    pub(crate) fn run_sessions(&mut self, n: usize) -> bool {
        let peers: Vec<(NodeNumber, u64)> = self.live(n).sessions.keys().copied().collect();
        let mut any = false;
        for peer in peers {
            while let Some(action) = self.live(n).sessions.get_mut(&peer).and_then(PeerSession::poll_action) {
                any = true;
                self.session_action(n, peer, action);
            }
        }
        any
    }

    fn name(&mut self, n: usize, (peer, owner_life): (NodeNumber, u64), number: ExportNumber) -> ExportName {
        let owner = self.numbers[&peer];
        ExportName { reader: n, reader_life: self.live(n).life, owner, owner_life, number }
    }

    fn session_action(&mut self, n: usize, peer: (NodeNumber, u64), action: SessionAction<Place>) {
        let now = self.now;
        match action {
            SessionAction::Export { export, keys, ttl, wait } => {
                let name = self.name(n, peer, export);
                let counts_until = now + ttl.saturating_sub(SESSION.margin);
                let request = ExportRequest {
                    peer: self.nodes[n].number,
                    peer_incarnation: name.reader_life,
                    incarnation: peer.1,
                    keys,
                    ttl,
                };
                self.stats.count("peers", "exports asked");
                self.live(n).asked.insert(name, counts_until);
                let message = Message::Export { name, request, wait, counts_until };
                self.send(Party::Node(n), Party::Node(name.owner), message);
            }
            SessionAction::Read { export, id, at, .. } => {
                let name = self.name(n, peer, export);
                let read = self.take_id();
                let state = Read { name, id, place: at, words: [0; CHUNKS], done: 0, stopped: false };
                self.reads.insert(read, state);
                let pace = self.pace(name);
                self.queue.push(now + pace, Event::Chunk { read });
            }
            SessionAction::Stop { id } => {
                let life = self.live(n).life;
                let own = |r: &&mut Read| (r.name.reader, r.name.reader_life, r.id) == (n, life, id);
                self.reads.values_mut().filter(own).for_each(|r| r.stopped = true);
            }
            SessionAction::Release { export } => {
                let name = self.name(n, peer, export);
                self.live(n).asked.remove(&name);
                self.grants.remove(&name);
                self.send(Party::Node(n), Party::Node(name.owner), Message::Release { name });
            }
            SessionAction::Ended { id, end } => self.fetch_ended(n, id, end),
            SessionAction::Unreachable => {
                self.stats.count("peers", "unreachable");
                self.live(n).core.called(now, peer.0, false);
            }
        }
    }

    pub(crate) fn fetch_ended(&mut self, n: usize, id: MoveId, end: FetchEnd) {
        let Some(fetching) = self.live(n).fetching.remove(&id) else {
            let what = format_args!("node {n}: fetch {id:?} ended twice, or after it was given up");
            self.fail("every-operation-ends", what);
            return;
        };
        let peer = matches!(fetching.source, Source::Peer { .. });
        self.stats.count(
            if peer { "fetches from peers" } else { "fetches from packs" },
            match end {
                FetchEnd::Done(_) => "done",
                FetchEnd::Corrupt => "corrupt",
                FetchEnd::Gone => "gone",
                FetchEnd::Failed => "failed",
            },
        );
        let now = self.now;
        self.live(n).core.fetched(now, id, end);
    }

    /// The core gave a fetch up.
    pub(crate) fn cancel_fetch(&mut self, n: usize, id: MoveId) {
        let now = self.now;
        let live = self.live(n);
        let Some(fetching) = live.fetching.remove(&id) else { return };
        if let Source::Peer { node, incarnation } = fetching.source
            && let Some(session) = live.sessions.get_mut(&(node, incarnation))
        {
            session.cancel(now, id);
        }
        self.stats.count("fetches from peers", "given up");
    }

    /// An owner is asked to export.
    pub(crate) fn export_asked(
        &mut self,
        name: ExportName,
        mut request: ExportRequest,
        (wait, counts_until): (Duration, Instant),
    ) {
        let (owner, now) = (name.owner, self.now);
        let asked_for = request.incarnation;
        let live = self.live(owner);
        if live.granted.contains_key(&name) {
            return;
        }
        let current = live.core.incarnation();
        if self.options.sabotage == Some(Sabotage::IncarnationCheckSkipped) {
            request.incarnation = current;
        }
        match self.live(owner).core.export(now, &request) {
            Ok(lease) => {
                if asked_for != current {
                    self.fail(
                        "dead-incarnations-ignored",
                        format_args!("node {owner} in life {current} granted an export asked of life {asked_for}"),
                    );
                }
                let live = self.live(owner);
                live.granted.insert(name, (lease, now + request.ttl));
                live.staging.push(Staging { name: Some((name, counts_until)), lease, until: now + wait });
            }
            Err(error) => {
                self.stats.count("peers", "exports refused");
                let gone = matches!(error, ExportError::Incarnation { .. });
                self.send(Party::Node(owner), Party::Node(name.reader), Message::Exported { name, granted: Err(gone) });
            }
        }
    }

    /// Answers exports, and ends adoptions, that wait for nothing more. Answers whether there were any.
    pub(crate) fn run_staging(&mut self, n: usize) -> bool {
        let now = self.now;
        let live = self.live(n);
        let staging = std::mem::take(&mut live.staging);
        let (ready, waiting): (Vec<Staging>, Vec<Staging>) =
            staging.into_iter().partition(|s| s.until <= now || live.core.export_waiting(s.lease) == 0);
        live.staging = waiting;
        let any = !ready.is_empty();
        for staged in ready {
            match staged.name {
                Some((name, counts_until)) => self.answer_export(name, staged.lease, counts_until),
                None => {
                    let live = self.live(n);
                    let outcomes = live.core.adoption_outcomes(staged.lease).unwrap_or_default();
                    live.core.release_export(staged.lease);
                    for (outcome, _) in outcomes {
                        self.stats.count("adoptions", outcome.name());
                    }
                }
            }
        }
        any
    }

    fn answer_export(&mut self, name: ExportName, lease: LeaseId, until: Instant) {
        let live = self.live(name.owner);
        let owner_life = live.life;
        let answers = live.core.collect_export(lease);
        let mut frames = Vec::new();
        let mut grant = |answer: Exported| match answer {
            Exported::Ready(ready) => {
                let (frame, meta) = *ready;
                frames.push(frame);
                Some((Place { owner_life, frame }, meta))
            }
            Exported::Missing | Exported::Late => None,
        };
        let granted = answers.map(|all| all.into_iter().map(&mut grant).collect::<Vec<_>>()).ok_or(false);
        // A reader that has given it up already counts on nothing.
        let reader = self.nodes[name.reader].live.as_ref().filter(|r| r.life == name.reader_life);
        if reader.is_some_and(|r| r.asked.contains_key(&name)) {
            self.grants.insert(name, Grant { frames, until });
        }
        self.stats.count("peers", "exports granted");
        self.send(Party::Node(name.owner), Party::Node(name.reader), Message::Exported { name, granted });
        if self.options.sabotage == Some(Sabotage::LeaseReleasedEarly) {
            self.live(name.owner).core.release_export(lease);
        }
    }

    /// A reader gets its answer.
    pub(crate) fn exported(&mut self, name: ExportName, granted: Result<Vec<Option<(Place, RecordMeta)>>, bool>) {
        let (n, now, peer) = (name.reader, self.now, self.nodes[name.owner].number);
        if self.live(n).life != name.reader_life {
            return;
        }
        let live = self.live(n);
        let Some(session) = live.sessions.get_mut(&(peer, name.owner_life)) else { return };
        match granted {
            Ok(answers) => {
                session.granted(now, name.number, answers);
                live.core.called(now, peer, true);
            }
            Err(gone) => {
                live.asked.remove(&name);
                session.refused(now, name.number, gone);
            }
        }
    }

    pub(crate) fn release_asked(&mut self, name: ExportName) {
        let live = self.live(name.owner);
        if let Some((lease, _)) = live.granted.remove(&name) {
            live.core.release_export(lease);
        }
    }

    pub(crate) fn adopt_asked(&mut self, n: usize, from: (NodeNumber, u64), metas: &[RecordMeta]) {
        let now = self.now;
        let adopted = self.live(n).core.adopt(now, from, metas, (Duration::from_secs(3), None));
        if let Ok(lease) = adopted {
            let until = now + Duration::from_secs(2);
            self.live(n).staging.push(Staging { name: None, lease, until });
        }
    }

    /// Time for the next piece of a read.
    fn pace(&mut self, name: ExportName) -> Duration {
        let between = (Party::Node(name.owner), Party::Node(name.reader));
        let slow = self.network.slow.contains(&between) && self.rng.chance(600);
        if slow { self.rng.millis(50, 900) } else { self.rng.micros(20, 3000) }
    }

    /// The next piece of a read arrives: what lies in the owner's frame at this moment.
    pub(crate) fn read_on(&mut self, id: u64) {
        let Some(mut read) = self.reads.remove(&id) else { return };
        let name = read.name;
        if self.nodes[name.reader].live.as_ref().is_none_or(|l| l.life != name.reader_life) {
            return;
        }
        let link = (Party::Node(name.owner), Party::Node(name.reader));
        let cut = self.network.cut.contains(&link) || self.network.cut.contains(&(link.1, link.0));
        let owner = self.nodes[name.owner].live.as_ref();
        let end = match owner {
            _ if read.stopped => Some(ReadEnd::Failed),
            _ if cut => Some(ReadEnd::LinkDown),
            None => Some(ReadEnd::LinkDown),
            Some(owner) if owner.life != read.place.owner_life => Some(ReadEnd::Gone),
            Some(owner) => {
                read.words[read.done] = owner.pool.lock().read(read.place.frame)[read.done];
                read.done += 1;
                (read.done == CHUNKS).then(|| self.arrived(&mut read))
            }
        };
        let Some(end) = end else {
            self.reads.insert(id, read);
            let pace = self.pace(name);
            self.queue.push(self.now + pace, Event::Chunk { read: id });
            return;
        };
        self.note(format_args!("node {}: read {:?} of {name:?} ended: {end:?}", name.reader, read.id));
        self.read_ended(&read, end);
        self.settle(name.reader);
    }

    fn arrived(&mut self, read: &mut Read) -> ReadEnd {
        if self.rng.chance(self.network.corrupt_reads) {
            self.stats.count("faults", "bit flipped in flight");
            read.words[2] ^= 1 << self.rng.below(64);
        }
        ReadEnd::Arrived { checksum: checksum(&read.words) }
    }

    fn read_ended(&mut self, read: &Read, end: ReadEnd) {
        let (now, name) = (self.now, read.name);
        let peer = (self.nodes[name.owner].number, name.owner_life);
        let live = self.live(name.reader);
        if let (ReadEnd::Arrived { .. }, Some(fetching)) = (end, live.fetching.get(&read.id)) {
            live.pool.lock().write(fetching.into, &read.words);
        }
        if let Some(session) = live.sessions.get_mut(&peer) {
            session.read_ended(now, name.number, read.id, end);
        }
    }
}
