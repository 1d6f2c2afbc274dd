//! What is gathered and taken in steps, with what happens between two of them.

use kvtier_types::{BlockKey, Outcome, TenantId, Tier};

use super::programs::HOLDER_STEP;
use super::programs_tests::{Family, hints, name};
use super::tests::{Bench, NOW};
use super::*;
use crate::entry::Flags;
use crate::evict::Standing;
use crate::holders::{HolderKind, HolderName};

/// A chain longer than two steps.
const LONG: usize = 2 * HOLDER_STEP + 40;

fn long_key(n: usize) -> BlockKey {
    let mut key = [9; 32];
    key[..8].copy_from_slice(&(n as u64).to_le_bytes());
    BlockKey::new(key)
}

fn chain(from: usize, length: usize) -> Vec<BlockKey> {
    (from..from + length).map(long_key).collect()
}

/// A bench on which `main` wrote a long chain.
fn long() -> Bench {
    let mut bench = Bench::new(2048, false);
    write(&mut bench, "main", chain(0, LONG));
    bench
}

fn write(bench: &mut Bench, program: &str, keys: Vec<BlockKey>) {
    let request = ReserveRequest {
        attachment: bench.who,
        parent: None,
        group: 0,
        first_block: 0,
        keys: keys.clone(),
        tenant: TenantId::shared(),
        hints: hints(program, "", ""),
    };
    let answers = bench.core.reserve(NOW, &request).unwrap();
    for (key, answer) in keys.into_iter().zip(answers) {
        let Reservation::Granted(frames) = answer else { continue };
        let seal = SealRequest { key, shard: 0, frame: frames[0], checksum: 1, abandoned: false };
        assert_eq!(bench.core.seal(bench.who, &[seal]).unwrap(), [SealOutcome::Applied]);
    }
}

fn drop_blocks(bench: &mut Bench, keys: &[BlockKey]) {
    for key in keys.iter().rev() {
        bench.core.apply_evict(&[*key], &[]);
        assert!(bench.core.locate(key).is_none());
    }
}

fn signal(program: &str, kind: SignalKind, children: &[String]) -> Signal {
    let children = children.iter().map(|c| name(c)).collect();
    Signal { program: name(program), parent: None, kind, children, returns_in: None }
}

#[test]
fn holdings_are_gathered_in_steps_that_have_a_bound() {
    let bench = long();
    for which in [(false, false), (true, true)] {
        let mut holdings = Holdings::of_program(&name("main"), which);
        let mut steps = 1;
        while bench.core.gather(&mut holdings) {
            steps += 1;
        }
        assert!(steps >= LONG / HOLDER_STEP, "{steps}");
        assert_eq!(holdings.keys().unwrap(), chain(0, LONG), "in prefix order");
    }
}

#[test]
fn a_number_that_is_used_again_between_two_steps_is_never_answered() {
    for which in [(false, false), (false, true)] {
        let mut bench = long();
        let mut holdings = Holdings::of_program(&name("main"), which);
        assert!(bench.core.gather(&mut holdings));
        // All of it goes, and another program's blocks get the numbers.
        let numbers = |bench: &Bench, keys: &[BlockKey]| -> Vec<BlockId> {
            let mut ids: Vec<_> = keys.iter().flat_map(|key| bench.core.catalog.find_all(key)).collect();
            ids.sort_unstable();
            ids
        };
        let before = numbers(&bench, &chain(0, LONG));
        drop_blocks(&mut bench, &chain(0, LONG));
        write(&mut bench, "other", chain(10_000, LONG));
        assert_eq!(numbers(&bench, &chain(10_000, LONG)), before, "the same numbers");
        while bench.core.gather(&mut holdings) {}
        let keys = holdings.keys().unwrap();
        assert!(keys.iter().all(|key| chain(0, LONG).contains(key)), "{which:?}");
    }
}

