//! The UCX transport between two processes against `ucx_perftest -t ucp_get -e` of the same library and transports.
//!
//! `ucx_perftest` reads into one buffer, so its messages are as long as the working set: with shorter ones it would measure
//! a cache. It has no cost per block then, which makes the baseline the stricter one for short blocks.
//!
//! Over shared memory it reads another kind of memory: what UCX allocated itself and the reader maps, so that its read is
//! one memcpy of the whole working set, long enough for libc to bypass the cache. Ours is in memfds that engines map too,
//! which UCX does not know how to map: of such memory UCX 1.13 sends messages of 8 KiB instead (`UCX_LOG_LEVEL=info` shows a
//! lane for `rma` over `posix` and none over `cma`), so every byte is copied twice. So two more baselines are shown beside
//! it: `ucx_perftest` over memory that UCX only registered, as ours is, and one thread's memcpy of the same blocks.
//!
//! Over sockets our transport has UCX send longer messages than it does by itself; beside the floor's row there is one
//! against `ucx_perftest` that sends such messages too.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use kvtier_memory::copy::Run;
use kvtier_memory::{FramePin, IoBuf};
use kvtier_transport::ucx::{UcxConfig, UcxTransport};
use kvtier_transport::{Descriptor, Link, ReadTerms, Transport};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use crate::Setting;
use crate::alternate::round;
use crate::frames::frames;
use crate::raw::memcpy;
use crate::report::{Floor, Report, Row};
use crate::stats::Round;

const PERFTEST: &str = "ucx_perftest";
const SOCKETS: &str = "tcp";
const SHARED_MEMORY: &str = "posix,cma";
/// Bytes asked for and not received.
const WINDOW_BYTES: u64 = 16 << 20;
/// What UCX is told to send as long messages over sockets as our transport has it do.
const LONG_SEGMENTS: [(&str, &str); 1] = [("UCX_TCP_TX_SEG_SIZE", "64k")];
/// What keeps UCX from allocating the memory that its peer reads.
const ONLY_REGISTERED: [(&str, &str); 1] = [("UCX_ALLOC_PRIO", "mmap")];
const PATIENCE: Duration = Duration::from_secs(60);
const FLOOR: Floor = Floor::Ratio(0.9);
/// Rounds against what is only shown.
const SHOWN_ROUNDS: u32 = 3;

/// What is served.
#[derive(Debug)]
pub(crate) struct Terms {
    pub(crate) tls: String,
    /// Bytes of a frame.
    pub(crate) block: u64,
    pub(crate) frames: usize,
}

pub(crate) fn run(setting: &Setting, report: &mut Report) -> anyhow::Result<()> {
    let transport = match start("tcp") {
        Ok(transport) => transport,
        Err(error) => {
            report.note(format!("skipped: UCX, whose library does not start: {error:#}"));
            return Ok(());
        }
    };
    report.note(format!("UCX {}", transport.version()));
    drop(transport);
    if Command::new(PERFTEST).arg("-h").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
        report.note(format!("skipped: UCX, because there is no {PERFTEST} to compare with"));
        return Ok(());
    }
    let memory = setting.working_set_bytes();
    for tls in [SOCKETS, SHARED_MEMORY] {
        if let Err(error) = perftest(tls, memory, 1, &[]) {
            report.note(format!("skipped: UCX over {tls}, which {PERFTEST} cannot: {error:#}"));
            continue;
        }
        for (name, block) in [("2 MiB", 2 << 20), ("64 KiB", 64 << 10)] {
            let terms = Terms { tls: tls.to_owned(), block, frames: usize::try_from(memory / block)? };
            let count = if setting.quick { 3 } else { 9 };
            let row = format!("ucx read of {name} blocks, {tls}");
            let taken = rounds(&terms, memory, count, Baseline::Perftest(&[]))?;
            report.add(Row::ratio(&row, (memory, &taken), PERFTEST, FLOOR));
            if tls == SOCKETS {
                let taken = rounds(&terms, memory, SHOWN_ROUNDS, Baseline::Perftest(&LONG_SEGMENTS))?;
                report.add(Row::ratio(&row, (memory, &taken), "perftest, 64 KiB", Floor::None));
            } else {
                let taken = rounds(&terms, memory, SHOWN_ROUNDS, Baseline::Perftest(&ONLY_REGISTERED))?;
                report.add(Row::ratio(&row, (memory, &taken), "perftest, registered", Floor::None));
                let taken = rounds(&terms, memory, SHOWN_ROUNDS, Baseline::Memcpy)?;
                report.add(Row::ratio(&row, (memory, &taken), "memcpy", Floor::None));
            }
        }
    }
    Ok(())
}

/// What reads are compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Baseline {
    /// `ucx_perftest` with these settings of UCX.
    Perftest(&'static [(&'static str, &'static str)]),
    Memcpy,
}

fn rounds(terms: &Terms, bytes: u64, count: u32, baseline: Baseline) -> anyhow::Result<Vec<Round>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut taken = Vec::new();
    let mut reader = Reader::start(&runtime, terms)?;
    reader.read(&runtime)?;
    let source = if baseline == Baseline::Memcpy { frames(terms.block, terms.frames)? } else { Vec::new() };
    let runs: Vec<Run> = source.iter().zip(&reader.frames).map(|(from, to)| run_between(from, to)).collect();
    for number in 0..count {
        let baseline = || match baseline {
            // Messages in a row: perftest's own start is not in its figures.
            Baseline::Perftest(settings) => {
                Ok::<_, anyhow::Error>(bytes as f64 / perftest(&terms.tls, bytes, 3, settings)?)
            }
            Baseline::Memcpy => Ok(memcpy(&runs)),
        };
        taken.push(round(number, || reader.read(&runtime), baseline)?);
    }
    reader.close(&runtime);
    Ok(taken)
}

