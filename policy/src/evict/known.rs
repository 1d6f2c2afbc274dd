//! Numbers for the blocks that a ranking knows: those that are here, and the latest that left (ghosts).
//!
//! Rankings keep what they know of a block under its number, so that a block that comes back while it is remembered costs
//! one look-up of its key however many rankings there are.
//!
//! *Bounds*: as many numbers as blocks are held, and `ghosts` more. O(1) per operation, amortized.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

/// Number of a block that is here or remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KnownId(u32);

impl KnownId {
    /// From an index.
    #[must_use]
    pub const fn new(index: u32) -> Self {
        Self(index)
    }

    /// The number as an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

#[derive(Debug, Clone, Copy)]
struct Slot<T> {
    key: u64,
    holds: u32,
    /// When it was let go; what waits in line with another stamp was held again since.
    stamp: u32,
    value: T,
}

/// Numbers of blocks by key, each with a value.
#[derive(Debug)]
pub struct Known<T> {
    index: FxHashMap<u64, u32>,
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    /// Blocks that nobody holds, in the order in which they left.
    line: VecDeque<(u32, u32)>,
    ghosts: usize,
    capacity: usize,
    stamp: u32,
}

impl<T: Copy + Default> Known<T> {
    /// Remembers so many blocks that nobody holds.
    #[must_use]
    pub fn new(ghosts: usize) -> Self {
        Self {
            index: FxHashMap::default(),
            slots: Vec::new(),
            free: Vec::new(),
            line: VecDeque::new(),
            ghosts: 0,
            capacity: ghosts,
            stamp: 0,
        }
    }

    /// Holds the block with this key. Returns its number, and whether that is fresh: nothing was known of the block.
    pub fn hold_key(&mut self, key: u64) -> (KnownId, bool) {
        if let Some(&at) = self.index.get(&key) {
            self.hold(KnownId(at));
            return (KnownId(at), false);
        }
        let slot = Slot { key, holds: 1, stamp: 0, value: T::default() };
        let at = if let Some(at) = self.free.pop() {
            self.slots[at as usize] = slot;
            at
        } else {
            self.slots.push(slot);
            u32::try_from(self.slots.len() - 1).expect("fewer blocks than four billion")
        };
        self.index.insert(key, at);
        (KnownId(at), true)
    }

    /// Holds a block once more.
    pub fn hold(&mut self, id: KnownId) {
        let slot = &mut self.slots[id.index()];
        slot.holds += 1;
        if slot.holds == 1 {
            slot.stamp = 0;
            self.ghosts -= 1;
        }
    }

    /// Lets go of a block: when nobody holds it any more, it is remembered for a while.
    pub fn release(&mut self, id: KnownId) {
        let slot = &mut self.slots[id.index()];
        slot.holds -= 1;
        if slot.holds == 0 {
            // Zero means held.
            self.stamp = self.stamp.checked_add(1).unwrap_or(1);
            slot.stamp = self.stamp;
            self.ghosts += 1;
            self.line.push_back((id.0, self.stamp));
            self.tidy();
        }
    }

    /// Forgets the block that left first if too many are remembered. Returns its number and value.
    pub fn forget(&mut self) -> Option<(KnownId, T)> {
        while self.ghosts > self.capacity {
            let (at, stamp) = self.line.pop_front()?;
            let slot = self.slots[at as usize];
            if slot.holds == 0 && slot.stamp == stamp {
                self.index.remove(&slot.key);
                self.slots[at as usize].stamp = 0;
                self.free.push(at);
                self.ghosts -= 1;
                return Some((KnownId(at), slot.value));
            }
        }
        None
    }

    /// Blocks that were held again leave their place in line behind: it goes when half the line is such.
    fn tidy(&mut self) {
        if self.line.len() > 2 * self.ghosts + 64 {
            let slots = &self.slots;
            self.line.retain(|(at, stamp)| slots[*at as usize].stamp == *stamp);
        }
    }

    /// The value of a block.
    #[must_use]
    pub fn value(&self, id: KnownId) -> T {
        self.slots[id.index()].value
    }

    /// Sets the value of a block.
    pub fn set(&mut self, id: KnownId, value: T) {
        self.slots[id.index()].value = value;
    }

    /// Numbers in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Bytes of its own memory, by capacity.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.index.capacity() * (size_of::<(u64, u32)>() + 1)
            + self.slots.capacity() * size_of::<Slot<T>>()
            + (self.free.capacity() + 2 * self.line.capacity()) * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Just, Strategy, prop, prop_oneof, proptest};

    use super::*;

    #[derive(Debug, Clone, Copy)]
    enum Op {
        Hold(u64),
        Release(u64),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let op = (0..12_u64).prop_flat_map(|key| prop_oneof![Just(Op::Hold(key)), Just(Op::Release(key))]);
        prop::collection::vec(op, 0..300)
    }

    proptest! {
        /// Against a plain list of who is held and who left in which order.
        #[test]
        fn remembers_as_a_list_would(ops in ops(), ghosts in 0_usize..5) {
            let mut known = Known::<u64>::new(ghosts);
            let mut held: std::collections::BTreeMap<u64, (KnownId, u32)> = std::collections::BTreeMap::new();
            let mut left: Vec<(u64, KnownId)> = Vec::new();
            for op in ops {
                match op {
                    Op::Hold(key) => {
                        let (id, fresh) = known.hold_key(key);
                        let ghost = left.iter().position(|(k, _)| *k == key).map(|at| left.remove(at));
                        let before = held.get(&key).map(|(id, _)| *id).or(ghost.map(|(_, id)| id));
                        assert_eq!(fresh, before.is_none());
                        assert!(before.is_none_or(|before| before == id));
                        if fresh {
                            known.set(id, key);
                        }
                        held.entry(key).or_insert((id, 0)).1 += 1;
                    }
                    Op::Release(key) => {
                        let Some((id, holds)) = held.get_mut(&key) else { continue };
                        known.release(*id);
                        *holds -= 1;
                        if *holds == 0 {
                            left.push((key, *id));
                            held.remove(&key);
                        }
                    }
                }
                while let Some((id, value)) = known.forget() {
                    assert_eq!((value, id), left.remove(0), "the first to leave is forgotten first");
                }
                assert!(left.len() <= ghosts);
                assert_eq!(known.len(), held.len() + left.len());
                assert!(known.line.len() <= 2 * left.len() + 65);
            }
        }
    }
}