#[test]
fn what_a_program_leaves_while_it_is_counted_is_not_taken_for_its_own() {
    let mut bench = long();
    // Two branches: tips of `main` count twice in the stem.
    let branch: Vec<BlockKey> = chain(0, 3).into_iter().chain(chain(20_000, 1)).collect();
    write(&mut bench, "main", branch);
    write(&mut bench, "other", chain(0, 3));
    let mut holdings = Holdings::of_program(&name("main"), (false, true));
    assert!(bench.core.gather(&mut holdings));
    // One of the two tips is left: `other` and the tip that remains are as many as were counted.
    bench.core.signal(NOW, &signal("main", SignalKind::Compaction, &[]));
    write(&mut bench, "main", chain(0, LONG + 1));
    while bench.core.settle_holders() {}
    while bench.core.gather(&mut holdings) {}
    let keys = holdings.keys().unwrap();
    assert!(chain(0, 3).iter().all(|key| !keys.contains(key)), "`other` holds them");
    assert!(keys.contains(&long_key(LONG)), "and it was counted anew");
}

#[test]
fn a_page_of_programs_is_filled_in_steps_and_ends_where_it_should() {
    let mut bench = long();
    write(&mut bench, "other", chain(0, 3));
    let mut page = ProgramPage::new(None, None, 1);
    let mut steps = 1;
    while bench.core.fill_page(NOW, &mut page) {
        steps += 1;
    }
    assert!(steps > LONG / HOLDER_STEP);
    let (programs, more) = page.programs();
    assert_eq!((programs[0].name.clone(), more), (name("main"), true));
    assert_eq!((programs[0].blocks, programs[0].exclusive), (LONG as u64, LONG as u64 - 3));
    let mut page = ProgramPage::new(Some(name("main")), Some(TenantId::shared()), 1);
    while bench.core.fill_page(NOW, &mut page) {}
    let (programs, more) = page.programs();
    assert_eq!(
        (programs[0].name.clone(), programs[0].blocks, programs[0].exclusive, more),
        (name("other"), 3, 0, false)
    );
}

#[test]
fn a_fork_into_many_brings_the_context_to_all_of_them() {
    let mut bench = long();
    let children: Vec<String> = (0..MAX_CHILDREN_PER_SIGNAL).map(|n| format!("child-{n}")).collect();
    let fork = signal("main", SignalKind::Fork, &children);
    let mut signaling = Signaling::new(fork.clone());
    let mut steps = 0;
    while bench.core.signal_some(NOW, &mut signaling) {
        steps += 1;
    }
    assert!(steps > LONG / HOLDER_STEP && steps < 200, "{steps} steps: they go the way together");
    assert_eq!(signaling.answer().outcome, Outcome::Applied);
    for child in ["child-0", "child-1023"] {
        let (program, session) = (name(child), (0, 0));
        assert_eq!(bench.core.program_blocks(&program, (false, false)), chain(0, LONG));
        assert_eq!(bench.core.session_blocks(&program, session).unwrap(), chain(0, LONG), "its latest context");
    }
    let held = |bench: &Bench| bench.core.catalog.get(bench.core.catalog.find_all(&long_key(0))[0]).held;
    assert_eq!(held(&bench) as usize, 1 + MAX_CHILDREN_PER_SIGNAL);
    assert_eq!(bench.core.signal(NOW, &fork).outcome, Outcome::Duplicate);
    while bench.core.settle_holders() {}
    assert_eq!(held(&bench) as usize, 1 + MAX_CHILDREN_PER_SIGNAL, "told twice it holds once");
    // The parent went on: so do its children, where they did not call since.
    write(&mut bench, "main", chain(0, LONG + 5));
    bench.core.signal(NOW, &signal("main", SignalKind::Fork, &children[..1]));
    while bench.core.settle_holders() {}
    assert_eq!(bench.core.program_blocks(&name("child-0"), (false, false)), chain(0, LONG + 5));
    assert_eq!(held(&bench) as usize, 1 + MAX_CHILDREN_PER_SIGNAL);
}

