//! What programs are made of: blocks in a tree of prefixes, and steps on it.

use std::time::Duration;

use kvtier_policy::evict::survival::StopReason;
use kvtier_types::SemanticType;

/// The beginning of every prefix.
pub(crate) const ROOT: u32 = u32::MAX;
/// The owner of what all lanes share.
pub(crate) const SHARED: u32 = u32::MAX;

/// All blocks of a workload. A prefix is named by its last block.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    parent: Vec<u32>,
    depth: Vec<u32>,
    semantic: Vec<SemanticType>,
    owner: Vec<u32>,
}

impl Tree {
    /// Adds so many blocks below `tip`. Returns the new tip.
    pub(crate) fn grow(&mut self, tip: u32, blocks: u32, semantic: SemanticType, owner: u32) -> u32 {
        let mut tip = tip;
        for _ in 0..blocks {
            let depth = self.length(tip);
            self.parent.push(tip);
            self.depth.push(depth);
            self.semantic.push(semantic);
            self.owner.push(owner);
            tip = u32::try_from(self.parent.len() - 1).expect("fewer blocks than four billion");
        }
        tip
    }

    /// Blocks of the prefix that ends with `tip`.
    pub(crate) fn length(&self, tip: u32) -> u32 {
        if tip == ROOT { 0 } else { self.depth[tip as usize] + 1 }
    }

    /// The first so many blocks of the prefix that ends with `tip`, as the tip they end with.
    pub(crate) fn cut(&self, tip: u32, blocks: u32) -> u32 {
        let mut tip = tip;
        while self.length(tip) > blocks {
            tip = self.parent[tip as usize];
        }
        tip
    }

    /// The blocks of a prefix, first to last, into `path`.
    pub(crate) fn path(&self, tip: u32, path: &mut Vec<u32>) {
        path.clear();
        let mut at = tip;
        while at != ROOT {
            path.push(at);
            at = self.parent[at as usize];
        }
        path.reverse();
    }

    /// Tells each owner of a prefix, once for each run of its blocks.
    pub(crate) fn owners(&self, tip: u32, mut each: impl FnMut(u32)) {
        let (mut at, mut before) = (tip, SHARED);
        while at != ROOT {
            let owner = self.owner[at as usize];
            if owner != before {
                each(owner);
                before = owner;
            }
            at = self.parent[at as usize];
        }
    }

    pub(crate) fn parent(&self, block: u32) -> u32 {
        self.parent[block as usize]
    }

    pub(crate) fn semantic(&self, block: u32) -> SemanticType {
        self.semantic[block as usize]
    }

    pub(crate) fn owner(&self, block: u32) -> u32 {
        self.owner[block as usize]
    }

    /// Blocks in all.
    pub(crate) fn len(&self) -> usize {
        self.parent.len()
    }
}

/// One model call of a program.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    /// The line of steps it belongs to, of the whole workload.
    pub(crate) lane: u32,
    /// Steps of its program that come before it.
    pub(crate) after: Vec<u32>,
    /// From the end of the last of these to its beginning: a tool runs, or a person thinks.
    pub(crate) gap: Duration,
    /// What runs in the gap: tools of one kind take alike.
    pub(crate) tool: u8,
    /// The end of its prompt.
    pub(crate) prompt: u32,
    /// The end of its prompt and answer.
    pub(crate) end: u32,
    pub(crate) output_tokens: u32,
    /// Why it ends.
    pub(crate) stop: StopReason,
    /// No step of its lane follows.
    pub(crate) last: bool,
}

/// A program: steps in an order in which each comes after those it waits for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Program {
    /// From the beginning of the run; in a closed population, from when there is a place.
    pub(crate) arrives: Duration,
    pub(crate) steps: Vec<Step>,
    /// Lanes, from first to before last.
    pub(crate) lanes: (u32, u32),
}

/// Programs, and the blocks they use.
#[derive(Debug, Default)]
pub(crate) struct Work {
    pub(crate) tree: Tree,
    pub(crate) programs: Vec<Program>,
    pub(crate) lanes: u32,
    pub(crate) block_tokens: u32,
}
