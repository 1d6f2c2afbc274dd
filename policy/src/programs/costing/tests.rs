//! Costs of steps, against hand-made clusters and a naive model.

use kvtier_types::GroupKind;
use proptest::prelude::{Strategy, prop, proptest};

use super::*;

const BYTES: u64 = 64 << 10;
const RATES: LoadRates = LoadRates { nanos_per_byte: [0.0, 0.1, 1.0, 10.0, 2.0], latency: [Duration::ZERO; 5] };

fn group(kind: GroupKind, block_tokens: u32) -> GroupSpec {
    GroupSpec { kind, block_tokens, layers: vec!["l".into()] }
}

fn whole(block: u32, on: &[(u32, Tier)], packed: bool) -> BlockPlaces {
    BlockPlaces { group: 0, block, shards: vec![ShardPlaces { on: on.to_vec(), packed }] }
}

const fn server(node: u32, queue_ms: u64) -> Server {
    Server { node, queue: Duration::from_millis(queue_ms), prefill_tokens_per_second: 1_000, free_bytes: None }
}

fn bill(blocks: &[BlockPlaces], prompt_tokens: u32, server: &Server) -> Bill {
    let groups = [group(GroupKind::Full, 16)];
    let step = Step { groups: &groups, block_bytes: &[BYTES], prompt_tokens, blocks };
    Costing::new(step, RATES).bill(server)
}

/// Tokens from host, disk, peers and packs, and those computed.
fn tokens(bill: &Bill) -> [u32; 5] {
    let [_, host, disk, object, peer] = bill.served;
    [host, disk, peer, object, bill.recompute_tokens]
}

#[test]
fn a_hit_is_a_prefix_and_each_block_comes_from_the_nearest() {
    let blocks = [
        whole(0, &[(1, Tier::Host), (2, Tier::Host)], false),
        whole(1, &[(1, Tier::Disk)], true),
        whole(2, &[(2, Tier::Disk)], false),
        whole(3, &[], true),
        whole(4, &[], false),
        whole(5, &[(1, Tier::Host)], false),
    ];
    assert_eq!(tokens(&bill(&blocks, 0, &server(1, 0))), [16, 16, 16, 16, 32]);
    assert_eq!(tokens(&bill(&blocks, 0, &server(2, 0))), [16, 16, 16, 16, 32], "its own disk has the third");
    assert_eq!(tokens(&bill(&blocks, 0, &server(3, 0))), [0, 0, 48, 16, 32]);
    assert_eq!(tokens(&bill(&blocks, 100, &server(1, 0))), [16, 16, 16, 16, 36], "a longer prompt");
    assert_eq!(tokens(&bill(&blocks, 20, &server(1, 0))), [16, 0, 0, 0, 4], "a shorter one");
    assert_eq!(tokens(&bill(&[], 50, &server(1, 0))), [0, 0, 0, 0, 50]);
}

#[test]
fn what_loads_slower_than_it_computes_is_computed() {
    let blocks = [whole(0, &[(1, Tier::Host)], false), whole(1, &[], true), whole(2, &[(1, Tier::Host)], false)];
    // A block computes in 16 ms, or in 0.16 ms, and comes from a pack in 0.66 ms.
    let slow = server(1, 0);
    let fast = Server { prefill_tokens_per_second: 100_000, ..slow };
    assert_eq!(tokens(&bill(&blocks, 0, &slow)), [32, 0, 0, 16, 0]);
    assert_eq!(tokens(&bill(&blocks, 0, &fast)), [16, 0, 0, 0, 32]);
    let told = bill(&blocks, 0, &Server { prefill_tokens_per_second: 0, ..slow });
    assert_eq!(told.prefill_tokens_per_second, DEFAULT_PREFILL_TOKENS_PER_SECOND);
}

