//! Claims against hand-made situations, and random sequences against sums taken from scratch.

use std::collections::BTreeMap;

use kvtier_types::TenantId;
use proptest::prelude::{Strategy, prop, proptest};

use super::*;

const BLOCK: u64 = 100;

fn key(n: u8) -> BlockKey {
    BlockKey::new([n; 32])
}

fn name(owner: u8, id: u8) -> ClaimName {
    ClaimName { tenant: TenantId::shared(), owner: format!("owner {owner}"), id: format!("claim {id}") }
}

fn claims(node_blocks: u64, owner_blocks: u64) -> Claims {
    let budget = TierBudget { node_bytes: node_blocks * BLOCK, owner_bytes: owner_blocks * BLOCK };
    let config = ClaimsConfig { budgets: [budget; 4], max_blocks: 64, ..ClaimsConfig::default() };
    Claims::new(config, Some(Tier::Disk))
}

fn wanted(name: ClaimName, revision: u64, kind: ClaimKind, keys: &[u8]) -> Wanted {
    let blocks: Vec<_> = keys.iter().map(|n| ClaimBlock { key: key(*n), bytes: BLOCK }).collect();
    let expires = Instant::from_nanos(1000);
    Wanted { name, revision, kind, expires, blocks, ends: (1..=keys.len()).collect() }
}

const HOST: ClaimKind = ClaimKind::Pin(Tier::Host);

/// Steps are of two blocks, so that much happens between them.
const STEP: usize = 2;

fn how_much(claims: &Claims, wanted: &Wanted) -> Fit {
    let mut fitting = claims.fitting(wanted);
    while claims.fit_some(wanted, &mut fitting, STEP) {}
    fitting.fit()
}

fn put(claims: &mut Claims, wanted: Wanted) -> Fit {
    let fit = how_much(claims, &wanted);
    let former = claims.get(&wanted.name).map(|claim| claim.blocks.clone());
    claims.replace(&wanted.name);
    loop {
        let now = claims.get(&wanted.name).map(|claim| claim.blocks.clone());
        assert_eq!(now, former, "it is told of until the other takes its place");
        if !claims.let_go_some(STEP) {
            break;
        }
    }
    let mut taking = claims.take(&wanted, fit, wanted.blocks.clone());
    while claims.take_some(&wanted, &mut taking, STEP) {}
    fit
}

fn end(claims: &mut Claims, name: &ClaimName) {
    claims.end(name);
    while claims.let_go_some(STEP) {}
}

fn cut(claims: &mut Claims, (name, revision): (&ClaimName, u64), keys: &[BlockKey]) -> Vec<bool> {
    let mut cutting = Cutting::new(keys);
    while claims.cut_some((name, revision), &mut cutting, STEP) {}
    keys.iter().map(|key| cutting.had(key)).collect()
}

fn blocks(claims: &Claims, tier: Tier) -> u64 {
    claims.node_bytes()[tier.index()] / BLOCK
}

#[test]
fn over_budget_is_clipped_in_order_and_the_disk_is_charged_too() {
    let mut c = claims(5, 3);
    let fit = put(&mut c, wanted(name(1, 1), 1, HOST, &[1, 2, 3, 4]));
    assert_eq!(fit, Fit { units: 3, short: Some(Short::Owner) });
    assert_eq!((blocks(&c, Tier::Host), blocks(&c, Tier::Disk)), (3, 3));
    let fit = put(&mut c, wanted(name(2, 1), 1, HOST, &[5, 6, 7]));
    assert_eq!(fit, Fit { units: 2, short: Some(Short::Node) });
    let none = how_much(&c, &wanted(name(3, 1), 1, HOST, &[8]));
    assert_eq!(none, Fit { units: 0, short: Some(Short::Node) });
    let on_disk = how_much(&c, &wanted(name(3, 1), 1, ClaimKind::Pin(Tier::Disk), &[8]));
    assert_eq!(on_disk.units, 0, "host claims took the disk's budget as well");
    let soft = how_much(&c, &wanted(name(3, 1), 1, ClaimKind::Retain(9), &[8, 9]));
    assert_eq!(soft, Fit { units: 2, short: None }, "soft claims take no bytes");
}

