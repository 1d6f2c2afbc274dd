//! S3-FIFO, leaf-first (Yang et al., SOSP'23): a small queue for what came, a main one for what was used again, and a ghost
//! of what left the small one.
//!
//! For an inner block that is to go, the leaf that its last call left goes. Where that call has left none that may go, the
//! block is in use: it is set aside until the next call, and then goes to the end of its queue.

use std::collections::VecDeque;

use super::{KnownId, LeafOrder, Leaves, Order};

/// Share of the small queue, one in so many. What left it is remembered as long as the main queue is.
const SMALL_SHARE: usize = 10;
/// Uses are counted up to here.
const MAX_USES: u8 = 3;
/// Blocks looked at or put back at once; then whatever was used first goes.
const MAX_LOOKED_AT: usize = 1024;

#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// Position in its queue, or when it was set aside; later is larger. Zero: not here.
    order: u64,
    touched: u64,
    /// How many had left the small queue when it did. Zero: it is no ghost.
    ghost: u64,
    main: bool,
    uses: u8,
}

/// One of the two queues: blocks in order; those that left or moved since are passed over.
#[derive(Debug, Default)]
struct Queue {
    line: VecDeque<(u64, KnownId)>,
    count: usize,
}

/// The two queues and the ghost. Which block goes is found with the leaves at hand.
#[derive(Debug)]
pub struct S3Order {
    places: Vec<Place>,
    /// Small, main.
    queues: [Queue; 2],
    /// How many of those that left the small queue are remembered.
    ghosts: u64,
    left_small: u64,
    next: u64,
    /// In use when they were at the head of their queue.
    aside: Vec<(u64, KnownId)>,
    /// The call of the latest use.
    call: u64,
}

impl Order for S3Order {
    fn new(capacity_blocks: usize) -> Self {
        Self {
            places: Vec::new(),
            queues: [Queue::default(), Queue::default()],
            ghosts: (capacity_blocks - capacity_blocks / SMALL_SHARE) as u64,
            left_small: 0,
            next: 0,
            aside: Vec::new(),
            call: 0,
        }
    }

    fn came(&mut self, id: KnownId, fresh: bool, touched: u64) {
        if self.places.len() <= id.index() {
            self.places.resize(id.index() + 1, Place::default());
        }
        let ghost = std::mem::take(&mut self.places[id.index()].ghost);
        let main = !fresh && ghost > 0 && self.left_small - ghost < self.ghosts;
        self.places[id.index()].touched = touched;
        self.put_back(touched);
        self.enqueue(id, main, 0);
    }

    fn used(&mut self, id: KnownId, touched: u64) {
        let place = &mut self.places[id.index()];
        place.uses = (place.uses + 1).min(MAX_USES);
        place.touched = touched;
        self.put_back(touched);
    }

    fn left(&mut self, id: KnownId, evicted: bool) {
        self.dequeue(id);
        let place = &mut self.places[id.index()];
        if evicted && !place.main {
            self.left_small += 1;
            place.ghost = self.left_small;
        }
    }

    /// The next to go of the leaves. O(log n), amortized: what is looked at in vain was used since, or is in use.
    fn choose(&mut self, leaves: &Leaves) -> Option<KnownId> {
        if leaves.is_empty() {
            return None;
        }
        for _ in 0..MAX_LOOKED_AT {
            let giving = self.giving();
            let head = self.head(giving).or_else(|| self.head(1 - giving))?;
            let place = self.places[head.index()];
            let Some(leaf) = leaves.of_call(place.touched) else {
                self.queues[usize::from(place.main)].line.pop_front();
                self.aside.push((place.order, head));
                continue;
            };
            if place.uses == 0 {
                return Some(leaf);
            }
            // Out of the small queue with its uses forgotten; in the main one it stays as often as it was used.
            let uses = if place.main { place.uses - 1 } else { 0 };
            self.dequeue(head);
            self.enqueue(head, true, uses);
        }
        None
    }
}

impl S3Order {
    /// Puts what was set aside back in line once another call uses blocks.
    fn put_back(&mut self, call: u64) {
        if self.call == call || self.aside.is_empty() {
            return;
        }
        self.call = call;
        let from = self.aside.len().saturating_sub(MAX_LOOKED_AT);
        for (order, id) in self.aside.split_off(from) {
            let place = self.places[id.index()];
            if place.order == order {
                self.dequeue(id);
                self.enqueue(id, place.main, place.uses);
            }
        }
    }

    /// Which queue is to give: 0 the small one, 1 the main one.
    fn giving(&self) -> usize {
        let [small, main] = &self.queues;
        usize::from(main.count > 0 && small.count * SMALL_SHARE < small.count + main.count)
    }

    fn enqueue(&mut self, id: KnownId, main: bool, uses: u8) {
        self.next += 1;
        let place = &mut self.places[id.index()];
        *place = Place { order: self.next, main, uses, ..*place };
        let queue = &mut self.queues[usize::from(main)];
        queue.count += 1;
        queue.line.push_back((place.order, id));
        if queue.line.len() > 2 * queue.count + 64 {
            let places = &self.places;
            queue.line.retain(|(order, id)| places[id.index()].order == *order);
        }
    }

    fn dequeue(&mut self, id: KnownId) {
        let place = &mut self.places[id.index()];
        self.queues[usize::from(place.main)].count -= 1;
        place.order = 0;
    }

    /// The block at the head of a queue.
    fn head(&mut self, queue: usize) -> Option<KnownId> {
        let (places, line) = (&self.places, &mut self.queues[queue].line);
        while let Some((order, id)) = line.front() {
            if places[id.index()].order == *order {
                return Some(*id);
            }
            line.pop_front();
        }
        None
    }
}

/// Leaf-first S3-FIFO.
pub type LeafS3Fifo = LeafOrder<S3Order>;