#[test]
fn a_block_counts_when_all_its_shards_are_there_and_is_as_far_as_the_furthest() {
    let shard = |on: &[(u32, Tier)]| ShardPlaces { on: on.to_vec(), packed: false };
    let block = |block, shards: Vec<ShardPlaces>| BlockPlaces { group: 0, block, shards };
    let blocks = [
        block(0, vec![shard(&[(1, Tier::Host)]), shard(&[(1, Tier::Disk)])]),
        block(1, vec![shard(&[(1, Tier::Host)]), shard(&[(2, Tier::Host)])]),
        block(2, vec![shard(&[(1, Tier::Host)]), shard(&[])]),
    ];
    assert_eq!(tokens(&bill(&blocks, 0, &server(1, 0))), [0, 16, 16, 0, 16]);
    assert_eq!(tokens(&bill(&blocks, 0, &server(2, 0))), [0, 0, 32, 0, 16]);
}

#[test]
fn windows_need_their_end_only() {
    let groups = [group(GroupKind::Full, 16), group(GroupKind::SlidingWindow { window_tokens: 17 }, 16)];
    let mut blocks: Vec<BlockPlaces> = (0..4).map(|n| whole(n, &[(1, Tier::Host)], false)).collect();
    blocks.push(BlockPlaces { group: 1, ..whole(3, &[(1, Tier::Disk)], false) });
    let step = Step { groups: &groups, block_bytes: &[BYTES, BYTES], prompt_tokens: 0, blocks: &blocks };
    let costing = Costing::new(step, RATES);
    let bill = costing.bill(&server(1, 0));
    assert_eq!(tokens(&bill), [64, 0, 0, 0, 0]);
    assert_eq!(bill.candidate.load, nanos(BYTES as f64 * (4.0 * 0.1 + 1.0)));
    assert_eq!(costing.needed(1, 64).len(), 5);
    assert_eq!(costing.needed(1, 64)[4], (4, Origin::Tier(Tier::Disk)));
}

#[test]
fn what_makes_room_for_it_costs_where_memory_is_full() {
    let blocks = [whole(0, &[(1, Tier::Host)], false)];
    let full = |free_bytes| bill(&blocks, 0, &Server { free_bytes, ..server(2, 0) }).candidate.displaced;
    assert_eq!(full(None), Duration::ZERO);
    assert_eq!(full(Some(BYTES)), Duration::ZERO);
    assert_eq!(full(Some(0)), nanos(BYTES as f64 * DISPLACED_WANTED));
    let host = bill(&blocks, 0, &Server { free_bytes: Some(0), ..server(1, 0) });
    assert_eq!(host.candidate.displaced, Duration::ZERO, "it lies there already");
}

#[test]
fn a_queue_sends_it_elsewhere_and_a_tenth_does_not() {
    let blocks: Vec<BlockPlaces> = (0..10).map(|n| whole(n, &[(1, Tier::Host)], false)).collect();
    let groups = [group(GroupKind::Full, 16)];
    let step = Step { groups: &groups, block_bytes: &[BYTES], prompt_tokens: 320, blocks: &blocks };
    let costing = Costing::new(step, RATES);
    let choose = |queues: [u64; 2], current| {
        let bills = [(0, queues[0]), (1, queues[1])].map(|(node, queue)| costing.bill(&server(node, queue)));
        let choice = choose(&bills, current).unwrap();
        (choice.node, choice.reason)
    };
    assert_eq!(choose([0, 0], None), (1, Reason::State));
    assert_eq!(choose([0, 500], None), (0, Reason::Queue));
    assert_eq!(choose([0, 500], Some(1)), (0, Reason::Queue));
    assert_eq!(choose([0, 10], Some(1)), (1, Reason::Stays));
    let nothing = Step { blocks: &[], ..step };
    let bills = [(0, 5), (1, 3)].map(|(node, queue)| Costing::new(nothing, RATES).bill(&server(node, queue)));
    let choice = super::choose(&bills, None).unwrap();
    assert_eq!((choice.node, choice.reason), (1, Reason::Queue), "nothing of it is anywhere");
}

