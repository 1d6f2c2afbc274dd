//! The schedule of faults: what goes wrong in a run, when, and for how long. All of them end before the run does.

use std::time::Duration;

use kvtier_policy::directory::Table;

use crate::events::Event;
use crate::network::Party;
use crate::world::World;

/// Something that goes wrong for a while.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    Loss(u64),
    Duplicates(u64),
    Reorders(u64),
    Echoes(u64),
    Cut { from: Party, to: Party, both: bool },
    Slow { from: Party, to: Party },
    Crash { node: usize, empty: bool, back: Duration },
    DirectoryAway,
    DirectoryMute,
    DirectoryHalves,
    DirectoryFlushed,
    DirectoryRestored(usize),
    SlowDisk(usize),
    StoreAway,
    CorruptReads(u64),
    RottenDisk(usize),
    RottenMemory { node: usize, pick: u64 },
}

/// Kinds that [`World::pick_fault`] picks from.
const KINDS: u64 = 19;

impl Fault {
    const fn name(self) -> &'static str {
        match self {
            Self::Loss(_) => "lossy network",
            Self::Duplicates(_) => "repeating network",
            Self::Reorders(_) => "reordering network",
            Self::Echoes(_) => "late repeats",
            Self::Cut { both: true, .. } => "partition",
            Self::Cut { both: false, .. } => "one-way partition",
            Self::Slow { .. } => "slow link",
            Self::Crash { empty: false, .. } => "crash",
            Self::Crash { empty: true, .. } => "crash with loss of the disk",
            Self::DirectoryAway => "directory away",
            Self::DirectoryMute => "directory answers lost",
            Self::DirectoryHalves => "directory takes halves",
            Self::DirectoryFlushed => "directory flushed",
            Self::DirectoryRestored(_) => "directory restored from an older state",
            Self::SlowDisk(_) => "slow disk",
            Self::StoreAway => "object store away",
            Self::CorruptReads(_) => "corrupting network",
            Self::RottenDisk(_) => "bit rot on disk",
            Self::RottenMemory { .. } => "bit rot in memory",
        }
    }
}

impl World {
    /// Plans the faults of this run.
    pub(crate) fn plan_faults(&mut self) {
        let count = self.rng.between(5, 16);
        let end = self.ends.as_nanos();
        for _ in 0..count {
            let fault = self.pick_fault();
            let begins = self.rng.between(end / 20, end - end / 8);
            let lasts = self.rng.between(50_000_000, 3_000_000_000);
            let index = self.faults.len();
            self.faults.push(fault);
            let at = |nanos: u64| kvtier_types::Instant::from_nanos(nanos);
            self.queue.push(at(begins), Event::Fault { index, begins: true });
            self.queue.push(at((begins + lasts).min(end)), Event::Fault { index, begins: false });
        }
    }

    fn pick_fault(&mut self) -> Fault {
        let node = self.rng.index(self.nodes.len());
        let (from, to) = self.pick_pair();
        match self.rng.below(KINDS) {
            0 => Fault::Loss(self.rng.between(20, 300)),
            1 => Fault::Duplicates(self.rng.between(50, 400)),
            2 => Fault::Reorders(self.rng.between(50, 400)),
            3 => Fault::Echoes(self.rng.between(50, 300)),
            4 => Fault::Cut { from, to, both: true },
            5 => Fault::Cut { from, to, both: false },
            6 | 7 => Fault::Slow { from, to },
            8 | 9 => Fault::Crash { node, empty: self.rng.chance(300), back: self.rng.millis(1, 2500) },
            10 => Fault::DirectoryAway,
            11 => Fault::DirectoryMute,
            12 => Fault::DirectoryHalves,
            13 => Fault::DirectoryFlushed,
            14 => Fault::DirectoryRestored(self.rng.index(8)),
            15 => Fault::SlowDisk(node),
            16 => Fault::StoreAway,
            17 => Fault::CorruptReads(self.rng.between(50, 500)),
            _ if self.rng.chance(500) => Fault::RottenDisk(node),
            _ => Fault::RottenMemory { node, pick: self.rng.next() },
        }
    }

    fn pick_pair(&mut self) -> (Party, Party) {
        let from = self.rng.index(self.nodes.len());
        let to = self.rng.index(self.nodes.len());
        if from == to { (Party::Node(from), Party::Directory) } else { (Party::Node(from), Party::Node(to)) }
    }

    /// A planned fault begins or ends.
    pub(crate) fn fault(&mut self, index: usize, begins: bool) {
        let fault = self.faults[index];
        self.note(format_args!("{}: {fault:?}", if begins { "fault" } else { "over" }));
        if begins {
            self.stats.count("faults", fault.name());
        }
        let level = |rate: u64| if begins { rate } else { 0 };
        match fault {
            Fault::Loss(rate) => self.network.loss = level(rate),
            Fault::Duplicates(rate) => self.network.duplicates = level(rate),
            Fault::Reorders(rate) => self.network.reorders = level(rate),
            Fault::Echoes(rate) => self.network.echoes = level(rate),
            Fault::CorruptReads(rate) => self.network.corrupt_reads = level(rate),
            Fault::Cut { from, to, both } => self.cut((from, to), both, begins),
            Fault::Slow { from, to } => {
                for pair in [(from, to), (to, from)] {
                    if begins {
                        self.network.slow.insert(pair)
                    } else {
                        self.network.slow.remove(&pair)
                    };
                }
            }
            Fault::Crash { node, empty, back } if begins && self.nodes[node].live.is_some() => {
                self.crash(node, empty);
                self.queue.push(self.now + back, Event::Restart { node });
            }
            Fault::DirectoryAway => self.directory.away = begins,
            Fault::DirectoryMute => self.directory.mute = begins,
            Fault::DirectoryHalves => self.directory.halves = begins,
            Fault::DirectoryFlushed if begins => self.directory.table = Table::default(),
            Fault::DirectoryRestored(pick) if begins => self.directory.restore(pick),
            Fault::SlowDisk(node) => self.nodes[node].disk_slow = begins,
            Fault::StoreAway => self.store.away = begins,
            Fault::RottenDisk(node) if begins => {
                self.nodes[node].disk.rot(&mut self.rng);
            }
            Fault::RottenMemory { node, pick } if begins => {
                if let Some(live) = &self.nodes[node].live {
                    live.pool.lock().rot(pick);
                }
            }
            Fault::Crash { .. }
            | Fault::DirectoryFlushed
            | Fault::DirectoryRestored(_)
            | Fault::RottenDisk(_)
            | Fault::RottenMemory { .. } => {}
        }
    }

    fn cut(&mut self, (from, to): (Party, Party), both: bool, begins: bool) {
        let pairs = if both { vec![(from, to), (to, from)] } else { vec![(from, to)] };
        for pair in pairs {
            if begins {
                self.network.cut.insert(pair)
            } else {
                self.network.cut.remove(&pair)
            };
        }
    }
}
