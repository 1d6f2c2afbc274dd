//! Verbs over the socket: how many a second, one block each, and how long one call about 10,000 blocks takes.

use std::time::Instant;

use anyhow::{Context, ensure};
use kvtier_proto::convert::block_targets;
use kvtier_proto::v1;
use kvtier_proto::v1::kv_cache_client::KvCacheClient;
use kvtier_types::BlockKey;
use tonic::transport::{Channel, Endpoint};

use crate::daemon::Daemon;
use crate::lookup::{PROMPTS, SHAPE, fill};
use crate::report::{Floor, Report, Row};
use crate::session::Session;
use crate::{Setting, engine, placing};

/// Blocks of one large call.
const TARGETS: usize = 10_000;
/// Calls at once, where several are.
const CALLERS: usize = 8;
const OWNER: &str = "bench";
/// Every budget is larger than what is asked for here: 20,000 blocks, of which 10,000 are claimed.
const CONFIG: &str = "[host]\ncapacity = \"256MiB\"\nextent = \"128MiB\"\n[disk]\nenabled = false\n\
                      [claims]\nowner_share_percent = 90\nnode_share_percent = 90\n";

type Client = KvCacheClient<Channel>;

pub(crate) fn run(setting: &Setting, report: &mut Report) -> anyhow::Result<()> {
    let daemon = Daemon::start(&setting.scratch.join("verbs"), CONFIG)?;
    let scheduler = Session::open(&engine::spec_text(&SHAPE, "scheduler", &daemon.socket()))?;
    let worker = Session::open(&engine::spec_text(&SHAPE, "worker", &daemon.socket()))?;
    fill(&scheduler, &worker)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let socket = daemon.socket();
    runtime.block_on(async {
        let channel = Endpoint::new(format!("unix://{}", socket.display()))?.connect().await?;
        let mut client = KvCacheClient::new(channel.clone()).max_decoding_message_size(64 << 20);
        let keys = keys(&mut client).await?;
        placing::arithmetic(setting.quick, report)?;
        placing::calls(channel, &keys, setting.quick, report).await?;
        rates(&client, &keys, setting.quick, report).await?;
        many(&mut client, &keys[..TARGETS], &daemon, if setting.quick { 5 } else { 15 }, report).await
    })?;
    drop((scheduler, worker));
    daemon.stop()
}

/// All keys, as the daemon lists them.
async fn keys(client: &mut Client) -> anyhow::Result<Vec<BlockKey>> {
    let (mut keys, mut page_token) = (Vec::new(), Default::default());
    loop {
        let request = v1::ListRequest { page_size: 1000, page_token, ..Default::default() };
        let page = client.list(request).await?.into_inner();
        for block in page.blocks {
            keys.push(BlockKey::new(<[u8; 32]>::try_from(&block.key[..]).context("a key has 32 bytes")?));
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            ensure!(keys.len() >= TARGETS && PROMPTS > 0, "only {} blocks", keys.len());
            return Ok(keys);
        }
    }
}

/// What a verb asks of one call.
#[derive(Debug, Clone, Copy)]
enum Verb {
    Locate,
    DryEvict,
    Pin,
    Unpin,
    Taint,
    Untaint,
    Evict,
}

