//! Our TCP transport against plain TCP, over loopback: the same connections, the same touched memory, rounds interleaved.
//!
//! Expected on loopback: at least 0.9 of plain TCP for 64 KiB and 2 MiB blocks, checksums included. Ratios count, absolute
//! figures depend on who else uses the machine.
#![expect(clippy::unwrap_used, reason = "a program for measuring: it panics when it cannot")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use kvtier_memory::{Alloc, Arena, ArenaConfig, FramePin, IoBuf, PageKind};
use kvtier_transport::tcp::{TcpConfig, TcpTransport};
use kvtier_transport::{Exposure, Link, ReadTerms, Transport};
use tokio_util::sync::CancellationToken;

/// Memory at each end.
const MEMORY_BYTES: usize = 128 << 20;
/// Asked for and not received: what a node onboarding a prefix has under way.
const WINDOW_BYTES: usize = 32 << 20;
const STREAMS: usize = 4;

fn main() {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<usize>().unwrap());
    let (rounds, round_mib) = (args.next().unwrap_or(9), args.next().unwrap_or(1024));
    for block in [64 << 10, 2 << 20] {
        report(block, rounds, round_mib << 20);
    }
}

fn report(block: usize, rounds: usize, bytes: usize) {
    let mut ratios = Vec::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let ours = Arc::new(runtime.block_on(Ours::start(block)));
    let mut plain = Plain { from: vec![1; MEMORY_BYTES], into: vec![2; MEMORY_BYTES] };
    for _ in 0..rounds {
        let (plain, plain_cpu) = timed(|| plain.send(block, bytes));
        let (tcp, tcp_cpu) = timed(|| {
            let ours = Arc::clone(&ours);
            // On a worker, as a daemon's tasks are.
            runtime.block_on(runtime.spawn(async move { ours.read(bytes).await })).unwrap();
        });
        let rate = |took: f64| bytes as f64 / took / 1e9;
        let per_gb = |cpu: f64| cpu / bytes as f64 * 1e9;
        println!(
            "{:>5} KiB  plain {:.2} GB/s {:.3} cpu-s/GB   ours {:.2} GB/s {:.3} cpu-s/GB   ratio {:.2}",
            block >> 10,
            rate(plain),
            per_gb(plain_cpu),
            rate(tcp),
            per_gb(tcp_cpu),
            plain / tcp
        );
        ratios.push(plain / tcp);
    }
    ratios.sort_by(f64::total_cmp);
    println!("{:>5} KiB  median ratio {:.2}", block >> 10, ratios[ratios.len() / 2]);
}

/// Seconds of the clock and of processors.
fn timed<T>(work: impl FnOnce() -> T) -> (f64, f64) {
    let cpu = || {
        let usage = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        usage.tv_sec as f64 + usage.tv_nsec as f64 / 1e9
    };
    let (begun, before) = (Instant::now(), cpu());
    work();
    (begun.elapsed().as_secs_f64(), cpu() - before)
}

/// Plain sockets, a thread for each end of each.
struct Plain {
    from: Vec<u8>,
    into: Vec<u8>,
}

impl Plain {
    fn send(&mut self, block: usize, bytes: usize) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (share, part) = (bytes / STREAMS, MEMORY_BYTES / STREAMS);
        std::thread::scope(|scope| {
            for (from, into) in self.from.chunks(part).zip(self.into.chunks_mut(part)) {
                let mut socket = TcpStream::connect(address).unwrap();
                socket.set_nodelay(true).unwrap();
                let (mut peer, _) = listener.accept().unwrap();
                scope.spawn(move || {
                    from.chunks(block).cycle().take(share / block).for_each(|block| socket.write_all(block).unwrap());
                });
                scope.spawn(move || {
                    for n in 0..share / block {
                        let at = n * block % part;
                        peer.read_exact(&mut into[at..at + block]).unwrap();
                    }
                });
            }
        });
    }
}

struct Ours {
    exposures: Vec<Box<dyn Exposure>>,
    frames: Vec<FramePin>,
    link: Box<dyn Link>,
    block: usize,
    _ends: [Arc<TcpTransport>; 2],
}

impl Ours {
    async fn start(block: usize) -> Self {
        let config = TcpConfig { streams_per_link: STREAMS, ..TcpConfig::new("127.0.0.1:0".parse().unwrap()) };
        let owner = Arc::new(TcpTransport::start(config.clone()).await.unwrap());
        let reader = Arc::new(TcpTransport::start(config).await.unwrap());
        let arena = Arena::new(ArenaConfig {
            capacity_bytes: 4 * MEMORY_BYTES as u64,
            extent_bytes: MEMORY_BYTES as u64,
            page_kind: PageKind::Plain,
            first_generation: 1,
        });
        let arena = arena.unwrap();
        let count = MEMORY_BYTES / block;
        let exposures = (0..count).map(|_| owner.expose(frame(&arena, block)).unwrap()).collect();
        let frames = (0..count).map(|_| frame(&arena, block)).collect();
        let link = reader.connect(&owner.address(), Duration::from_secs(5)).await.unwrap();
        Self { exposures, frames, link, block, _ends: [owner, reader] }
    }

    /// Reads `bytes` in blocks, a window of them at a time, and checks every checksum.
    async fn read(&self, bytes: usize) {
        let expected = self.frames[0].checksum();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        let terms = ReadTerms { deadline, cancel: CancellationToken::new() };
        let begin = |n: usize| {
            let into = IoBuf::Frame(self.frames[n % self.frames.len()].clone());
            self.link.read(self.exposures[n % self.exposures.len()].descriptor(), into, terms.clone())
        };
        let blocks = bytes / self.block;
        let mut window: FuturesUnordered<_> = (0..blocks.min(WINDOW_BYTES / self.block)).map(begin).collect();
        let mut begun = window.len();
        while let Some(done) = window.next().await {
            assert_eq!(done.result.unwrap(), expected);
            if begun < blocks {
                window.push(begin(begun));
                begun += 1;
            }
        }
    }
}

fn frame(arena: &Arena, bytes: usize) -> FramePin {
    let id = loop {
        match arena.alloc(bytes as u64) {
            Alloc::Granted(id) => break id,
            Alloc::Growing => assert!(arena.grow().unwrap()),
            full => panic!("{full:?}"),
        }
    };
    let pin = arena.pin(id).unwrap();
    pin.fill(0xa5);
    pin
}
