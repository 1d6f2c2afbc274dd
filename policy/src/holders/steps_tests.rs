//! Work in steps comes to what one walk does, whatever happens between two of them.

use std::collections::BTreeMap;

use kvtier_types::TenantId;
use proptest::prelude::{Strategy, any, prop, prop_assert_eq, proptest};
use proptest::test_runner::TestCaseError;

use super::tests::{NOW, Step, World, chain, name, step};
use super::{Counting, Descent, HolderId, HolderName, Kin, Line, MAX_GENERATIONS};
use crate::catalog::BlockId;
use crate::entry::Flags;

/// A step, and how many blocks are carried on after it.
fn steps() -> impl Strategy<Value = Vec<(Step, usize)>> {
    prop::collection::vec((step(), 0..4_usize), 1..120)
}

/// How often each block is held, and whether it is common or faded.
fn state(world: &World) -> BTreeMap<BlockId, (u32, bool, bool)> {
    let of = |id: &BlockId| {
        let entry = world.catalog.get(*id);
        (entry.held, entry.flags.has(Flags::COMMON), entry.flags.has(Flags::FADED))
    };
    world.parents.keys().map(|id| (*id, of(id))).collect()
}

/// Every block is held as often as there are tips at and below it, those of bearers too.
fn counts_are_exact(world: &World, holders: u8) -> Result<(), TestCaseError> {
    let bearers = [HolderId::FADING, HolderId::YIELDING, HolderId::MARKING, HolderId::COMING];
    let known = (0..holders).filter_map(|n| world.catalog.holders.find(&name(n)));
    let mut held: BTreeMap<BlockId, u32> = world.parents.keys().map(|id| (*id, 0)).collect();
    for (tip, at) in bearers.into_iter().chain(known).flat_map(|id| &world.catalog.holders.get(id).tips) {
        for id in std::iter::successors(Some(*tip), |id| world.parents[id]) {
            *held.get_mut(&id).expect("tips are at blocks that are here") += at.count;
        }
    }
    for (id, held) in held {
        prop_assert_eq!(world.catalog.get(id).held, held, "{:?}", id);
    }
    Ok(())
}

proptest! {
    #[test]
    fn steps_come_to_what_one_walk_does(steps in steps()) {
        let (mut whole, mut lazy) = (World::new(), World::new());
        lazy.is_lazy = true;
        for (step, carried) in &steps {
            // Who is abandoned had all settled before.
            if matches!(step, Step::Abandon { .. }) {
                continue;
            }
            whole.run(step)?;
            lazy.run(step)?;
            lazy.catalog.carry_on(&mut { *carried }, &mut Vec::new());
            counts_are_exact(&lazy, 4)?;
        }
        lazy.settle();
        prop_assert_eq!(state(&whole), state(&lazy));
    }

    #[test]
    fn counts_stay_exact_while_holders_make_room_and_forks_are_on_their_way(
        steps in steps(),
        limit in 1..4_usize,
        at in any::<u8>(),
        count in 1..5_u32,
    ) {
        let mut world = World::new();
        world.is_lazy = true;
        world.catalog.holders.limit(limit);
        let mut descent: Option<Descent> = None;
        for (step, carried) in &steps {
            if matches!(step, Step::Abandon { .. }) {
                world.settle();
            } else {
                world.run(step)?;
            }
            let (left, revived) = (&mut { *carried }, &mut Vec::new());
            world.catalog.carry_on(left, revived);
            if let Some(descent) = &mut descent {
                world.catalog.descend_some(descent, &mut { *carried }, revived);
            } else if let Some(to) = world.parents.keys().nth(usize::from(at) % 8) {
                descent = Some(Descent::new(world.catalog.spot(*to), count));
            }
            counts_are_exact(&world, 4)?;
        }
        let Some(mut descent) = descent else { return Ok(()) };
        while world.catalog.descend_some(&mut descent, &mut 2, &mut Vec::new()) {
            counts_are_exact(&world, 4)?;
        }
        let child = world.catalog.hear(NOW, &name(0));
        world.catalog.give_tip(&mut descent, child, 0);
        world.catalog.give_back(&mut descent);
        counts_are_exact(&world, 4)?;
        prop_assert_eq!(world.catalog.holders.get(HolderId::COMING).tips.len(), 0);
    }

    #[test]
    fn what_is_counted_in_steps_is_what_is_held(steps in steps(), portion in 1..5_usize) {
        let mut world = World::new();
        for (step, _) in &steps {
            world.run(step)?;
        }
        for id in (0..4).filter_map(|n| world.catalog.holders.find(&name(n))) {
            let holder = world.catalog.holders.get(id);
            let mut counts: BTreeMap<BlockId, u32> = BTreeMap::new();
            for (tip, at) in &holder.tips {
                for id in std::iter::successors(Some(*tip), |id| world.parents[id]) {
                    *counts.entry(id).or_default() += at.count;
                }
            }
            let own = counts.iter().filter(|(id, count)| {
                let entry = world.catalog.get(**id);
                entry.held == **count && !entry.flags.has(Flags::COMMON)
            });
            let mut counting = Counting::default();
            world.catalog.count_tips(&mut counting, holder);
            while world.catalog.count_some(&mut counting, &mut { portion }) {}
            prop_assert_eq!(counting.totals(), (counts.len() as u64, own.count() as u64));
        }
    }
}

#[test]
fn the_tenant_with_most_holders_makes_room() {
    let mut world = World::new();
    let blocks = chain(&mut world, 3);
    world.catalog.holders.limit(3);
    let of = |tenant: &str, id: &str| HolderName::program(&TenantId::new(tenant).unwrap(), id);
    world.catalog.hold(NOW, &of("quiet", "q"), &[blocks[2]]);
    for id in ["a", "b", "c", "d"] {
        world.catalog.hold(NOW, &of("loud", id), &[blocks[1]]);
    }
    let knows = |world: &World, tenant, id| world.catalog.holders.find(&of(tenant, id)).is_some();
    assert!(knows(&world, "quiet", "q"), "the one silent for longest of all, and yet not in the way");
    assert!(!knows(&world, "loud", "a") && !knows(&world, "loud", "b"));
    assert!(knows(&world, "loud", "c") && knows(&world, "loud", "d"));
}

#[test]
fn lines_without_end_are_not_followed() {
    let mut world = World::new();
    let of = |n: usize| HolderName::program(&TenantId::shared(), &n.to_string());
    let ids: Vec<HolderId> = (0..MAX_GENERATIONS + 3).map(|n| world.catalog.hear(NOW, &of(n))).collect();
    for pair in ids.windows(2) {
        world.catalog.holders.adopt(pair[1], pair[0]);
    }
    let orphans: Vec<usize> = (1..ids.len()).filter(|n| world.catalog.holders.get(ids[*n]).parent.is_none()).collect();
    assert_eq!(orphans, [MAX_GENERATIONS + 1], "as deep as it goes: there a new line begins");
    let mut line = Line::of(of(MAX_GENERATIONS));
    while world.catalog.holders.line_some(&mut line, &mut 7) {}
    assert!(line.has(&of(0)) && line.has(&of(MAX_GENERATIONS)) && !line.has(&of(MAX_GENERATIONS + 1)));
    let mut kin = Kin::of([of(0)]);
    while world.catalog.holders.kin_some(&mut kin, &mut 7) {}
    assert_eq!(kin.into_members().len(), MAX_GENERATIONS + 1);
}
