//! The TCP transport over loopback against plain sockets: as many connections, touched memory of the same size at both ends.
//!
//! The transport shortens send buffers of streams within a host. Plain sockets have what the kernel gives them; beside that
//! they are shown with buffers as short.
//!
//! On two cores both have two speeds and stay at one for seconds: in the slow one a stream's sender and receiver are on
//! different cores, so that the kernel's pages between them change caches, and the sender's copy into the kernel takes twice
//! as long. The last baseline shows it: plain sockets with short buffers, the senders held on one core, the receivers on
//! another. Over a network nothing goes from one core to another in that way.
//!
//! A thread for each end of each plain connection; the transport on a runtime's workers, as in a daemon, with a window of
//! reads under way and every checksum compared.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use kvtier_memory::{FramePin, IoBuf};
use kvtier_transport::tcp::{HOST_BUFFER_BYTES, TcpConfig, TcpTransport};
use kvtier_transport::{Exposure, Link, ReadTerms, Transport};
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio_util::sync::CancellationToken;

use crate::Setting;
use crate::alternate::round;
use crate::frames::frames;
use crate::report::{Floor, Report, Row};

/// Asked for and not received: what a node onboarding a prefix has under way.
const WINDOW_BYTES: usize = 32 << 20;
const STREAMS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(60);
const FLOOR: Floor = Floor::Ratio(0.9);

pub(crate) fn run(setting: &Setting, report: &mut Report) -> anyhow::Result<()> {
    let memory = usize::try_from(setting.working_set_bytes())?;
    let (rounds, bytes) = if setting.quick { (5, memory * 2) } else { (15, memory * 4) };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    for (name, block) in [("tcp read of 2 MiB blocks", 2 << 20), ("tcp read of 64 KiB blocks", 64 << 10)] {
        let ours = Arc::new(runtime.block_on(Ours::start(block, memory))?);
        let mut plain = Plain { from: vec![1; memory], into: vec![2; memory] };
        for (baseline, sockets, floor) in [
            ("plain sockets", Sockets { send_buffer: None, apart: false }, FLOOR),
            ("with short buffers", Sockets { send_buffer: Some(HOST_BUFFER_BYTES), apart: false }, Floor::None),
            ("on two cores", Sockets { send_buffer: Some(HOST_BUFFER_BYTES), apart: true }, Floor::None),
        ] {
            let mut taken = Vec::new();
            // The first round maps and connects, and is not counted.
            for number in 0..=rounds {
                let read = || -> anyhow::Result<f64> {
                    let (begin, ours) = (Instant::now(), Arc::clone(&ours));
                    runtime.block_on(runtime.spawn(async move { ours.read(bytes).await }))??;
                    Ok(begin.elapsed().as_secs_f64())
                };
                let round = round(number, read, || plain.send(block, bytes, sockets))?;
                if number > 0 {
                    taken.push(round);
                }
            }
            report.add(Row::ratio(name, (bytes as u64, &taken), baseline, floor));
        }
    }
    Ok(())
}

/// How plain sockets are set.
#[derive(Debug, Clone, Copy)]
struct Sockets {
    send_buffer: Option<usize>,
    /// Whether all senders are held on one core and all receivers on another.
    apart: bool,
}

impl Sockets {
    /// Holds this thread on a core, if the ends are to be apart.
    fn hold(self, core: usize) -> std::io::Result<()> {
        if !self.apart {
            return Ok(());
        }
        let mut cores = CpuSet::new();
        cores.set(core);
        Ok(sched_setaffinity(None, &cores)?)
    }
}

/// Plain sockets, a thread for each end of each.
struct Plain {
    from: Vec<u8>,
    into: Vec<u8>,
}

impl Plain {
    /// Seconds of sending so many bytes over connections that are there.
    fn send(&mut self, block: usize, bytes: usize, set: Sockets) -> anyhow::Result<f64> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let connect = |_| -> std::io::Result<_> {
            let socket = TcpStream::connect(address)?;
            socket.set_nodelay(true)?;
            if let Some(bytes) = set.send_buffer {
                rustix::net::sockopt::set_socket_send_buffer_size(&socket, bytes)?;
            }
            Ok((socket, listener.accept()?.0))
        };
        let sockets = (0..STREAMS).map(connect).collect::<std::io::Result<Vec<_>>>()?;
        let (count, part) = (bytes / STREAMS / block, self.from.len() / STREAMS);
        let ends = self.from.chunks(part).zip(self.into.chunks_mut(part));
        let begin = Instant::now();
        std::thread::scope(|scope| {
            let mut running = Vec::new();
            for ((mut socket, mut peer), (from, into)) in sockets.into_iter().zip(ends) {
                running.push(scope.spawn(move || {
                    set.hold(0)?;
                    from.chunks(block).cycle().take(count).try_for_each(|block| socket.write_all(block))
                }));
                running.push(scope.spawn(move || {
                    set.hold(1)?;
                    (0..count).map(|n| n * block % part).try_for_each(|at| peer.read_exact(&mut into[at..at + block]))
                }));
            }
            running.into_iter().try_for_each(|end| -> anyhow::Result<()> {
                end.join().map_err(|_| anyhow!("a thread of the plain sockets ended"))?.context("plain sockets")
            })
        })?;
        Ok(begin.elapsed().as_secs_f64())
    }
}

struct Ours {
    exposures: Vec<Box<dyn Exposure>>,
    frames: Vec<FramePin>,
    link: Box<dyn Link>,
    block: usize,
    _ends: [TcpTransport; 2],
}

impl Ours {
    async fn start(block: usize, memory: usize) -> anyhow::Result<Self> {
        let config = TcpConfig { streams_per_link: STREAMS, ..TcpConfig::new("127.0.0.1:0".parse()?) };
        let owner = TcpTransport::start(config.clone()).await?;
        let reader = TcpTransport::start(config).await?;
        let (bytes, count) = (block as u64, memory / block);
        let exposures = frames(bytes, count)?.into_iter().map(|frame| owner.expose(frame)).collect::<Result<_, _>>()?;
        let link = reader.connect(&owner.address(), PATIENCE).await?;
        Ok(Self { exposures, frames: frames(bytes, count)?, link, block, _ends: [owner, reader] })
    }

    /// Reads so many bytes in blocks, a window of them at a time, and compares every checksum.
    async fn read(&self, bytes: usize) -> anyhow::Result<()> {
        let expected = self.frames[0].checksum();
        let terms = ReadTerms { deadline: tokio::time::Instant::now() + PATIENCE, cancel: CancellationToken::new() };
        let begin = |n: usize| {
            let into = IoBuf::Frame(self.frames[n % self.frames.len()].clone());
            self.link.read(self.exposures[n % self.exposures.len()].descriptor(), into, terms.clone())
        };
        let blocks = bytes / self.block;
        let mut window: FuturesUnordered<_> = (0..blocks.min(WINDOW_BYTES / self.block)).map(begin).collect();
        let mut begun = window.len();
        while let Some(done) = window.next().await {
            ensure!(done.result? == expected, "a block arrived with another checksum");
            if begun < blocks {
                window.push(begin(begun));
                begun += 1;
            }
        }
        Ok(())
    }
}
