//! A bounded memory of keys that left, and why: it tells an evicted block from one that never was.

use std::collections::VecDeque;

use kvtier_types::BlockKey;
use rustc_hash::FxHashMap;

use crate::ledger::MissReason;

/// The last `capacity` departures; a key that comes back is forgotten here.
#[derive(Debug)]
pub(crate) struct Ghost {
    capacity: usize,
    reasons: FxHashMap<u64, MissReason>,
    order: VecDeque<u64>,
}

impl Ghost {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, reasons: FxHashMap::default(), order: VecDeque::new() }
    }

    pub(crate) fn insert(&mut self, key: &BlockKey, reason: MissReason) {
        let short = short(key);
        if self.reasons.insert(short, reason).is_none() {
            self.order.push_back(short);
        }
        while self.order.len() > self.capacity {
            if let Some(oldest) = self.order.pop_front() {
                self.reasons.remove(&oldest);
            }
        }
    }

    pub(crate) fn get(&self, key: &BlockKey) -> Option<MissReason> {
        self.reasons.get(&short(key)).copied()
    }
}

/// Sixty-four bits of a digest: a collision only mislabels one miss.
pub(crate) fn short(key: &BlockKey) -> u64 {
    let (head, _) = key.as_bytes().split_first_chunk::<8>().expect("a digest has 32 bytes");
    u64::from_le_bytes(*head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_the_latest_departures_only() {
        let mut ghost = Ghost::new(2);
        let key = |n: u8| BlockKey::new([n; 32]);
        ghost.insert(&key(1), MissReason::Evicted);
        ghost.insert(&key(2), MissReason::Corrupt);
        ghost.insert(&key(3), MissReason::Evicted);
        assert_eq!(ghost.get(&key(1)), None);
        assert_eq!(ghost.get(&key(2)), Some(MissReason::Corrupt));
        assert_eq!(ghost.get(&key(3)), Some(MissReason::Evicted));
    }
}
