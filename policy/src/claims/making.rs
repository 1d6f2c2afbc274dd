//! Claims made, let go and cut some blocks at a time, so that no call on many blocks keeps others from the core for long.
//!
//! The shell gives nobody else's claim a turn between two steps of one: only more of a block's shards may come in between, and
//! those wait to be charged (`Claims::making`).

use kvtier_types::{BlockKey, ClaimBlock, ClaimName};
use rustc_hash::{FxHashMap, FxHashSet};

use super::{Claim, Claims, Fit, Short, Sums, Wanted};

/// How much of a wanted claim fits, as far as that was worked out.
#[derive(Debug)]
pub(crate) struct Fitting {
    /// Bytes of the node and of the owner with the units so far, and with the blocks so far of the next one.
    whole: (Sums, Sums),
    begun: (Sums, Sums),
    /// Blocks that claims may still hold.
    room: usize,
    seen: FxHashSet<BlockKey>,
    /// Blocks of the claim to be replaced that were taken off.
    taken_off: usize,
    /// The next block.
    at: usize,
    fit: Fit,
}

impl Fitting {
    pub(crate) const fn fit(&self) -> Fit {
        self.fit
    }
}

/// A claim that takes its blocks.
#[derive(Debug)]
pub(crate) struct Taking {
    number: u32,
    /// The next block, and where those end that fit.
    at: usize,
    end: usize,
}

/// A claim that is cut.
#[derive(Debug)]
pub(crate) struct Cutting {
    going: FxHashMap<BlockKey, bool>,
    /// The next of the claim's blocks, and those before it that stay.
    at: usize,
    left: Vec<ClaimBlock>,
}

impl Cutting {
    /// These blocks are to go.
    pub(crate) fn new(keys: &[BlockKey]) -> Self {
        Self { going: keys.iter().map(|key| (*key, false)).collect(), at: 0, left: Vec::new() }
    }

    /// Whether a block was in the claim.
    pub(crate) fn had(&self, key: &BlockKey) -> bool {
        self.going.get(key).copied().unwrap_or(false)
    }
}

impl Claims {
    /// Begins to work out how much of a claim fits beside those that live, the one it replaces aside.
    pub(crate) fn fitting(&self, wanted: &Wanted) -> Fitting {
        let own = self.usage.owner_of(&wanted.name).map_or_else(Sums::default, |owner| self.usage.of_owner(owner));
        let sums = (self.usage.node, own);
        let former = self.get(&wanted.name).map_or(0, |claim| claim.blocks.len());
        let room = self.config.max_blocks.saturating_sub(self.block_count) + former;
        let fit = Fit { units: 0, short: None };
        Fitting { whole: sums, begun: sums, room, seen: FxHashSet::default(), taken_off: 0, at: 0, fit }
    }

    /// Goes on with at most so many blocks. Answers whether some are left.
    pub(crate) fn fit_some(&self, wanted: &Wanted, f: &mut Fitting, most: usize) -> bool {
        let former = self.names.get(&wanted.name).copied();
        let (owner, kept) = (self.usage.owner_of(&wanted.name), self.keeps(wanted.kind));
        for _ in 0..most {
            let replaced = former.and_then(|number| Some((self.claim(number).blocks.get(f.taken_off)?, number)));
            if let Some((block, number)) = replaced {
                self.uncharge_for(block, number, (&mut f.whole.0, &mut f.whole.1));
                f.begun = f.whole;
                f.taken_off += 1;
                continue;
            }
            let Some(end) = wanted.ends.get(f.fit.units) else { return false };
            if f.at == *end {
                f.whole = f.begun;
                f.fit.units += 1;
                continue;
            }
            let block = &wanted.blocks[f.at];
            f.at += 1;
            if !f.seen.insert(block.key) {
                continue;
            }
            let short = if f.room == 0 {
                Some(Short::Blocks)
            } else {
                self.charge(block, (former, owner, kept), (&mut f.begun.0, &mut f.begun.1))
            };
            if short.is_some() {
                f.fit.short = short;
                return false;
            }
            f.room -= 1;
        }
        true
    }