#[test]
fn indexes_without_end_cost_nothing() {
    let blocks = [whole(u32::MAX, &[(1, Tier::Host)], false), whole(MAX_BLOCK_INDEX, &[(1, Tier::Host)], false)];
    assert_eq!(tokens(&bill(&blocks, 16, &server(1, 0))), [0, 0, 0, 0, 16]);
    let foreign = [BlockPlaces { group: 7, ..whole(0, &[(1, Tier::Host)], false) }];
    assert_eq!(tokens(&bill(&foreign, 16, &server(1, 0))), [0, 0, 0, 0, 16]);
}

/// Where a node has a block from, by the letter.
fn naive_source(block: &BlockPlaces, node: u32) -> Option<usize> {
    let of_shard = |shard: &ShardPlaces| {
        let own = |tier| shard.on.contains(&(node, tier));
        let others = shard.on.iter().any(|(n, tier)| *n != node && *tier != Tier::Object);
        let from = [own(Tier::Host), own(Tier::Disk), others, own(Tier::Object) || shard.packed];
        from.iter().position(|had| *had)
    };
    block.shards.iter().map(of_shard).collect::<Option<Vec<_>>>()?.into_iter().max()
}

/// The least that one end of the prefix costs, in nanoseconds.
fn naive_cost(blocks: &[BlockPlaces], prompt_tokens: u32, node: u32) -> f64 {
    let a_block = |source: usize| BYTES as f64 * RATES.nanos_per_byte[NEAREST_FIRST[source].index()];
    let sources: Vec<Option<usize>> = blocks.iter().map(|b| naive_source(b, node)).collect();
    let cost = |end: usize| {
        let load: f64 = sources[..end].iter().flatten().map(|s| a_block(*s)).sum();
        load + f64::from(prompt_tokens - 16 * u32::try_from(end).unwrap()) * 1e6
    };
    let reach = |reach: usize| sources.iter().take_while(|s| s.is_some_and(|s| s <= reach)).count();
    [0, reach(0), reach(1), reach(2), reach(3)].into_iter().map(cost).fold(f64::INFINITY, f64::min)
}

fn a_shard() -> impl Strategy<Value = ShardPlaces> {
    let tier = prop::sample::select(vec![Tier::Host, Tier::Disk, Tier::Object]);
    let on = prop::collection::btree_map(0_u32..4, tier, 0..3);
    (on, prop::bool::ANY).prop_map(|(on, packed)| ShardPlaces { on: on.into_iter().collect(), packed })
}

proptest! {
    /// The bill is the least of the ends, says where every token comes from, and no node is forgotten.
    #[test]
    fn bills_agree_with_a_naive_model(shards in prop::collection::vec([a_shard(), a_shard()], 0..40), more in 0_u32..100) {
        let blocks: Vec<BlockPlaces> = (0..).zip(shards)
            .map(|(block, shards)| BlockPlaces { group: 0, block, shards: shards.to_vec() })
            .collect();
        let prompt_tokens = 16 * u32::try_from(blocks.len()).unwrap() + more;
        // A prompt of no tokens is as long as its blocks.
        let bills: Vec<Bill> = (0..5).map(|node| bill(&blocks, prompt_tokens, &server(node, 0))).collect();
        for (node, bill) in (0..).zip(&bills) {
            assert_eq!(bill.served_tokens() + bill.recompute_tokens, prompt_tokens);
            let want = naive_cost(&blocks, prompt_tokens, node);
            let got = bill.candidate.cost().as_secs_f64() * 1e9;
            assert!((got - want).abs() <= 1_000.0 + want * 1e-6, "node {node}: {got} for {want}");
        }
        let choice = choose(&bills, None).unwrap();
        assert!(bills.iter().all(|bill| bill.candidate.cost() >= choice.cost));
    }
}
