//! Holders against a naive model: paths written out in full, nothing counted.

use std::collections::{BTreeMap, BTreeSet};

use kvtier_types::{BlockKey, Instant, LayoutId, TenantId};
use proptest::prelude::{Strategy, any, prop, prop_assert, prop_assert_eq, proptest};
use proptest::test_runner::TestCaseError;

use super::{HolderName, Holders, Kin, MAX_TIPS_PER_HOLDER};
use crate::catalog::{BlockId, Catalog, Scope};
use crate::entry::{Entry, Flags};
use crate::evict::{Contender, LeafLru};
use crate::frame::FrameRef;
use crate::pools::Pools;

pub(super) const NOW: Instant = Instant::ZERO;

#[derive(Debug, Clone)]
pub(super) enum Step {
    /// A new block below another, or a first one.
    Grow {
        below: u8,
    },
    /// A call of a holder ends at a block.
    Call {
        holder: u8,
        at: u8,
    },
    Anonymous {
        at: u8,
    },
    /// Blocks go, if nothing is below them.
    Drop {
        at: u8,
    },
    Abandon {
        holder: u8,
    },
    Fade {
        holder: u8,
    },
    Rewrite {
        holder: u8,
    },
}

pub(super) fn step() -> impl Strategy<Value = Step> {
    prop::strategy::Union::new_weighted(vec![
        (6, any::<u8>().prop_map(|below| Step::Grow { below }).boxed()),
        (8, (0..4u8, any::<u8>()).prop_map(|(holder, at)| Step::Call { holder, at }).boxed()),
        (1, any::<u8>().prop_map(|at| Step::Anonymous { at }).boxed()),
        (3, any::<u8>().prop_map(|at| Step::Drop { at }).boxed()),
        (2, (0..4u8).prop_map(|holder| Step::Abandon { holder }).boxed()),
        (1, (0..4u8).prop_map(|holder| Step::Fade { holder }).boxed()),
        (1, (0..4u8).prop_map(|holder| Step::Rewrite { holder }).boxed()),
    ])
}

pub(super) fn name(holder: u8) -> HolderName {
    HolderName::program(&TenantId::shared(), &format!("program-{holder}"))
}

fn bare(catalog: &mut Catalog, key: [u8; 32]) -> Entry {
    let scope = catalog.scopes.acquire(&Scope::default());
    let program = catalog.programs.acquire(&String::new());
    Entry::bare(BlockKey::new(key), (0, 0), 0, 4096, (scope, program, Flags::default()))
}

/// What one holder is known to hold.
#[derive(Debug, Default, Clone)]
struct Naive {
    tips: BTreeSet<BlockId>,
    rewritten: bool,
}

pub(super) struct World {
    pub(super) catalog: Catalog,
    pub(super) parents: BTreeMap<BlockId, Option<BlockId>>,
    /// What is left behind waits until it is asked for.
    pub(super) is_lazy: bool,
    holders: BTreeMap<u8, Naive>,
    common: BTreeSet<BlockId>,
    next: u64,
}

impl World {
    pub(super) fn new() -> Self {
        let pools =
            Pools::new(Box::new(|_, _| Box::<LeafLru>::default()), Box::new(|bytes| bytes), ([0; 4], Contender::Lru));
        let mut catalog = Catalog::new(pools);
        catalog.layout(&LayoutId::new([0; 32]));
        Self {
            catalog,
            parents: BTreeMap::new(),
            is_lazy: false,
            holders: BTreeMap::new(),
            common: BTreeSet::new(),
            next: 0,
        }
    }

    /// Carries all on that was left behind.
    pub(super) fn settle(&mut self) {
        while self.catalog.carry_on(&mut 3, &mut Vec::new()) {}
    }

    fn pick(&self, at: u8) -> Option<BlockId> {
        let count = self.parents.len();
        self.parents.keys().copied().nth(usize::from(at) % count.max(1))
    }

    fn path(&self, tip: BlockId) -> Vec<BlockId> {
        std::iter::successors(Some(tip), |id| self.parents[id]).collect()
    }

