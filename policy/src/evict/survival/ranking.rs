//! The blocks of one pool by the rank of their segments.
//!
//! Segments of one class, age and standing have one value and stand in one cell, oldest first; cells are ordered by value.
//! When a segment grows older it moves to the next cell; when a class is refitted, its cells move.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::segment::{Change, SegmentId};
use super::segments::Segments;
use crate::evict::{Facts, KnownId, Ranking};

/// A segment with blocks that may go, or that had some a moment ago.
#[derive(Debug, Default)]
struct Queue {
    /// It stands in a cell.
    placed: bool,
    cell: u32,
    touched: u64,
    blocks: BTreeSet<(Reverse<u32>, KnownId)>,
}

#[derive(Debug, Default)]
struct Members {
    value: u32,
    segments: BTreeSet<(u64, SegmentId)>,
}

/// Survival ranking of one pool. O(log n) per operation, amortized.
#[derive(Debug, Default)]
pub struct SurvivalRanking {
    /// By number of the segment; the first is of blocks of no segment.
    queues: Vec<Queue>,
    cells: BTreeMap<u32, Members>,
    /// Cells with segments, by value.
    order: BTreeSet<(u32, u32)>,
    taken_in: u64,
    len: usize,
    /// The last segment of which nothing may go any more: the block before is likely to be offered at once.
    emptied: Option<SegmentId>,
}

impl SurvivalRanking {
    fn put(&mut self, id: SegmentId, touched: u64, (cell, value): (u32, f32)) {
        let members = self.cells.entry(cell).or_default();
        if members.segments.is_empty() {
            members.value = ordered(value);
            self.order.insert((members.value, cell));
        }
        members.segments.insert((touched, id));
    }

    fn take(&mut self, id: SegmentId, touched: u64, cell: u32) {
        let members = self.cells.get_mut(&cell).expect("a ranked segment stands in a cell");
        members.segments.remove(&(touched, id));
        if members.segments.is_empty() {
            self.order.remove(&(members.value, cell));
            self.cells.remove(&cell);
        }
    }

    /// Takes a segment out of its cell if nothing of it may go.
    fn drop_if_empty(&mut self, id: SegmentId) {
        let queue = &mut self.queues[slot(id)];
        if queue.placed && queue.blocks.is_empty() {
            queue.placed = false;
            let (touched, cell) = (queue.touched, queue.cell);
            self.take(id, touched, cell);
        }
    }

    fn place(&mut self, id: SegmentId, segments: &Segments) {
        let Some(queue) = self.queues.get_mut(slot(id)).filter(|queue| queue.placed) else { return };
        let cell = segments.cell(id);
        if queue.cell != cell.key {
            let (from, touched) = (std::mem::replace(&mut queue.cell, cell.key), queue.touched);
            self.take(id, touched, from);
            self.put(id, touched, (cell.key, cell.value));
        }
    }

    fn revalue(&mut self, class: u8, segments: &Segments) {
        let from = u32::from(class) << 16;
        for (&cell, members) in self.cells.range_mut(from..from + (1 << 16)) {
            let value = ordered(segments.value(cell));
            if members.value != value {
                self.order.remove(&(members.value, cell));
                self.order.insert((value, cell));
                members.value = value;
            }
        }
    }
}

impl Ranking for SurvivalRanking {
    fn came(&mut self, _id: KnownId, _fresh: bool, _touched: u64) {}

    fn used(&mut self, _id: KnownId, _touched: u64) {}

    fn left(&mut self, _id: KnownId, _evicted: bool) {}

    fn offer(&mut self, id: KnownId, facts: Facts, segments: &Segments) {
        self.len += 1;
        let at = slot(facts.segment);
        if self.queues.len() <= at {
            self.queues.resize_with(at + 1, Queue::default);
        }
        if self.queues[at].touched != facts.touched {
            // The number was another segment's.
            self.drop_if_empty(facts.segment);
        }
        let queue = &mut self.queues[at];
        queue.blocks.insert((Reverse(facts.depth_blocks), id));
        if !queue.placed {
            let cell = segments.cell(facts.segment);
            (queue.placed, queue.cell, queue.touched) = (true, cell.key, facts.touched);
            self.put(facts.segment, facts.touched, (cell.key, cell.value));
        }
    }

    fn withdraw(&mut self, id: KnownId, facts: Facts) {
        self.len -= 1;
        let queue = &mut self.queues[slot(facts.segment)];
        let known = queue.blocks.remove(&(Reverse(facts.depth_blocks), id));
        assert!(known, "a block is withdrawn with the facts it was offered with");
        if queue.blocks.is_empty() {
            let before = self.emptied.replace(facts.segment);
            if let Some(before) = before.filter(|before| *before != facts.segment) {
                self.drop_if_empty(before);
            }
        }
    }

    fn settle(&mut self, segments: &Segments) {
        let (changes, end) = segments.changes_since(self.taken_in);
        self.taken_in = end;
        if let Some(changes) = changes {
            for change in changes {
                match change {
                    Change::Place(id) => self.place(id, segments),
                    Change::Class(class) => self.revalue(class, segments),
                }
            }
            return;
        }
        (0..self.queues.len()).for_each(|at| self.place(of_slot(at), segments));
        (0..=u8::MAX).for_each(|class| self.revalue(class, segments));
    }

    fn first(&self) -> Option<KnownId> {
        self.victims().next()
    }

    fn victims(&self) -> Box<dyn Iterator<Item = KnownId> + '_> {
        let segments = self.order.iter().flat_map(|(_, cell)| &self.cells[cell].segments);
        Box::new(segments.flat_map(|(_, id)| &self.queues[slot(*id)].blocks).map(|(_, id)| *id))
    }

    fn len(&self) -> usize {
        self.len
    }
}

/// Bits of a value that is not negative, in its order.
const fn ordered(value: f32) -> u32 {
    value.to_bits()
}

/// Where a segment's queue is.
const fn slot(id: SegmentId) -> usize {
    id.raw().wrapping_add(1) as usize
}

#[expect(clippy::cast_possible_truncation, reason = "slots were numbers of segments before")]
const fn of_slot(at: usize) -> SegmentId {
    SegmentId::from_raw((at as u32).wrapping_sub(1))
}