#[test]
fn a_block_counts_once_for_the_node_and_once_for_each_owner() {
    let mut c = claims(4, 4);
    put(&mut c, wanted(name(1, 1), 1, HOST, &[1, 2]));
    put(&mut c, wanted(name(1, 2), 1, HOST, &[1, 2]));
    put(&mut c, wanted(name(2, 1), 1, HOST, &[2, 3]));
    assert_eq!(blocks(&c, Tier::Host), 3);
    assert_eq!(c.owner_bytes(&name(1, 9))[Tier::Host.index()], 2 * BLOCK);
    end(&mut c, &name(1, 1));
    assert_eq!(blocks(&c, Tier::Host), 3, "another claim holds them");
    end(&mut c, &name(1, 2));
    assert_eq!(blocks(&c, Tier::Host), 2);
    end(&mut c, &name(2, 1));
    assert_eq!((blocks(&c, Tier::Host), c.holds(&key(2))), (0, false));
}

#[test]
fn units_are_claimed_as_a_whole() {
    let mut c = claims(3, 3);
    let mut w = wanted(name(1, 1), 1, HOST, &[1, 2, 3, 4, 5]);
    w.ends = vec![2, 5];
    assert_eq!(put(&mut c, w).units, 1);
    assert_eq!(blocks(&c, Tier::Host), 2);
}

#[test]
fn a_later_revision_replaces_and_has_what_it_frees() {
    let mut c = claims(3, 3);
    put(&mut c, wanted(name(1, 1), 5, HOST, &[1, 2, 3]));
    assert_eq!(c.standing(&name(1, 1), 5), Standing::Duplicate);
    assert_eq!(c.standing(&name(1, 1), 4), Standing::Late);
    assert_eq!(c.standing(&name(1, 1), 6), Standing::Replaces);
    let fit = put(&mut c, wanted(name(1, 1), 6, HOST, &[4, 5, 3]));
    assert_eq!(fit, Fit { units: 3, short: None });
    assert!(c.holds(&key(4)) && !c.holds(&key(1)));
    c.end_for_good(&name(1, 1), 8);
    while c.let_go_some(STEP) {}
    assert_eq!(c.standing(&name(1, 1), 7), Standing::Late, "it was ended by a later call");
    assert_eq!(c.standing(&name(1, 1), 8), Standing::Fresh);
}

#[test]
fn claims_end_on_time() {
    let mut c = claims(9, 9);
    put(&mut c, wanted(name(1, 1), 1, HOST, &[1]));
    let mut later = wanted(name(1, 2), 1, ClaimKind::Retain(7), &[1, 2]);
    later.expires = Instant::from_nanos(2000);
    put(&mut c, later);
    assert_eq!(c.next_deadline(), Some(Instant::from_nanos(1000)));
    assert_eq!(c.expire(Instant::from_nanos(999)), []);
    assert_eq!(c.expire(Instant::from_nanos(1000)), [name(1, 1)]);
    while c.let_go_some(STEP) {}
    assert_eq!(c.held(&key(1)), (Kept::default(), BLOCK, Some(7)));
    assert_eq!(c.expire(Instant::from_nanos(9999)), [name(1, 2)]);
    assert_eq!((c.len(), c.next_deadline()), (0, None));
}

#[test]
fn a_block_that_grows_is_charged_where_that_fits() {
    let mut c = claims(3, 2);
    put(&mut c, wanted(name(1, 1), 1, HOST, &[1]));
    c.grow(&key(1), 2 * BLOCK);
    assert_eq!((blocks(&c, Tier::Host), c.held(&key(1)).1), (2, 2 * BLOCK));
    c.grow(&key(1), 3 * BLOCK);
    assert_eq!(c.held(&key(1)).1, 2 * BLOCK, "the owner may not have more");
    end(&mut c, &name(1, 1));
    assert_eq!(blocks(&c, Tier::Host), 0);
}

#[test]
fn hints_are_bounded_and_end() {
    let mut c = claims(1, 1);
    let at = Instant::from_nanos;
    assert!(c.hinted.put(key(1), 30, at(10)));
    assert!(c.hinted.put(key(1), 20, at(20)));
    assert_eq!(c.held(&key(1)).2, Some(30));
    assert_eq!(c.hinted.expire(at(15), 9), []);
    assert_eq!(c.hinted.expire(at(20), 9), [key(1)]);
    assert!(!c.holds(&key(1)));
}