    fn held_by(&self, holder: u8) -> BTreeSet<BlockId> {
        let tips = self.holders.get(&holder).map(|h| h.tips.clone()).unwrap_or_default();
        tips.into_iter().flat_map(|tip| self.path(tip)).collect()
    }

    fn held_by_others(&self, holder: u8) -> BTreeSet<BlockId> {
        let others = self.holders.keys().filter(|other| **other != holder);
        others.flat_map(|other| self.held_by(*other)).collect()
    }

    fn grow(&mut self, below: u8) {
        let parent = if below.is_multiple_of(8) { None } else { self.pick(below) };
        self.next += 1;
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.next.to_le_bytes());
        let bare = bare(&mut self.catalog, key);
        let host = Some(FrameRef { extent: 0, page: 0, generation: self.next });
        let depth_blocks = parent.map_or(0, |parent| self.catalog.get(parent).depth_blocks + 1);
        let id = self.catalog.insert(Entry { parent, depth_blocks, ..bare });
        self.catalog.update(id, |e| e.host = host);
        self.parents.insert(id, parent);
    }

    fn call(&mut self, holder: u8, tip: BlockId) {
        self.catalog.hold(NOW, &name(holder), &[tip]);
        let path = self.path(tip);
        let known = self.holders.entry(holder).or_default();
        if let Some(former) = path.iter().find(|id| known.tips.contains(id)) {
            known.tips.remove(former);
        }
        known.tips.insert(tip);
        if std::mem::take(&mut known.rewritten) {
            known.tips = BTreeSet::from([tip]);
        }
    }

    fn drop_leaf(&mut self, id: BlockId) {
        if self.parents.values().any(|p| *p == Some(id)) {
            return;
        }
        assert!(!self.catalog.update(id, |e| e.host = None), "nothing keeps it");
        let parent = self.parents.remove(&id).flatten();
        for holder in self.holders.values_mut() {
            if holder.tips.remove(&id) {
                holder.tips.extend(parent);
            }
        }
        self.common.remove(&id);
    }

    fn abandon(&mut self, holder: u8) -> Result<(), TestCaseError> {
        let (own, others) = (self.held_by(holder), self.held_by_others(holder));
        let own: BTreeSet<BlockId> = own.difference(&others).filter(|id| !self.common.contains(id)).copied().collect();
        let Some(id) = self.catalog.holders.find(&name(holder)) else { return Ok(()) };
        self.settle();
        let mut freed = Vec::new();
        while let Some(exclusive) = self.catalog.lift(id) {
            freed.extend(exclusive);
        }
        self.catalog.forget_holder(id);
        self.holders.remove(&holder);
        let unique: BTreeSet<BlockId> = freed.iter().copied().collect();
        prop_assert_eq!(unique.len(), freed.len(), "each once");
        prop_assert!(own.is_subset(&unique), "all that only it held");
        // Beyond that, nothing but what it held before and nobody holds now.
        for id in &unique {
            prop_assert!(!others.contains(id) && !self.common.contains(id));
        }
        for (at, id) in freed.iter().enumerate() {
            let parent = self.parents[id];
            prop_assert!(parent.is_none_or(|p| !freed[..at].contains(&p)), "children before their parents");
        }
        for id in freed {
            self.drop_leaf(id);
        }
        Ok(())
    }

    pub(super) fn run(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Grow { below } => self.grow(below),
            Step::Call { holder, at } => {
                if let Some(tip) = self.pick(at) {
                    self.call(holder, tip);
                }
            }
            Step::Anonymous { at } => {
                if let Some(tip) = self.pick(at) {
                    self.catalog.hold_in_common(&[tip]);
                    self.common.extend(self.path(tip));
                }
            }
            Step::Drop { at } => {
                if let Some(id) = self.pick(at) {
                    self.drop_leaf(id);
                }
            }
            Step::Abandon { holder } => self.abandon(holder)?,
            Step::Fade { holder } => {
                if let Some(id) = self.catalog.holders.find(&name(holder)) {
                    self.catalog.outlive_some(id, u64::MAX, &mut { MAX_TIPS_PER_HOLDER });
                    self.holders.entry(holder).or_default().tips.clear();
                }
            }
            Step::Rewrite { holder } => {
                if let Some(id) = self.catalog.holders.find(&name(holder)) {
                    self.catalog.holders.get_mut(id).rewritten = true;
                    self.holders.entry(holder).or_default().rewritten = true;
                }
            }
        }
        if !self.is_lazy {
            self.settle();
        }
        Ok(())
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let all: BTreeSet<BlockId> = self.holders.keys().flat_map(|h| self.held_by(*h)).collect();
        for (id, parent) in &self.parents {
            let entry = self.catalog.get(*id);
            prop_assert_eq!(entry.held > 0, all.contains(id), "{:?}", id);
            prop_assert_eq!(entry.flags.has(Flags::COMMON), self.common.contains(id));
            let faded = entry.flags.has(Flags::FADED);
            prop_assert!(!faded || (entry.held == 0 && !entry.flags.has(Flags::COMMON)));
            if let Some(parent) = parent {
                prop_assert!(self.catalog.get(*parent).held >= entry.held);
            }
        }
        for (number, naive) in &self.holders {
            let Some(id) = self.catalog.holders.find(&name(*number)) else { continue };
            let tips: BTreeSet<BlockId> = self.catalog.holders.get(id).tips.keys().copied().collect();
            prop_assert_eq!(&tips, &naive.tips);
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn tips_agree_with_a_naive_model(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::new();
        for step in &steps {
            world.run(step)?;
            world.check()?;
        }
    }
}