    /// Begins a claim of the units that fit, whose blocks are these: no two alike. One of its name has let go, and no other
    /// takes its blocks; the caller goes on until all are taken. It is told of as if all were.
    pub(crate) fn take(&mut self, wanted: &Wanted, fit: Fit, mut blocks: Vec<ClaimBlock>) -> Taking {
        let end = fit.units.checked_sub(1).map_or(0, |last| wanted.ends[last]);
        blocks.truncate(end);
        if let Some(former) = self.replaced.take() {
            self.leaving.retain(|(number, _)| *number != former);
            self.free_claim(former);
        }
        let owner = self.usage.acquire(&wanted.name);
        let claim = Claim {
            name: wanted.name.clone(),
            revision: wanted.revision,
            kind: wanted.kind,
            expires: wanted.expires,
            blocks,
            owner,
        };
        let number = self.free.pop().unwrap_or_else(|| {
            self.slab.push(None);
            u32::try_from(self.slab.len() - 1).expect("claims are bounded")
        });
        self.deadlines.insert((claim.expires, number));
        self.names.insert(wanted.name.clone(), number);
        self.slab[number as usize] = Some(claim);
        Taking { number, at: 0, end }
    }

    /// Takes at most so many blocks more. Answers whether some are left.
    pub(crate) fn take_some(&mut self, wanted: &Wanted, taking: &mut Taking, most: usize) -> bool {
        let upto = taking.end.min(taking.at.saturating_add(most));
        for block in &wanted.blocks[taking.at..upto] {
            self.hold(block, taking.number);
        }
        taking.at = upto;
        upto < taking.end
    }

    /// Ends a claim: its blocks are let go by [`Self::let_go_some`]. Answers with its revision.
    pub(crate) fn end(&mut self, name: &ClaimName) -> Option<u64> {
        let number = self.names.remove(name)?;
        let (expires, revision) = (self.claim(number).expires, self.claim(number).revision);
        self.deadlines.remove(&(expires, number));
        self.leave(number);
        Some(revision)
    }

    /// A claim lets go, if there is one, since another of its name is to take its place: until then it is told of as it was.
    pub(crate) fn replace(&mut self, name: &ClaimName) {
        let Some(&number) = self.names.get(name) else { return };
        let expires = self.claim(number).expires;
        self.deadlines.remove(&(expires, number));
        self.leave(number);
        self.replaced = Some(number);
    }

    fn leave(&mut self, number: u32) {
        let blocks = self.claim(number).blocks.len();
        self.leaving.push_back((number, blocks));
    }

    fn free_claim(&mut self, number: u32) {
        let Claim { owner, name, .. } = self.slab[number as usize].take().expect("claims that leave are here");
        self.usage.release(owner, &name);
        self.free.push(number);
    }

    /// Lets at most so many blocks of ended claims go. Answers whether some are left.
    pub(crate) fn let_go_some(&mut self, most: usize) -> bool {
        for _ in 0..most {
            let Some((number, left)) = self.leaving.front_mut() else { return false };
            let number = *number;
            if *left > 0 {
                *left -= 1;
                let block = self.slab[number as usize].as_ref().expect("claims that leave are here").blocks[*left];
                self.let_go(&block, number);
            } else if self.replaced == Some(number) {
                // The one that takes its place comes next.
                return false;
            } else {
                self.free_claim(number);
                self.leaving.pop_front();
            }
        }
        true
    }

    /// Takes blocks out of a live claim, whose new revision counts: looks at at most so many. Answers whether some are left.
    pub(crate) fn cut_some(&mut self, (name, revision): (&ClaimName, u64), cutting: &mut Cutting, most: usize) -> bool {
        let Some(&number) = self.names.get(name) else { return false };
        for _ in 0..most {
            let Some(block) = self.claim(number).blocks.get(cutting.at).copied() else { break };
            cutting.at += 1;
            match cutting.going.get_mut(&block.key) {
                Some(gone) => {
                    *gone = true;
                    self.let_go(&block, number);
                }
                None => cutting.left.push(block),
            }
        }
        let claim = self.slab[number as usize].as_mut().expect("it lives while it is cut");
        claim.revision = claim.revision.max(revision);
        if cutting.at < claim.blocks.len() {
            return true;
        }
        claim.blocks = std::mem::take(&mut cutting.left);
        false
    }
}