#[test]
fn a_fork_reaches_as_far_as_blocks_are_left() {
    let mut bench = long();
    let mut signaling = Signaling::new(signal("main", SignalKind::Fork, &["child".into()]));
    // The path is known; then its end goes.
    for _ in 0..6 {
        assert!(bench.core.signal_some(NOW, &mut signaling));
    }
    drop_blocks(&mut bench, &chain(100, LONG - 100));
    write(&mut bench, "other", chain(10_000, LONG - 100));
    while bench.core.signal_some(NOW, &mut signaling) {}
    assert_eq!(bench.core.program_blocks(&name("child"), (false, false)), chain(0, 100));
    let other = bench.core.program_blocks(&name("other"), (false, true));
    assert_eq!(other.len(), LONG - 100, "whose numbers were theirs is held by nobody else");
}

#[test]
fn an_end_in_steps_is_one_end() {
    let mut bench = long();
    write(&mut bench, "other", chain(0, 3));
    let mut signaling = Signaling::new(signal("main", SignalKind::Completion, &[]));
    let mut steps = 1;
    while bench.core.signal_some(NOW, &mut signaling) {
        steps += 1;
    }
    assert!(steps > LONG / HOLDER_STEP);
    let standing = |n: usize| bench.core.catalog.get(bench.core.catalog.find_all(&long_key(n))[0]).standing;
    assert!((0..3).all(|n| standing(n) == Standing::Normal));
    assert!((3..LONG).all(|n| standing(n) == Standing::First));
    assert_eq!(bench.core.program_counts().1.faded, LONG as u64 - 3);
    assert!(!bench.core.has_left_holdings());
}

#[test]
fn a_call_leaves_what_it_left_for_later() {
    let mut bench = long();
    bench.core.signal(NOW, &signal("main", SignalKind::Compaction, &[]));
    write(&mut bench, "main", chain(0, 2).into_iter().chain(chain(30_000, 1)).collect());
    let faded =
        |bench: &Bench| bench.core.catalog.iter_from(0).filter(|(_, entry)| entry.flags.has(Flags::FADED)).count();
    assert_eq!(faded(&bench), 0, "not in the call");
    assert!(bench.core.settle_holders());
    assert_eq!(faded(&bench), HOLDER_STEP);
    while bench.core.settle_holders() {}
    assert_eq!(faded(&bench), LONG - 2);
    // What is abandoned in the midst of that goes all the same.
    write(&mut bench, "other", chain(0, LONG));
    bench.core.signal(NOW, &signal("other", SignalKind::Compaction, &[]));
    write(&mut bench, "other", chain(0, 1));
    let (mut blocks, mut freed) = (0, bench.core.abandon_program(&name("other")));
    while freed.more {
        blocks += freed.blocks;
        freed = bench.core.abandon_program(&name("other"));
    }
    assert_eq!(blocks + freed.blocks, LONG as u64 - 2);
    assert_eq!(bench.core.tier_use(Tier::Host).copies, 3);
}

#[test]
fn a_listing_by_program_knows_what_it_holds_and_wrote() {
    let f = Family::new();
    let filter = ListFilter { program: "left".into(), ..ListFilter::default() };
    let names = f.0.core.holders_named(HolderKind::Program, "left", None);
    assert_eq!(names, [HolderName::program(&TenantId::shared(), "left")]);
    let mut held = Holdings::of_programs(names);
    while f.0.core.gather(&mut held) {}
    let (blocks, more) = f.0.core.list(0, 100, &filter, Some(&held));
    let mut numbers: Vec<u8> = blocks.iter().map(|block| block.key.as_bytes()[0]).collect();
    numbers.sort_unstable();
    assert_eq!((numbers, more), (vec![1, 2, 3, 11, 12, 13], None));
    let (wrote, _) = f.0.core.list(0, 100, &filter, None);
    assert_eq!(wrote.len(), 3);
}
