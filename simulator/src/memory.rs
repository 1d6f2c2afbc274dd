//! Host memory with contents: the policy's own twin pool, and what lies in each of its frames.
//!
//! A block's bytes are [`CHUNKS`] words that only one sealing has, so that bytes of two sealings, mixed, show.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvtier_policy::{Allocation, FramePool, FrameRef, TwinPool};
use kvtier_types::ShardKey;
use rustc_hash::FxHashMap;

use crate::rng::mix;

/// Pieces a block is moved in.
pub(crate) const CHUNKS: usize = 4;
/// Bytes of a block.
pub(crate) const BLOCK: u64 = 4096;

/// A block's bytes.
pub(crate) type Words = [u64; CHUNKS];

/// The bytes of a sealing.
pub(crate) fn words_of(sealing: u64) -> Words {
    std::array::from_fn(|at| mix(sealing.wrapping_mul(31).wrapping_add(at as u64)))
}

/// The checksum of a block's bytes.
pub(crate) fn checksum(words: &Words) -> u64 {
    words.iter().fold(0xcbf2_9ce4_8422_2325, |sum, word| mix(sum ^ word))
}

/// Every sealing there ever was: what a reader may be given.
#[derive(Debug, Default)]
pub(crate) struct Sealings {
    last: u64,
    of_key: FxHashMap<ShardKey, Vec<u64>>,
}

impl Sealings {
    /// A number for bytes about to be written.
    pub(crate) const fn take(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// The bytes of `sealing` were sealed under a key.
    pub(crate) fn sealed(&mut self, key: ShardKey, sealing: u64) {
        self.of_key.entry(key).or_default().push(sealing);
    }

    /// Whether bytes are those of one sealing of the key, whole.
    pub(crate) fn is_one_of(&self, key: &ShardKey, words: &Words) -> bool {
        self.of_key.get(key).is_some_and(|all| all.iter().any(|sealing| words_of(*sealing) == *words))
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Page {
    /// Of the frame that lies here, zero while there is none.
    generation: u64,
    words: Words,
    /// Its bytes are not what was written there: whoever finds out may give it back at once.
    spoilt: bool,
}

/// A node's host memory.
#[derive(Debug)]
pub(crate) struct Memory {
    pool: TwinPool,
    pages: Vec<Page>,
    freed: Vec<FrameRef>,
}

impl Memory {
    pub(crate) fn used_bytes(&self) -> u64 {
        self.pool.used_bytes()
    }

    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.pool.capacity_bytes()
    }

    /// Frames given back since the last call, those found spoilt left out.
    pub(crate) fn take_freed(&mut self) -> Vec<FrameRef> {
        std::mem::take(&mut self.freed)
    }

    /// Whether a frame is still what it was handed out as.
    pub(crate) fn holds(&self, frame: FrameRef) -> bool {
        self.page(frame).generation == frame.generation
    }

    /// What lies where a frame lies, whoever it belongs to by now: as one-sided reads see it.
    pub(crate) fn read(&self, frame: FrameRef) -> Words {
        self.page(frame).words
    }

    /// Writes into a frame, if it is still there. The arena's pins see to that in the daemon: what outlives its frame
    /// writes where nobody looks.
    pub(crate) fn write(&mut self, frame: FrameRef, words: &Words) {
        if self.holds(frame) {
            self.pages[frame.page as usize].words = *words;
        }
    }

    /// Writes where a frame lies even if it is another's by now: as an engine does that stalled for too long.
    pub(crate) fn write_anyway(&mut self, frame: FrameRef, words: &Words) {
        let page = &mut self.pages[frame.page as usize];
        page.words = *words;
        page.spoilt |= page.generation != frame.generation;
    }

    /// Flips a bit of a frame in use. Answers whether there was one.
    pub(crate) fn rot(&mut self, pick: u64) -> bool {
        let used: Vec<usize> = (0..self.pages.len()).filter(|at| self.pages[*at].generation > 0).collect();
        let Some(at) = usize::try_from(pick).ok().and_then(|pick| used.get(pick % used.len().max(1))) else {
            return false;
        };
        self.pages[*at].words[0] ^= 1 << (pick % 64);
        self.pages[*at].spoilt = true;
        true
    }

    fn page(&self, frame: FrameRef) -> &Page {
        &self.pages[frame.page as usize]
    }
}

/// The pool as the core has it; the simulation keeps the other end.
#[derive(Debug, Clone)]
pub(crate) struct SharedPool(Arc<Mutex<Memory>>);

impl SharedPool {
    pub(crate) fn new(frames: u64) -> Self {
        let pool = TwinPool::new(frames * BLOCK);
        Self(Arc::new(Mutex::new(Memory { pool, pages: Vec::new(), freed: Vec::new() })))
    }

    /// Its memory. One thread runs a seed, so nobody ever waits here.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FramePool for SharedPool {
    fn alloc(&mut self, bytes: u64) -> Allocation {
        let mut memory = self.lock();
        let granted = memory.pool.alloc(bytes);
        if let Allocation::Granted(frame) = granted {
            let page = frame.page as usize;
            if memory.pages.len() <= page {
                memory.pages.resize(page + 1, Page::default());
            }
            // What lay there stays, as in real memory.
            memory.pages[page].generation = frame.generation;
            memory.pages[page].spoilt = false;
        }
        granted
    }

    fn free(&mut self, frame: FrameRef, bytes: u64) {
        let mut memory = self.lock();
        memory.pool.free(frame, bytes);
        memory.pages[frame.page as usize].generation = 0;
        if !memory.pages[frame.page as usize].spoilt {
            memory.freed.push(frame);
        }
    }

    fn class(&self, bytes: u64) -> u64 {
        bytes
    }

    fn victim_extents(&self, _bytes: u64, _most: usize) -> Vec<u32> {
        Vec::new()
    }

    fn capacity_bytes(&self) -> u64 {
        self.lock().pool.capacity_bytes()
    }
}