impl Verb {
    /// Asks it of these blocks; `number` names the claim.
    async fn ask(self, client: &mut Client, keys: &[BlockKey], number: u64) -> anyhow::Result<()> {
        let targets = vec![block_targets(keys)];
        let (claim_id, owner) = (format!("claim-{number}"), OWNER.to_owned());
        let outcomes = match self {
            Self::Locate => {
                let found = client.locate(v1::LocateRequest { targets, ..Default::default() }).await?.into_inner();
                ensure!(found.blocks.len() == keys.len(), "{} blocks found", found.blocks.len());
                return Ok(());
            }
            Self::Pin => {
                let pin = v1::PinRequest { claim_id, owner, targets, ttl_ms: 600_000, ..Default::default() };
                let reply = client.pin(pin).await?.into_inner();
                ensure!(reply.outcome() == v1::Outcome::Applied, "{reply:?}");
                return Ok(());
            }
            Self::Unpin => {
                // A claim is over with a later revision than it was made with.
                let unpin = v1::UnpinRequest { claim_id, owner, revision: 1, ..Default::default() };
                client.unpin(unpin).await?;
                return Ok(());
            }
            Self::DryEvict | Self::Evict => {
                let dry_run = matches!(self, Self::DryEvict);
                client.evict(v1::EvictRequest { targets, dry_run, ..Default::default() }).await?.into_inner().outcomes
            }
            Self::Taint | Self::Untaint => {
                let taint = v1::Taint {
                    key: "bench".into(),
                    effect: v1::TaintEffect::PreferEvict.into(),
                    ..Default::default()
                };
                let request = v1::TaintRequest { targets, taints: vec![taint], ..Default::default() };
                let call = if matches!(self, Self::Taint) {
                    client.taint(request).await
                } else {
                    client.untaint(request).await
                };
                call?.into_inner().outcomes
            }
        };
        ensure!(outcomes.len() == keys.len(), "{} outcomes", outcomes.len());
        Ok(())
    }
}

/// Verbs a second, one block each, from several callers over one connection.
async fn rates(client: &Client, keys: &[BlockKey], quick: bool, report: &mut Report) -> anyhow::Result<()> {
    let calls = if quick { 200 } else { 1000 };
    for (name, verbs) in [
        ("locate", [Verb::Locate].as_slice()),
        ("evict, dry run", &[Verb::DryEvict]),
        ("pin and unpin, each durable", &[Verb::Pin, Verb::Unpin]),
        ("taint and untaint, each durable", &[Verb::Taint, Verb::Untaint]),
    ] {
        let mut rates = Vec::new();
        for round in 0..3 {
            let begin = Instant::now();
            let one = |caller: usize| {
                let mut client = client.clone();
                async move {
                    for call in (caller..calls).step_by(CALLERS) {
                        for verb in verbs {
                            verb.ask(&mut client, &keys[call..=call], (round * calls + call) as u64).await?;
                        }
                    }
                    anyhow::Ok(())
                }
            };
            futures::future::try_join_all((0..CALLERS).map(one)).await?;
            rates.push((calls * verbs.len()) as f64 / begin.elapsed().as_secs_f64());
        }
        report.add(Row::value(&format!("verbs: {name}, {CALLERS} callers"), "/s", rates, Floor::None));
    }
    Ok(())
}

/// One call about many blocks, and how long the core's lock was held at once meanwhile.
async fn many(
    client: &mut Client,
    keys: &[BlockKey],
    daemon: &Daemon,
    samples: u64,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut number = 1 << 32;
    for (name, verbs) in [
        ("evict, dry run", [Verb::DryEvict].as_slice()),
        ("pin", &[Verb::Pin, Verb::Unpin]),
        ("taint", &[Verb::Taint, Verb::Untaint]),
    ] {
        let (mut millis, mut holds) = (Vec::new(), Vec::new());
        for _ in 0..samples {
            number += 1;
            daemon.metric(crate::lookup::HOLD)?;
            let begin = Instant::now();
            verbs[0].ask(client, keys, number).await?;
            millis.push(begin.elapsed().as_secs_f64() * 1e3);
            holds.push(daemon.metric(crate::lookup::HOLD)?);
            for verb in &verbs[1..] {
                verb.ask(client, keys, number).await?;
            }
        }
        report.add(Row::value(&format!("verbs: {name} of {TARGETS} targets"), "ms", millis, Floor::None));
        report.add(Row::value("  longest hold of the core's lock", "us", holds, Floor::None));
    }
    // Once, since it leaves nothing to evict.
    let begin = Instant::now();
    Verb::Evict.ask(client, keys, number).await?;
    let millis = vec![begin.elapsed().as_secs_f64() * 1e3];
    report.add(Row::value(&format!("verbs: evict of {TARGETS} targets, durable"), "ms", millis, Floor::None));
    Ok(())
}
