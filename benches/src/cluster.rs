//! Two nodes and a directory: 1,000 blocks of 64 KiB written on one node and looked up on the other, which never saw them.
//!
//! Node b has had all of its host memory in use before. The clock starts when the lookup is submitted. *First byte*: node b's
//! status counts bytes read from peers; it counts a block when the block has arrived, and is asked every [`LOOK_EVERY`], so
//! what is shown is an upper bound. *In memory*: the lookup is answered, with all tokens, after as many bytes were read as the
//! prefix has.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use kvtier::lookup::table::Settlement;
use kvtier::lookup::{HitPoll, Query};
use kvtier_proto::v1;
use kvtier_proto::v1::admin_client::AdminClient;
use kvtier_tests::valkey::Valkey;
use kvtier_tests::wait::{PATIENCE, until};
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

use crate::Setting;
use crate::report::{Floor, Report, Row};

const BLOCKS: u32 = 1000;
const BLOCK_BYTES: u64 = 64 << 10;
/// Between two looks at what was read: looking without a pause would take a processor from what is looked at.
const LOOK_EVERY: Duration = Duration::from_micros(200);

pub(crate) fn run(setting: &Setting, report: &mut Report) -> anyhow::Result<()> {
    let Some(valkey) = Valkey::start() else {
        report.note("skipped: the cluster, because there is neither valkey-server nor redis-server".to_owned());
        return Ok(());
    };
    let samples: u32 = if setting.quick { 5 } else { 15 };
    // Room for every prompt and one that is not timed, and some more.
    let host_mib = u64::from(samples + 3) * ((u64::from(BLOCKS) * BLOCK_BYTES) >> 20);
    let program = std::env::current_exe()?.with_file_name("kvtierd");
    let program = program.to_str().context("a path that is no text")?;
    let start = |name: &str| {
        let setup = Setup { node_id: name.into(), host_mib, extent_mib: 64, disk_mib: None, ..Setup::default() };
        Daemon::start(program, Setup { directory: Some(valkey.url()), ..setup })
    };
    let (a, b) = (start("a"), start("b"));
    let shape = Shape::with_block_bytes(BLOCK_BYTES);
    let (on_a, on_b) = (Engine::attach(&a, &shape), Engine::attach(&b, &shape));
    let prompts: Vec<_> = (0..=samples).map(|number| Prompt::new(format!("prompt {number}"), BLOCKS)).collect();
    for prompt in &prompts {
        on_a.put_all(prompt);
    }
    fill(&b, &on_b, &shape, samples)?;
    wait_told(&a);
    wait_told(&b);
    let watch = Watch::open(&b)?;
    let (mut first, mut whole) = (Vec::new(), Vec::new());
    for (number, prompt) in prompts.iter().enumerate() {
        let (first_s, whole_s) = watch.fetch(&on_b, prompt, number)?;
        // The first one connects.
        if number == 0 {
            report.add(Row::value("cluster: first block, not yet connected", "ms", vec![first_s * 1e3], Floor::None));
        } else {
            first.push(first_s * 1e3);
            whole.push(whole_s * 1e3);
        }
    }
    report.add(Row::value("cluster: 1,000 blocks, until the first is there", "ms", first, Floor::AtMost(5.0)));
    report.add(Row::value("cluster: 1,000 blocks, until all are in memory", "ms", whole, Floor::None));
    Ok(())
}

/// Has a node take the memory that it may have, and frees it: a node that serves has it, and taking it is not measured.
fn fill(daemon: &Daemon, engine: &Engine, shape: &Shape, samples: u32) -> anyhow::Result<()> {
    let fillers: Vec<_> = (0..=samples).map(|number| Prompt::new(format!("filler {number}"), BLOCKS)).collect();
    for filler in &fillers {
        engine.put_all(filler);
    }
    for filler in &fillers {
        daemon.control().evict(&shape.keys(0, filler), false).context("evict")?;
    }
    Ok(())
}

/// Waits until a node has told the directory everything, and knows both nodes.
fn wait_told(daemon: &Daemon) {
    until("the directory to be told", || {
        let reply = daemon.control().nodes().ok()?;
        (reply.directory_state == "ok" && reply.unpublished == 0 && reply.nodes.len() == 2).then_some(())
    });
}

/// A connection to a node that is kept: connecting would be measured too.
struct Watch {
    runtime: Runtime,
    client: AdminClient<Channel>,
}

impl Watch {
    fn open(daemon: &Daemon) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let endpoint = Endpoint::new(format!("unix://{}", daemon.socket().display()))?;
        let client = AdminClient::new(runtime.block_on(endpoint.connect())?);
        Ok(Self { runtime, client })
    }

    /// Bytes the node has read from peers.
    fn read_bytes(&self) -> anyhow::Result<u64> {
        let status = self.runtime.block_on(self.client.clone().status(v1::StatusRequest {}))?.into_inner();
        Ok(status.transports.iter().map(|transport| transport.read_bytes).sum())
    }

    /// Seconds from a lookup's submission until the first block was read, and until the prefix is there.
    fn fetch(&self, engine: &Engine, prompt: &Prompt, number: usize) -> anyhow::Result<(f64, f64)> {
        let request_id = format!("fetch-{number}");
        let query = Query {
            request_id: request_id.clone(),
            hashes: prompt.hashes(),
            local_tokens: 0,
            cache_salt: String::new(),
            hints: Bytes::new(),
            deadline: PATIENCE,
        };
        let before = self.read_bytes()?;
        let mut first = None;
        let begin = Instant::now();
        engine.scheduler().submit_lookup(query)?;
        let hit = loop {
            if first.is_none() && self.read_bytes()? > before {
                first = Some(begin.elapsed().as_secs_f64());
            }
            match engine.scheduler().poll_lookup(&request_id, 0, u32::MAX) {
                HitPoll::Ready(hit) => break hit,
                HitPoll::Pending if begin.elapsed() < PATIENCE => std::thread::sleep(LOOK_EVERY),
                other => bail!("the lookup is {other:?}"),
            }
        };
        let whole = begin.elapsed().as_secs_f64();
        ensure!(hit.tokens == prompt.tokens(), "{} tokens of {} were found", hit.tokens, prompt.tokens());
        let read = self.read_bytes()? - before;
        ensure!(read >= u64::from(BLOCKS) * BLOCK_BYTES, "only {read} bytes were read when the lookup was answered");
        let settlement = Settlement { local_tokens: 0, claimed_tokens: hit.tokens, lost_tokens: hit.tokens };
        ensure!(engine.scheduler().release(&request_id, settlement), "the request is unknown");
        Ok((first.unwrap_or(whole), whole))
    }
}
