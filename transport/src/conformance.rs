//! What every [`Transport`] promises, as one suite to run over each implementation. Panics where a promise is broken.
//!
//! Each case gets a fresh pair of transports from the [`Fixture`] and names itself when it fails. Nothing here depends on
//! speed: deadlines are far beyond what any step takes, unless a deadline is what is tested.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use kvtier_memory::checksum::checksum;
use kvtier_memory::{Alloc, Arena, ArenaConfig, FrameId, FramePin, IoBuf, PageKind};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{Descriptor, Exposure, Link, MAX_ADDRESS_BYTES, ReadDone, ReadTerms, Transport, TransportError};

/// Far more than any step of the suite takes.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long a read of a peer that was closed may go on.
const SHORT_DEADLINE: Duration = Duration::from_secs(5);
/// Between two looks at something that is about to become true.
const LOOK: Duration = Duration::from_millis(2);
const ARENA_BYTES: u64 = 192 << 20;
const EXTENT_BYTES: u64 = 8 << 20;
const MIB: usize = 1 << 20;

/// An owner of frames and a reader of them, on one machine.
#[derive(Debug)]
pub struct Pair {
    /// Exposes.
    pub owner: Arc<dyn Transport>,
    /// Connects and reads.
    pub reader: Arc<dyn Transport>,
}

/// A source of fresh pairs.
#[async_trait]
pub trait Fixture: Send + Sync {
    /// Starts a pair, whose owner accepts [`Self::max_exposures`].
    async fn pair(&self) -> Pair;

    /// The bound on exposures that pairs are started with; at most 100,000, so that the suite can reach it.
    fn max_exposures(&self) -> usize;

    /// Whether the transport can refuse reads of an exposure that was dropped; false for one-sided hardware.
    fn knows_gone(&self) -> bool {
        true
    }
}

/// Runs every case, each on a fresh pair.
pub async fn suite(fixture: &dyn Fixture) {
    type Case = for<'a> fn(&'a dyn Fixture, &'a Bench) -> BoxFuture<'a, ()>;
    let cases: [(&str, Case); 15] = [
        ("bytes are exact", |f, b| bytes_are_exact(f, b).boxed()),
        ("many reads at once", |f, b| many_reads_at_once(f, b).boxed()),
        ("small reads all arrive", |f, b| small_reads_all_arrive(f, b).boxed()),
        ("a wrong length is refused", |f, b| a_wrong_length_is_refused(f, b).boxed()),
        ("what is no longer exposed is gone", |f, b| what_is_no_longer_exposed_is_gone(f, b).boxed()),
        ("unknown descriptors are refused", |f, b| unknown_descriptors_are_refused(f, b).boxed()),
        ("unknown addresses are refused", |f, b| unknown_addresses_are_refused(f, b).boxed()),
        ("a deadline is honoured", |f, b| a_deadline_is_honoured(f, b).boxed()),
        ("a cancel is honoured", |f, b| a_cancel_is_honoured(f, b).boxed()),
        ("a dropped future gives its memory back unharmed", |f, b| a_dropped_future_gives_memory_back(f, b).boxed()),
        ("a closed owner ends reads", |f, b| a_closed_owner_ends_reads(f, b).boxed()),
        ("a link can be made anew", |f, b| a_link_can_be_made_anew(f, b).boxed()),
        ("an exposure pins its frame", |f, b| an_exposure_pins_its_frame(f, b).boxed()),
        ("exposures are bounded", |f, b| exposures_are_bounded(f, b).boxed()),
        ("both ends can own and read", |f, b| both_ends_can_own_and_read(f, b).boxed()),
    ];
    for (name, case) in cases {
        tracing::debug!(name, "transport conformance");
        let bench = Bench::start(fixture).await;
        within(name, case(fixture, &bench)).await;
        within(name, bench.close()).await;
    }
}

/// A pair and memory to try it with.
struct Bench {
    pair: Pair,
    arena: Arena,
}

impl Bench {
    async fn start(fixture: &dyn Fixture) -> Self {
        Self { pair: fixture.pair().await, arena: arena() }
    }