pub(super) fn chain(world: &mut World, length: usize) -> Vec<BlockId> {
    for at in 0..length {
        let parent = world.parents.keys().copied().nth(at.wrapping_sub(1)).filter(|_| at > 0);
        world.next += 1;
        let mut key = [1; 32];
        key[..8].copy_from_slice(&world.next.to_le_bytes());
        let bare = bare(&mut world.catalog, key);
        let id = world.catalog.insert(Entry { parent, ..bare });
        world.catalog.update(id, |e| e.host = Some(FrameRef { extent: 0, page: 0, generation: 1 }));
        world.parents.insert(id, parent);
    }
    world.parents.keys().copied().collect()
}

#[test]
fn who_makes_room_leaves_its_blocks_common() {
    let mut world = World::new();
    let blocks = chain(&mut world, 6);
    world.catalog.holders.limit(2);
    world.catalog.hold(NOW, &name(0), &[blocks[5]]);
    world.catalog.hold(NOW, &name(1), &[blocks[2]]);
    world.catalog.hold(NOW, &name(2), &[blocks[3]]);
    world.settle();
    assert_eq!(world.catalog.holders.len(), 2);
    assert!(world.catalog.holders.find(&name(0)).is_none(), "the one silent for longest");
    for block in blocks {
        assert!(world.catalog.get(block).flags.has(Flags::COMMON));
    }
}

#[test]
fn families_have_no_circles() {
    let mut world = World::new();
    let ids: Vec<_> = (0..4).map(|n| world.catalog.hear(NOW, &name(n))).collect();
    let holders = &mut world.catalog.holders;
    holders.adopt(ids[1], ids[0]);
    holders.adopt(ids[2], ids[1]);
    holders.adopt(ids[0], ids[2]);
    holders.adopt(ids[2], ids[3]);
    let family = |holders: &Holders, of: u8| {
        let mut kin = Kin::of([name(of)]);
        while holders.kin_some(&mut kin, &mut 1) {}
        kin.into_members()
    };
    assert_eq!(family(holders, 0), [name(0), name(1), name(2)]);
    assert_eq!(family(holders, 3), [name(3)]);
    holders.remove(ids[1]);
    assert_eq!(family(holders, 0), [name(0)]);
    while holders.orphan_some(&mut 1) {}
    assert!(holders.get(ids[2]).parent.is_none());
}
