//! Measures reads over UCX between two processes, to compare with `ucx_perftest -t ucp_get -e` of the same library.
//!
//! Usage: `ucx_ratio TLS BYTES WINDOW FRAMES` reads frames of `BYTES` from a second process, `WINDOW` at a time, round robin
//! over `FRAMES` frames and as many buffers: choose `BYTES * FRAMES` above the caches' size. Prints GB/s of the best of
//! some slices of a second; checksums are computed, as in every read. `KVTIER_UCX_LIBRARY` chooses another library.

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use kvtier_memory::{Alloc, Arena, ArenaConfig, FramePin, IoBuf, PageKind};
use kvtier_transport::ucx::{UcxConfig, UcxTransport};
use kvtier_transport::{Descriptor, Link, ReadTerms, Transport};
use tokio_util::sync::CancellationToken;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const DEADLINE: Duration = Duration::from_secs(60);
const SLICE: Duration = Duration::from_secs(1);
const SLICES: usize = 5;

struct Terms {
    tls: String,
    bytes: usize,
    window: usize,
    frames: usize,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [tls, bytes, window, frames, role @ ..] = args.as_slice() else {
        return Err("usage: ucx_ratio TLS BYTES WINDOW FRAMES".into());
    };
    let terms = Terms { tls: tls.clone(), bytes: bytes.parse()?, window: window.parse()?, frames: frames.parse()? };
    if role.is_empty() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        return runtime.block_on(async { tokio::spawn(read(terms)).await? });
    }
    own(&terms)
}

fn start(terms: &Terms) -> Result<UcxTransport> {
    let library = std::env::var_os("KVTIER_UCX_LIBRARY").map(Into::into);
    Ok(UcxTransport::start(UcxConfig { library, tls: Some(terms.tls.clone()), ..UcxConfig::default() })?)
}

/// So many frames of so many bytes.
fn frames(terms: &Terms) -> Result<Vec<FramePin>> {
    let total = (terms.bytes.next_multiple_of(4096) * terms.frames) as u64;
    let config = ArenaConfig {
        capacity_bytes: total,
        extent_bytes: total,
        page_kind: PageKind::Transparent,
        first_generation: 1,
    };
    let arena = Arena::new(config)?;
    let mut frames = Vec::new();
    while frames.len() < terms.frames {
        match arena.alloc(terms.bytes as u64) {
            Alloc::Granted(id) => frames.extend(arena.pin(id)),
            Alloc::Growing => drop(arena.grow()?),
            full => return Err(format!("no frame: {full:?}").into()),
        }
    }
    for (seed, frame) in frames.iter().enumerate() {
        frame.fill(u8::try_from(seed % 251)?);
    }
    Ok(frames)
}

/// The owner: writes its address and descriptors as hex, and serves until its input ends.
fn own(terms: &Terms) -> Result<()> {
    let transport = start(terms)?;
    let exposures =
        frames(terms)?.into_iter().map(|frame| transport.expose(frame)).collect::<std::result::Result<Vec<_>, _>>()?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "kvtier {}", hex(&transport.address()))?;
    for exposure in &exposures {
        writeln!(out, "kvtier {}", hex(exposure.descriptor().as_bytes()))?;
    }
    out.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

async fn read(terms: Terms) -> Result<()> {
    let mut owner = Command::new(std::env::current_exe()?)
        .args(std::env::args().skip(1))
        .arg("owner")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let out = BufReader::new(owner.stdout.take().ok_or("no output")?);
    // UCX writes its own messages there too.
    let lines = out.lines().filter_map(|line| Some(Bytes::from(unhex(line.ok()?.strip_prefix("kvtier ")?)?)));
    let mut lines = lines.take(terms.frames + 1);
    let address = lines.next().ok_or("the owner did not start")?;
    let descriptors = lines.map(Descriptor::new).collect::<std::result::Result<Vec<_>, _>>()?;
    let transport = start(&terms)?;
    let link = transport.connect(&address, DEADLINE).await?;
    let mut buffers: Vec<IoBuf> = frames(&terms)?.into_iter().map(IoBuf::from).collect();
    let mut best: f64 = 0.0;
    for _ in 0..SLICES {
        best = best.max(slice(&*link, &terms, &descriptors, &mut buffers).await?);
    }
    println!("{} UCX {} {} bytes: {best:.2} GB/s", terms.tls, transport.version(), terms.bytes);
    drop(link);
    transport.close(DEADLINE).await;
    drop(owner.stdin.take());
    owner.wait()?;
    Ok(())
}

/// Reads for a while; GB/s.
async fn slice(link: &dyn Link, terms: &Terms, from: &[Descriptor], buffers: &mut Vec<IoBuf>) -> Result<f64> {
    let begun = Instant::now();
    let read_terms = ReadTerms { deadline: tokio::time::Instant::now() + DEADLINE, cancel: CancellationToken::new() };
    let mut reads = FuturesUnordered::new();
    let mut descriptors = from.iter().cycle();
    let mut idle: std::collections::VecDeque<IoBuf> = buffers.drain(..).collect();
    let mut bytes = 0_u64;
    loop {
        while reads.len() < terms.window && begun.elapsed() < SLICE {
            let (Some(into), Some(from)) = (idle.pop_front(), descriptors.next()) else { break };
            reads.push(link.read(from, into, read_terms.clone()));
        }
        let Some(done) = reads.next().await else { break };
        bytes += done.into.len() as u64;
        done.result?;
        idle.push_back(done.into);
    }
    let seconds = begun.elapsed().as_secs_f64();
    buffers.extend(idle);
    Ok(bytes as f64 / seconds / 1e9)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    (0..text.len() / 2).map(|at| u8::from_str_radix(text.get(at * 2..at * 2 + 2)?, 16).ok()).collect()
}