    async fn link(&self) -> Box<dyn Link> {
        self.pair.reader.connect(&self.pair.owner.address(), DEADLINE).await.expect("connects to a live peer")
    }

    /// Exposes a new frame with payload number `n`.
    fn expose(&self, n: u64, len: usize) -> Box<dyn Exposure> {
        let (_, pin) = frame(&self.arena, n, len);
        self.pair.owner.expose(pin).expect("there is room to expose")
    }

    async fn close(&self) {
        self.pair.reader.close(DEADLINE).await;
        self.pair.owner.close(DEADLINE).await;
        eventually("closed transports hold no frame", || self.arena.stats().pinned_frames == 0).await;
    }
}

/// An arena of 192 MiB at most that grows as it is used.
///
/// # Panics
/// If the machine has no memory.
#[must_use]
pub fn arena() -> Arena {
    let config = ArenaConfig {
        capacity_bytes: ARENA_BYTES,
        extent_bytes: EXTENT_BYTES,
        page_kind: PageKind::Plain,
        first_generation: 1,
    };
    Arena::new(config).expect("the sizes fit")
}

/// A frame of `len` bytes with [`payload`] number `n`.
///
/// # Panics
/// If the arena is full.
#[must_use]
pub fn frame(arena: &Arena, n: u64, len: usize) -> (FrameId, FramePin) {
    let id = loop {
        match arena.alloc(len as u64) {
            Alloc::Granted(id) => break id,
            Alloc::Growing => assert!(arena.grow().expect("memory"), "it promised to grow"),
            full => panic!("the arena is too small for the suite: {full:?}"),
        }
    };
    let pin = arena.pin(id).expect("just granted");
    pin.copy_in(&payload(n, len));
    (id, pin)
}

/// Payload number `n` of `len` bytes: every one differs from every other at every page.
#[must_use]
pub fn payload(n: u64, len: usize) -> Vec<u8> {
    let mut state = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Terms with a deadline far away.
#[must_use]
pub fn terms() -> ReadTerms {
    ReadTerms { deadline: Instant::now() + DEADLINE, cancel: CancellationToken::new() }
}

/// Waits until `condition` holds.
///
/// # Panics
/// If it does not within a minute.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < until, "never came true: {what}");
        sleep(LOOK).await;
    }
}

async fn within(what: &str, case: impl Future<Output = ()>) {
    // Longer than DEADLINE, so that a case's own waits fail first and say more.
    assert!(timeout(DEADLINE * 3, case).await.is_ok(), "hangs: {what}");
}

/// Whether a read returned payload number `n`, and told its checksum.
///
/// # Panics
/// If it succeeded with other bytes.
pub fn delivered(done: ReadDone, n: u64, len: usize) -> Result<(), TransportError> {
    assert_eq!(done.into.len(), len, "the buffer comes back");
    let told = done.result?;
    let mut bytes = vec![0; len];
    done.into.copy_out(&mut bytes);
    assert!(bytes == payload(n, len), "wrong bytes for payload {n} of {len} bytes");
    assert_eq!(told, checksum(&bytes), "wrong checksum for payload {n} of {len} bytes");
    Ok(())
}

async fn read(link: &dyn Link, from: &Descriptor, n: u64, len: usize) -> Result<(), TransportError> {
    delivered(link.read(from, IoBuf::heap(len), terms()).await, n, len)
}

async fn bytes_are_exact(_: &dyn Fixture, bench: &Bench) {
    let link = bench.link().await;
    let sizes = [1, 15, 4095, 4096, 4097, 64 << 10, 100_003, MIB + 1, 2 * MIB, 5 * MIB - 7];
    for (n, len) in sizes.into_iter().enumerate() {
        let n = n as u64;
        let exposure = bench.expose(n, len);
        read(&*link, exposure.descriptor(), n, len).await.expect("into the heap");
        let (_, into) = frame(&bench.arena, 1000 + n, len);
        let done = link.read(exposure.descriptor(), into.into(), terms()).await;
        delivered(done, n, len).expect("into a frame");
        read(&*link, exposure.descriptor(), n, len).await.expect("a second time");
    }
    let stats = bench.pair.reader.stats();
    assert_eq!((stats.reads, stats.failed_reads), (3 * sizes.len() as u64, 0));
    assert_eq!(stats.read_bytes, 3 * sizes.iter().sum::<usize>() as u64);
    assert!(link.is_alive());
}