/// A whole frame's bytes to another frame.
fn run_between(from: &FramePin, to: &FramePin) -> Run {
    Run { src: from.as_mut_ptr(), dst: to.as_mut_ptr(), len: from.len() }
}

fn start(tls: &str) -> anyhow::Result<UcxTransport> {
    Ok(UcxTransport::start(UcxConfig { tls: Some(tls.to_owned()), ..UcxConfig::default() })?)
}

/// A process that is killed when dropped.
#[derive(Debug)]
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.0.kill();
        let _waited = self.0.wait();
    }
}

/// The owner: writes its address and descriptors as hex, and serves until its input ends.
///
/// # Errors
/// UCX's and the system's.
pub(crate) fn own(terms: &Terms) -> anyhow::Result<()> {
    let transport = start(&terms.tls)?;
    let exposures = frames(terms.block, terms.frames)?.into_iter().map(|frame| transport.expose(frame));
    let exposures = exposures.collect::<Result<Vec<_>, _>>()?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "kvtier {}", hex::encode(transport.address()))?;
    for exposure in &exposures {
        writeln!(out, "kvtier {}", hex::encode(exposure.descriptor().as_bytes()))?;
    }
    out.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

struct Reader {
    _owner: Process,
    transport: UcxTransport,
    link: Box<dyn Link>,
    descriptors: Vec<Descriptor>,
    frames: Vec<FramePin>,
    window: usize,
}

impl Reader {
    fn start(runtime: &Runtime, terms: &Terms) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--ucx-owner", &terms.tls, &terms.block.to_string(), &terms.frames.to_string()]);
        let mut owner = Process(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
        let out = BufReader::new(owner.0.stdout.take().context("no output")?);
        // UCX writes its own messages there too.
        let line = |line: std::io::Result<String>| hex::decode(line.ok()?.strip_prefix("kvtier ")?).ok();
        let mut lines = out.lines().filter_map(line).map(Bytes::from).take(terms.frames + 1);
        let address = lines.next().context("the owner did not start")?;
        let descriptors = lines.map(Descriptor::new).collect::<Result<Vec<_>, _>>()?;
        let transport = start(&terms.tls)?;
        let link = runtime.block_on(transport.connect(&address, PATIENCE))?;
        let window = usize::try_from(WINDOW_BYTES / terms.block)?;
        let frames = frames(terms.block, terms.frames)?;
        Ok(Self { _owner: owner, transport, link, descriptors, frames, window })
    }

    /// Seconds of reading every frame once.
    fn read(&mut self, runtime: &Runtime) -> anyhow::Result<f64> {
        let terms = ReadTerms { deadline: tokio::time::Instant::now() + PATIENCE, cancel: CancellationToken::new() };
        let begin = Instant::now();
        runtime.block_on(async {
            let pairs = self.descriptors.iter().zip(&self.frames);
            let mut pairs = pairs.map(|(from, to)| self.link.read(from, IoBuf::Frame(to.clone()), terms.clone()));
            let mut reads: FuturesUnordered<_> = pairs.by_ref().take(self.window).collect();
            while let Some(done) = reads.next().await {
                done.result?;
                reads.extend(pairs.next());
            }
            anyhow::Ok(())
        })?;
        Ok(begin.elapsed().as_secs_f64())
    }

    fn close(self, runtime: &Runtime) {
        drop(self.link);
        runtime.block_on(self.transport.close(PATIENCE));
    }
}

/// Bytes a second that `ucx_perftest` reads in messages of `bytes`, with more of UCX's settings.
fn perftest(tls: &str, bytes: u64, messages: u32, settings: &[(&str, &str)]) -> anyhow::Result<f64> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
    let command = || {
        let mut command = Command::new(PERFTEST);
        command.env("UCX_TLS", tls).env("UCX_MM_ERROR_HANDLING", "y").env("UCX_WARN_UNUSED_ENV_VARS", "n");
        command.envs(settings.iter().copied());
        command.args(["-p", &port]).stdin(Stdio::null()).stderr(Stdio::null());
        command
    };
    let _server = Process(command().stdout(Stdio::null()).spawn()?);
    let begin = Instant::now();
    loop {
        let mut client = command();
        client.args(["127.0.0.1", "-t", "ucp_get", "-e", "-f", "-w", "1", "-s", &bytes.to_string()]);
        let output = client.args(["-n", &messages.to_string()]).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        if let Some(rate) = text.lines().rev().find_map(overall) {
            return Ok(rate);
        }
        if begin.elapsed() > Duration::from_secs(5) {
            bail!("no figures, and {}", output.status);
        }
        // The server does not listen yet.
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The overall bandwidth of a line of figures, in bytes a second: iterations, three latencies, bandwidths in MiB/s, rates.
fn overall(line: &str) -> Option<f64> {
    let fields: Vec<f64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    let mib = *fields.get(5)?;
    (fields.len() == 8 && mib > 0.0).then_some(mib * 1_048_576.0)
}