#[derive(Debug, Clone)]
enum Step {
    Put { owner: u8, id: u8, kind: ClaimKind, keys: Vec<u8> },
    End { owner: u8, id: u8 },
    Drop { owner: u8, id: u8, keys: Vec<u8> },
    Grow { key: u8, blocks: u8 },
    Expire { at: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let keys = || prop::collection::vec(0..12u8, 0..8);
    let kind = prop::sample::select(vec![
        ClaimKind::Pin(Tier::Host),
        ClaimKind::Pin(Tier::Disk),
        ClaimKind::Pin(Tier::Object),
        ClaimKind::Retain(50),
    ]);
    prop::strategy::Union::new_weighted(vec![
        (
            6,
            (0..3u8, 0..3u8, kind, keys())
                .prop_map(|(owner, id, kind, keys)| Step::Put { owner, id, kind, keys })
                .boxed(),
        ),
        (2, (0..3u8, 0..3u8).prop_map(|(owner, id)| Step::End { owner, id }).boxed()),
        (2, (0..3u8, 0..3u8, keys()).prop_map(|(owner, id, keys)| Step::Drop { owner, id, keys }).boxed()),
        (1, (0..12u8, 1..4u8).prop_map(|(key, blocks)| Step::Grow { key, blocks }).boxed()),
        (1, (0..2000u64).prop_map(|at| Step::Expire { at }).boxed()),
    ])
}

fn run(c: &mut Claims, revision: u64, step: Step) {
    match step {
        Step::Put { owner, id, kind, mut keys } => {
            let mut seen = std::collections::BTreeSet::new();
            keys.retain(|key| seen.insert(*key));
            let mut w = wanted(name(owner, id), revision, kind, &keys);
            w.expires = Instant::from_nanos(revision * 37 % 2000);
            let fit = put(c, w);
            assert!(fit.units <= keys.len());
            assert_eq!(fit.units == keys.len(), fit.short.is_none());
        }
        Step::End { owner, id } => {
            c.end_for_good(&name(owner, id), revision);
            while c.let_go_some(STEP) {}
        }
        Step::Drop { owner, id, keys } => {
            let keys: Vec<BlockKey> = keys.into_iter().map(key).collect();
            cut(c, (&name(owner, id), revision), &keys);
        }
        Step::Grow { key: n, blocks } => c.grow(&key(n), u64::from(blocks) * BLOCK),
        Step::Expire { at } => {
            c.expire(Instant::from_nanos(at));
            while c.let_go_some(STEP) {}
        }
    }
}

/// Sums over all live claims, from scratch.
fn check(c: &Claims) {
    let mut node: BTreeMap<(Tier, BlockKey), u64> = BTreeMap::new();
    let mut owners: BTreeMap<(String, Tier, BlockKey), u64> = BTreeMap::new();
    let mut count = 0;
    for (name, claim) in c.after(None) {
        count += claim.blocks.len();
        let mut keys: Vec<_> = claim.blocks.iter().map(|b| b.key).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), claim.blocks.len(), "a claim holds a block once");
        for block in &claim.blocks {
            let (_, bytes, _) = c.held(&block.key);
            for tier in Tier::ALL.into_iter().filter(|t| c.keeps(claim.kind).has(*t)) {
                node.insert((tier, block.key), bytes);
                owners.insert((name.owner.clone(), tier, block.key), bytes);
                assert!(c.held(&block.key).0.has(tier));
            }
        }
    }
    assert_eq!(c.block_count, count);
    for tier in Tier::ALL {
        let budget = c.config.budgets[tier.index()];
        let sum: u64 = node.iter().filter(|((t, _), _)| *t == tier).map(|(_, b)| b).sum();
        assert_eq!(c.node_bytes()[tier.index()], sum, "the sum of the live claims in {tier}");
        assert!(sum <= budget.node_bytes, "{tier} is overcommitted");
        for owner in 0..3 {
            let of = |(o, t, _): &(String, Tier, BlockKey)| *o == name(owner, 0).owner && *t == tier;
            let sum: u64 = owners.iter().filter(|(at, _)| of(at)).map(|(_, b)| b).sum();
            assert_eq!(c.owner_bytes(&name(owner, 0))[tier.index()], sum, "owner {owner} in {tier}");
            assert!(sum <= budget.owner_bytes, "owner {owner} has too much of {tier}");
        }
    }
}

proptest! {
    #[test]
    fn budgets_hold_and_sums_agree_after_every_step(steps in prop::collection::vec(step(), 1..60)) {
        let mut c = claims(9, 5);
        for (revision, step) in (1..).zip(steps) {
            run(&mut c, revision, step);
            check(&c);
        }
        let names: Vec<ClaimName> = c.after(None).map(|(n, _)| n.clone()).collect();
        for name in names {
            end(&mut c, &name);
        }
        assert_eq!((c.block_count, c.blocks.len(), c.node_bytes()), (0, 0, [0; 4]));
    }
}