async fn many_reads_at_once(_: &dyn Fixture, bench: &Bench) {
    let link: Arc<dyn Link> = Arc::from(bench.link().await);
    let len = |n: u64| [300, 4096, 70_001, 256 << 10, MIB][usize::try_from(n % 5).unwrap_or(0)];
    let exposures: Vec<_> = (0..64).map(|n| bench.expose(n, len(n))).collect();
    let tasks = (0..4).map(|_| {
        let descriptors: Vec<_> = exposures.iter().map(|e| e.descriptor().clone()).collect();
        let link = Arc::clone(&link);
        tokio::spawn(async move {
            let reads = (0..).zip(&descriptors).map(|(n, from)| link.read(from, IoBuf::heap(len(n)), terms()));
            for (n, done) in (0..).zip(join_all(reads).await) {
                delivered(done, n, len(n)).expect("read among many");
            }
        })
    });
    for ended in join_all(tasks).await {
        ended.expect("no reader panics");
    }
}

async fn small_reads_all_arrive(_: &dyn Fixture, bench: &Bench) {
    let link = bench.link().await;
    let exposures: Vec<_> = (0..500).map(|n| bench.expose(n, 700)).collect();
    // Every read begins before any is waited for.
    let reads: Vec<_> = exposures.iter().map(|e| link.read(e.descriptor(), IoBuf::heap(700), terms())).collect();
    for (n, read) in (0..).zip(reads) {
        delivered(read.await, n, 700).expect("a small read");
    }
}

async fn a_wrong_length_is_refused(_: &dyn Fixture, bench: &Bench) {
    let link = bench.link().await;
    let exposure = bench.expose(1, 5000);
    for len in [1, 4999, 5001, 8192, 2 * MIB] {
        let done = link.read(exposure.descriptor(), IoBuf::heap(len), terms()).await;
        let expected =
            matches!(done.result, Err(TransportError::Length { exposed: 5000, wanted }) if wanted == len as u64);
        assert!(expected, "{len}: {:?}", done.result);
        assert_eq!(done.into.len(), len, "the buffer comes back");
    }
    read(&*link, exposure.descriptor(), 1, 5000).await.expect("the link is unharmed");
}

async fn what_is_no_longer_exposed_is_gone(fixture: &dyn Fixture, bench: &Bench) {
    let link = bench.link().await;
    let (gone, kept) = (bench.expose(1, 5000), bench.expose(2, 5000));
    let descriptor = gone.descriptor().clone();
    assert_eq!(bench.pair.owner.stats().exposed, 2);
    read(&*link, &descriptor, 1, 5000).await.expect("still exposed");
    drop(gone);
    assert_eq!(bench.pair.owner.stats().exposed, 1);
    if fixture.knows_gone() {
        let result = read(&*link, &descriptor, 1, 5000).await;
        assert!(matches!(result, Err(TransportError::Gone)), "{result:?}");
        assert!(link.is_alive());
        read(&*link, kept.descriptor(), 2, 5000).await.expect("the other stays");
    }
}

async fn unknown_descriptors_are_refused(_: &dyn Fixture, bench: &Bench) {
    let exposure = bench.expose(1, 5000);
    let right = exposure.descriptor().as_bytes().to_vec();
    let mut wrong = vec![vec![], vec![0; 1], vec![0xff; 512], b"GET / HTTP/1.1\r\n\r\n".to_vec(), right[1..].to_vec()];
    wrong.push(right[..right.len() - 1].to_vec());
    for bytes in wrong {
        let link = bench.link().await;
        let from = Descriptor::new(Bytes::from(bytes)).expect("not too long");
        let done = link.read(&from, IoBuf::heap(5000), terms()).await;
        assert!(done.result.is_err(), "{from:?} is no descriptor");
        assert_eq!(done.into.len(), 5000, "the buffer comes back");
    }
    let link = bench.link().await;
    read(&*link, exposure.descriptor(), 1, 5000).await.expect("the owner is unharmed");
}

