//! Placements of a step with a context of 1,000 blocks on 100 nodes: the arithmetic alone, and the whole call over the
//! socket.

use std::time::{Duration, Instant};

use anyhow::ensure;
use kvtier_policy::programs::{BlockPlaces, Costing, LoadRates, Server, ShardPlaces, Step, choose};
use kvtier_proto::convert::block_targets;
use kvtier_proto::v1;
use kvtier_proto::v1::programs_client::ProgramsClient;
use kvtier_types::{BlockKey, GroupKind, GroupSpec, Tier};
use tonic::transport::Channel;

use crate::report::{Floor, Report, Row};

const NODES: u32 = 100;
const BLOCKS: u32 = 1_000;
/// Every so many nodes one holds all of the context, in another tier each time.
const HOLDERS: usize = 10;

/// The arithmetic: what the step costs on each node, and the choice.
pub(crate) fn arithmetic(quick: bool, report: &mut Report) -> anyhow::Result<()> {
    let groups = [GroupSpec { kind: GroupKind::Full, block_tokens: 16, layers: vec!["layer".into()] }];
    let tiers = [Tier::Host, Tier::Disk, Tier::Object];
    let on: Vec<(u32, Tier)> = (0..NODES).step_by(HOLDERS).zip(tiers.into_iter().cycle()).collect();
    let place = |block| BlockPlaces { group: 0, block, shards: vec![ShardPlaces { on: on.clone(), packed: true }] };
    let blocks: Vec<BlockPlaces> = (0..BLOCKS).map(place).collect();
    let step = Step { groups: &groups, block_bytes: &[2 << 20], prompt_tokens: 20_000, blocks: &blocks };
    let rates = LoadRates { nanos_per_byte: [0.0, 0.05, 1.0, 10.0, 1.0], latency: [Duration::ZERO; 5] };
    let mut micros = Vec::new();
    for round in 0..if quick { 100 } else { 1_000_u64 } {
        let begin = Instant::now();
        let costing = Costing::new(step, rates);
        let server = |node: u32| Server {
            node,
            queue: Duration::from_millis(round % 7 + u64::from(node)),
            prefill_tokens_per_second: 0,
            free_bytes: Some(1 << 30),
        };
        let bills: Vec<_> = (0..NODES).map(|node| costing.bill(&server(node))).collect();
        let choice = choose(&bills, Some(1));
        micros.push(begin.elapsed().as_secs_f64() * 1e6);
        ensure!(choice.is_some_and(|c| c.node == 0), "{choice:?}");
    }
    let name = format!("placing: costs of {BLOCKS} blocks on {NODES} nodes");
    report.add(Row::value(&name, "us", micros, Floor::AtMost(1_000.0)));
    Ok(())
}

/// The whole call, of a node that has the context itself.
pub(crate) async fn calls(channel: Channel, keys: &[BlockKey], quick: bool, report: &mut Report) -> anyhow::Result<()> {
    let mut client = ProgramsClient::new(channel);
    let keys = &keys[..BLOCKS as usize];
    let candidate = |n| v1::PlaceCandidate { node_id: format!("node-{n}"), queue_ms: n, prefill_tokens_per_second: 0 };
    let mut request = v1::PlaceRequest { targets: vec![block_targets(keys)], ..Default::default() };
    // The node is alone: it names itself.
    let own = client.place(request.clone()).await?.into_inner().node_id;
    let own = v1::PlaceCandidate { node_id: own, ..Default::default() };
    request.candidates = (1..NODES).map(candidate).chain([own]).collect();
    let mut micros = Vec::new();
    for _ in 0..if quick { 100 } else { 1_000 } {
        let request = request.clone();
        let begin = Instant::now();
        let reply = client.place(request).await?.into_inner();
        micros.push(begin.elapsed().as_secs_f64() * 1e6);
        ensure!(reply.costs.len() == NODES as usize, "{} costs", reply.costs.len());
    }
    let summary = crate::stats::Summary::of(micros.clone());
    report.add(Row::value(&format!("placing: a call, {BLOCKS} keys, {NODES} candidates"), "us", micros, Floor::None));
    report.add(Row::value("  its 99th percentile", "us", vec![summary.p99], Floor::None));
    Ok(())
}
