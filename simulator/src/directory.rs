//! The directory: the policy's own table behind messages, with faults.

use std::collections::VecDeque;

use kvtier_policy::directory::{Batch, Digest, Table, record_ttl};
use kvtier_types::{Edition, NodeNumber};

use crate::network::{Answer, Ask, Message, Party};
use crate::node::HEARTBEAT;
use crate::world::{Sabotage, World};

/// Snapshots kept for faults to restore.
const SNAPSHOTS: usize = 6;

/// The directory's state.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    pub(crate) table: Table,
    /// What it would hold had it never lost anything: the answers of a sabotaged run.
    perfect: Table,
    snapshots: VecDeque<Table>,
    pub(crate) away: bool,
    /// Carries out what it is asked and does not answer.
    pub(crate) mute: bool,
    /// Carries out a part of what it is asked and does not answer.
    pub(crate) halves: bool,
}

impl Directory {
    pub(crate) fn snapshot(&mut self) {
        if self.snapshots.len() >= SNAPSHOTS {
            self.snapshots.pop_front();
        }
        self.snapshots.push_back(self.table.clone());
    }

    pub(crate) fn restore(&mut self, pick: usize) {
        let at = pick % self.snapshots.len().max(1);
        if let Some(old) = self.snapshots.get(at) {
            self.table = old.clone();
        }
    }

    fn apply(&mut self, node: NodeNumber, edition: Edition, batches: &[Batch]) -> Vec<(Edition, Digest)> {
        batches.iter().map(|batch| self.table.apply(node, edition, batch)).collect()
    }
}

impl World {
    /// A node asks the directory.
    pub(crate) fn ask_arrived(&mut self, from: Party, life: u64, call: u64, (node, ask): (NodeNumber, Ask)) {
        if self.directory.away {
            self.stats.count("faults", "directory did not hear");
            return;
        }
        let Some(answer) = self.answer(node, ask) else { return };
        if self.directory.mute {
            self.stats.count("faults", "directory did not answer");
            return;
        }
        self.send(Party::Directory, from, Message::Answer { life, call, answer });
    }

    fn answer(&mut self, node: NodeNumber, ask: Ask) -> Option<Answer> {
        let deaf = self.options.sabotage == Some(Sabotage::DigestDropped);
        Some(match ask {
            Ask::Heartbeat(record) => {
                Answer::Heard(self.directory.table.heartbeat(self.now, &record, record_ttl(HEARTBEAT)))
            }
            Ask::Apply(edition, batches) => {
                let half = self.directory.halves && self.rng.chance(300);
                let taken = if half { &batches[..batches.len() / 2] } else { &batches[..] };
                let answers = self.directory.apply(node, edition, taken);
                if half {
                    self.stats.count("faults", "flight half taken");
                }
                if deaf {
                    // The sabotage: the node is told what it expects.
                    let perfect = &mut self.directory.perfect;
                    return Some(Answer::Applied(batches.iter().map(|b| perfect.apply(node, edition, b)).collect()));
                }
                if half {
                    return None;
                }
                Answer::Applied(answers)
            }
            Ask::Digests(edition) => {
                let table = if deaf { &self.directory.perfect } else { &self.directory.table };
                Answer::Digests(edition, table.digests(node, edition))
            }
            Ask::Locate(keys) => Answer::Located(self.directory.table.locate(&keys)),
        })
    }
}