async fn unknown_addresses_are_refused(_: &dyn Fixture, bench: &Bench) {
    let right = bench.pair.owner.address();
    assert!(right.len() <= MAX_ADDRESS_BYTES);
    let long = vec![b'x'; MAX_ADDRESS_BYTES + 1];
    for wrong in [&[][..], &[0], &[0xff; 64], &right[1..], &right[..right.len() / 2], &long] {
        let refused = bench.pair.reader.connect(wrong, SHORT_DEADLINE).await;
        assert!(refused.is_err(), "{wrong:?} is no address");
    }
    bench.link().await;
}

async fn a_deadline_is_honoured(_: &dyn Fixture, bench: &Bench) {
    let link = bench.link().await;
    let exposure = bench.expose(1, 2 * MIB);
    let late = ReadTerms { deadline: Instant::now(), ..terms() };
    let done = link.read(exposure.descriptor(), IoBuf::heap(2 * MIB), late).await;
    assert!(matches!(done.result, Err(TransportError::Deadline)), "{:?}", done.result);
    assert_eq!(done.into.len(), 2 * MIB, "the buffer comes back");
    read(&*link, exposure.descriptor(), 1, 2 * MIB).await.expect("the link is unharmed");
    assert_eq!(bench.pair.reader.stats().failed_reads, 1);
}

async fn a_cancel_is_honoured(_: &dyn Fixture, bench: &Bench) {
    let link = bench.link().await;
    let exposure = bench.expose(1, 2 * MIB);
    let cancelled = terms();
    cancelled.cancel.cancel();
    let done = link.read(exposure.descriptor(), IoBuf::heap(2 * MIB), cancelled).await;
    assert!(matches!(done.result, Err(TransportError::Cancelled)), "{:?}", done.result);

    let shared = terms();
    let begin = || link.read(exposure.descriptor(), IoBuf::heap(2 * MIB), shared.clone());
    let mut reads: Vec<_> = (0..8).map(|_| begin()).collect();
    delivered(reads.remove(0).await, 1, 2 * MIB).expect("not cancelled yet");
    shared.cancel.cancel();
    for done in join_all(reads).await {
        // Some may have ended before.
        let result = delivered(done, 1, 2 * MIB);
        assert!(matches!(result, Ok(()) | Err(TransportError::Cancelled)), "{result:?}");
    }
    read(&*link, exposure.descriptor(), 1, 2 * MIB).await.expect("the link is unharmed");
}

async fn a_dropped_future_gives_memory_back(_: &dyn Fixture, bench: &Bench) {
    let link = bench.link().await;
    let exposure = bench.expose(1, 2 * MIB);
    let mut frames = Vec::new();
    for n in 0..4 {
        let (id, into) = frame(&bench.arena, 100 + n, 2 * MIB);
        drop(link.read(exposure.descriptor(), into.into(), terms()));
        frames.push(id);
    }
    // Only the exposure's own pin remains: nobody can write any more.
    eventually("dropped reads unpin", || bench.arena.stats().pinned_frames == 1).await;
    let pins: Vec<_> = frames.into_iter().filter_map(|id| bench.arena.pin(id)).collect();
    pins.iter().for_each(|pin| pin.fill(0x5a));
    for _ in 0..8 {
        read(&*link, exposure.descriptor(), 1, 2 * MIB).await.expect("the link is unharmed");
    }
    for pin in pins {
        let mut bytes = vec![0; 2 * MIB];
        pin.copy_out(&mut bytes);
        assert!(bytes.iter().all(|byte| *byte == 0x5a), "written after it was given back");
    }
}

async fn a_closed_owner_ends_reads(_: &dyn Fixture, bench: &Bench) {
    let link = bench.link().await;
    let exposure = bench.expose(1, 2 * MIB);
    let short = || ReadTerms { deadline: Instant::now() + SHORT_DEADLINE, ..terms() };
    let reads: Vec<_> =
        (0..16).map(|_| link.read(exposure.descriptor(), IoBuf::heap(2 * MIB), short())).map(tokio::spawn).collect();
    bench.pair.owner.close(DEADLINE).await;
    for done in join_all(reads).await {
        // Right bytes or an error, by the deadline; never wrong bytes.
        let _ended = delivered(done.expect("no read panics"), 1, 2 * MIB);
    }
    let until = Instant::now() + DEADLINE;
    while link.is_alive() {
        assert!(Instant::now() < until, "the link never noticed that its peer is gone");
        let done = link.read(exposure.descriptor(), IoBuf::heap(2 * MIB), short()).await;
        assert!(done.result.is_err(), "read from a closed owner");
        sleep(LOOK).await;
    }
    let done = link.read(exposure.descriptor(), IoBuf::heap(2 * MIB), short()).await;
    assert!(done.result.is_err(), "read over a dead link");
    let again = bench.pair.reader.connect(&bench.pair.owner.address(), SHORT_DEADLINE).await;
    assert!(again.is_err(), "connected to a closed owner");
}

async fn a_link_can_be_made_anew(_: &dyn Fixture, bench: &Bench) {
    let exposure = bench.expose(1, 70_000);
    for _ in 0..5 {
        let link = bench.link().await;
        read(&*link, exposure.descriptor(), 1, 70_000).await.expect("a new link works");
        let unfinished = link.read(exposure.descriptor(), IoBuf::heap(70_000), terms());
        drop(link);
        // The link's end may come before the bytes do, and then it must say so.
        let _ended = delivered(unfinished.await, 1, 70_000);
    }
    eventually("dropped links are not counted", || bench.pair.reader.stats().links == 0).await;
    let both = [bench.link().await, bench.link().await];
    assert_eq!(bench.pair.reader.stats().links, 2);
    for link in &both {
        read(&**link, exposure.descriptor(), 1, 70_000).await.expect("two links beside each other");
    }
}

async fn an_exposure_pins_its_frame(_: &dyn Fixture, bench: &Bench) {
    let link = bench.link().await;
    let (id, pin) = frame(&bench.arena, 1, 300_000);
    let exposure = bench.pair.owner.expose(pin).expect("there is room to expose");
    assert!(bench.arena.free(id), "freed while exposed");
    assert_eq!(bench.arena.stats().pinned_frames, 1);
    read(&*link, exposure.descriptor(), 1, 300_000).await.expect("freed, but pinned by its exposure");
    drop(exposure);
    eventually("the slot is free", || bench.arena.stats().pinned_frames == 0).await;
}

async fn exposures_are_bounded(fixture: &dyn Fixture, bench: &Bench) {
    let link = bench.link().await;
    let (_, pin) = frame(&bench.arena, 1, 4096);
    let max = fixture.max_exposures();
    let mut exposures: Vec<_> =
        (0..max).map(|_| bench.pair.owner.expose(pin.clone()).expect("within the bound")).collect();
    let refused = bench.pair.owner.expose(pin.clone());
    assert!(matches!(refused, Err(TransportError::Limit { .. })), "{refused:?}");
    let distinct: std::collections::HashSet<_> = exposures.iter().map(|e| e.descriptor().clone()).collect();
    if fixture.knows_gone() {
        assert_eq!(distinct.len(), max, "every exposure has a descriptor of its own");
    }
    for exposure in exposures.iter().step_by(max.div_ceil(50)) {
        read(&*link, exposure.descriptor(), 1, 4096).await.expect("one of many");
    }
    exposures.pop();
    exposures.push(bench.pair.owner.expose(pin.clone()).expect("room again"));
    assert_eq!(bench.pair.owner.stats().exposed, max as u64);
}

async fn both_ends_can_own_and_read(_: &dyn Fixture, bench: &Bench) {
    let there = bench.link().await;
    let back = bench.pair.owner.connect(&bench.pair.reader.address(), DEADLINE).await.expect("connects the other way");
    let mine = bench.expose(1, 70_000);
    let (_, pin) = frame(&bench.arena, 2, 70_000);
    let theirs = bench.pair.reader.expose(pin).expect("there is room to expose");
    let (one, two) =
        tokio::join!(read(&*there, mine.descriptor(), 1, 70_000), read(&*back, theirs.descriptor(), 2, 70_000));
    one.expect("reads from the owner");
    two.expect("reads from the reader");
}
