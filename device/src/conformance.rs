//! What every [`Device`] promises, as one suite: it runs over the twin everywhere, and over a GPU where there is one.
//!
//! Memory that processes share stands for engine memory here: both are device memory by address.
#![expect(unsafe_code, reason = "submits copies between memory that the suite owns")]

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use kvtier_memory::AlignedBuf;
use kvtier_memory::checksum::checksum;
use kvtier_memory::copy::Run;

use crate::{
    Device, DeviceError, Done, EngineStream, Fence, MAX_IN_FLIGHT, MAX_RUNS, Method, PoolMemory, Registered, Span, Way,
    Work,
};

/// Longest wait for something that ends.
const SOON: Duration = Duration::from_secs(60);
/// How long something that must not happen is waited for.
const A_WHILE: Duration = Duration::from_millis(100);

/// A stream of an engine's that is held up until it is let go.
pub trait HeldStream {
    /// Its handle.
    fn handle(&self) -> EngineStream;
    /// Lets it go on.
    fn release(&self);
}

/// A device under test.
pub trait Bench {
    /// The device.
    fn device(&self) -> Arc<dyn Device>;
    /// A stream with work that does not end before it is let go.
    fn held_stream(&self) -> Box<dyn HeldStream>;
}

/// Runs the whole suite.
///
/// # Panics
/// When a promise is broken: the message says which.
pub fn run(bench: &dyn Bench) {
    let device = &*bench.device();
    facts_are_whole(device);
    bytes_go_there_and_back(device);
    unaligned_runs_arrive(device);
    checksums_are_those_of_device_memory(device);
    ends_are_told_once_after_what_they_kept(device);
    nothing_begins_before_its_fence(bench);
    work_of_one_way_ends_in_order(device);
    too_much_is_refused(bench);
    nonsense_is_refused(device);
    memory_is_shared_and_given_back(device);
    threads_submit_side_by_side(device);
}

/// Host memory, registered or not.
struct Host {
    // Let go before the memory.
    _pin: Option<Box<dyn Registered>>,
    buffer: AlignedBuf,
    base: u64,
}

impl Host {
    fn plain(bytes: &[u8]) -> Self {
        let mut buffer = AlignedBuf::from_slice(bytes);
        let base = buffer.as_mut_slice().as_mut_ptr().expose_provenance() as u64;
        Self { _pin: None, buffer, base }
    }

    fn registered(device: &dyn Device, bytes: &[u8]) -> Self {
        let mut this = Self::plain(bytes);
        // SAFETY: the buffer outlives its registration, which is dropped first.
        let pin = unsafe { device.register(Span { base: this.base, bytes: bytes.len() as u64 }, true) };
        this._pin = Some(pin.expect("host memory can be registered"));
        this
    }

    fn bytes(&self) -> &[u8] {
        self.buffer.as_slice()
    }
}

fn run_of(from: u64, to: u64, len: usize) -> Run {
    let address = |at: u64| usize::try_from(at).expect("64-bit addresses");
    Run {
        src: std::ptr::with_exposed_provenance(address(from)),
        dst: std::ptr::with_exposed_provenance_mut(address(to)),
        len,
    }
}

fn work(way: Way, method: Method, runs: Vec<Run>) -> Work {
    Work { way, runs, method, after: None, sums: Vec::new(), keeps: Box::new(()) }
}

fn begin(device: &dyn Device, work: Work) -> Result<Receiver<Result<Done, DeviceError>>, DeviceError> {
    let (told, end) = mpsc::channel();
    // SAFETY: the suite keeps all memory until it was told the end of every work that uses it.
    unsafe { device.submit(work, Box::new(move |result| drop(told.send(result)))) }?;
    Ok(end)
}

fn finish(device: &dyn Device, work: Work) -> Result<Done, DeviceError> {
    begin(device, work)?.recv_timeout(SOON).expect("a work ends")
}

fn pool(device: &dyn Device, bytes: usize) -> Arc<dyn PoolMemory> {
    device.allocate(bytes as u64).expect("there is device memory")
}

/// Puts bytes into device memory.
fn put(device: &dyn Device, bytes: &[u8], to: u64) {
    let host = Host::registered(device, bytes);
    let copy = work(Way::FromHost, Method::Single, vec![run_of(host.base, to, bytes.len())]);
    finish(device, copy).expect("a copy to the device ends well");
}

/// What lies in device memory.
fn get(device: &dyn Device, from: u64, len: usize) -> Vec<u8> {
    let host = Host::registered(device, &vec![0xaa; len]);
    let copy = work(Way::ToHost, Method::Single, vec![run_of(from, host.base, len)]);
    finish(device, copy).expect("a copy to the host ends well");
    host.bytes().to_vec()
}

/// Bytes that look like any, the same for a seed.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| next()).collect();
    bytes.truncate(len);
    bytes
}

/// Pieces of many lengths, multiples of `unit`, that make up `len`.
fn pieces(len: usize, unit: usize) -> Vec<(usize, usize)> {
    let (mut at, mut next, mut pieces) = (0, unit, Vec::new());
    while at < len {
        let piece = next.min(len - at);
        pieces.push((at, piece));
        at += piece;
        next = (next * 3 / 2).next_multiple_of(unit).min(300_000 / unit * unit);
    }
    pieces
}

fn facts_are_whole(device: &dyn Device) {
    let facts = device.facts();
    assert!(!facts.name.is_empty() && facts.memory_bytes > 0, "{facts:?}");
    assert_eq!(facts.methods.first(), Some(&Method::Single), "the plainest method is always there");
    assert!(device.free_bytes().expect("free memory is told") <= facts.memory_bytes);
}

fn bytes_go_there_and_back(device: &dyn Device) {
    const LEN: usize = 3 << 20;
    let (there, beside) = (pool(device, LEN), pool(device, LEN));
    let (there, beside) = (there.span().base, beside.span().base);
    let bytes = noise(LEN, 7);
    for (method, is_registered) in methods(device) {
        let host = |bytes: &[u8]| if is_registered { Host::registered(device, bytes) } else { Host::plain(bytes) };
        let (from, to) = (host(&bytes), host(&vec![0; LEN]));
        // On the device the pieces lie the other way round.
        let place = |at: usize, len: usize| (LEN - at - len) as u64;
        let run_in = |(at, len): &(usize, usize)| run_of(from.base + *at as u64, there + place(*at, *len), *len);
        let run_out = |(at, len): &(usize, usize)| run_of(beside + place(*at, *len), to.base + *at as u64, *len);
        let pieces = pieces(LEN, 16);
        let steps = [
            work(Way::FromHost, method, pieces.iter().map(run_in).collect()),
            work(Way::Within, method, vec![run_of(there, beside, LEN)]),
            work(Way::ToHost, method, pieces.iter().map(run_out).collect()),
        ];
        for step in steps {
            finish(device, step).expect("a copy ends well");
        }
        assert!(to.bytes() == bytes, "{method:?}, registered: {is_registered}");
    }
}

/// Methods with registered host memory, and those that need none with other memory.
fn methods(device: &dyn Device) -> Vec<(Method, bool)> {
    let all = device.facts().methods.iter().flat_map(|method| [(*method, true), (*method, false)]);
    all.filter(|(method, is_registered)| *is_registered || *method != Method::Kernel).collect()
}

fn unaligned_runs_arrive(device: &dyn Device) {
    const LEN: usize = 64 << 10;
    let there = pool(device, LEN);
    let bytes = noise(LEN, 11);
    for method in device.facts().methods.clone() {
        let (from, to) = (Host::registered(device, &bytes), Host::registered(device, &vec![0; LEN]));
        let pieces = pieces(LEN - 8, 1);
        let run_in =
            |(at, len): &(usize, usize)| run_of(from.base + *at as u64, there.span().base + 3 + *at as u64, *len);
        let run_out =
            |(at, len): &(usize, usize)| run_of(there.span().base + 3 + *at as u64, to.base + *at as u64, *len);
        finish(device, work(Way::FromHost, method, pieces.iter().map(run_in).collect())).expect("it ends well");
        finish(device, work(Way::ToHost, method, pieces.iter().map(run_out).collect())).expect("it ends well");
        assert!(to.bytes()[..LEN - 8] == bytes[..LEN - 8], "{method:?}");
        assert_eq!(to.bytes()[LEN - 8..], [0; 8], "{method:?} wrote beyond its runs");
    }
}

fn checksums_are_those_of_device_memory(device: &dyn Device) {
    if !device.facts().sums {
        return;
    }
    const LEN: usize = 1 << 20;
    let there = pool(device, LEN);
    let at = |offset: usize, len: usize| Span { base: there.span().base + offset as u64, bytes: len as u64 };
    let bytes = noise(LEN, 13);
    // The copy comes first: what is summed is what it brought.
    let host = Host::registered(device, &bytes);
    let lens = [8, 2048, 4096, 65_536, 65_544, 200_000, LEN];
    let sums = lens
        .iter()
        .map(|len| vec![at(0, *len)])
        .chain([vec![at(65_536, 32_768), at(0, 8), at(300_000, 100_000)], Vec::new()]);
    let copy = run_of(host.base, there.span().base, LEN);
    let work = Work { sums: sums.collect(), ..work(Way::FromHost, Method::Batch, vec![copy]) };
    let done = finish(device, work).expect("it ends well");
    let joined = [&bytes[65_536..98_304], &bytes[..8], &bytes[300_000..400_000]].concat();
    let expected = lens.iter().map(|len| checksum(&bytes[..*len])).chain([checksum(&joined), checksum(&[])]);
    assert_eq!(done.sums, expected.collect::<Vec<u64>>());
}

/// Says when it is dropped.
struct Tell(mpsc::Sender<&'static str>);

impl Drop for Tell {
    fn drop(&mut self) {
        let _told = self.0.send("dropped");
    }
}

fn ends_are_told_once_after_what_they_kept(device: &dyn Device) {
    let there = pool(device, 4096);
    let host = Host::registered(device, &noise(4096, 17));
    let (told, events) = mpsc::channel();
    let keeps = Box::new(Tell(told.clone()));
    let copy = Work { keeps, ..work(Way::FromHost, Method::Single, vec![run_of(host.base, there.span().base, 4096)]) };
    let on_end = Box::new(move |result: Result<Done, DeviceError>| {
        result.expect("it ends well");
        let _told = told.send("ended");
    });
    // SAFETY: the memory outlives the two events that are waited for.
    unsafe { device.submit(copy, on_end) }.expect("it is begun");
    let seen: Vec<_> = (0..2).map(|_| events.recv_timeout(SOON).expect("a work ends")).collect();
    assert_eq!(seen, ["dropped", "ended"]);
    assert!(events.recv_timeout(A_WHILE).is_err(), "an end is told once");
    // A work without runs ends too.
    finish(device, work(Way::Within, Method::Batch, Vec::new())).expect("nothing to do is done");
}

fn nothing_begins_before_its_fence(bench: &dyn Bench) {
    let device = &*bench.device();
    let there = pool(device, 1 << 20);
    put(device, &vec![1; 1 << 20], there.span().base);
    let stream = bench.held_stream();
    let fence = device.fence(stream.handle()).expect("a stream can be fenced");
    let host = Host::registered(device, &vec![2; 1 << 20]);
    let copy = work(Way::FromHost, Method::Batch, vec![run_of(host.base, there.span().base, 1 << 20)]);
    let end = begin(device, Work { after: Some(fence), ..copy }).expect("it is begun");
    assert!(end.recv_timeout(A_WHILE).is_err(), "it ended before what it waits for");
    // Another way is not held up.
    assert_eq!(get(device, there.span().base, 8), [1; 8]);
    stream.release();
    end.recv_timeout(SOON).expect("it ends").expect("and well");
    assert_eq!(get(device, there.span().base, 8), [2; 8]);
    // What the default stream was given has ended.
    let fence = device.fence(EngineStream::default()).expect("the default stream can be fenced");
    finish(device, Work { after: Some(fence), ..work(Way::Within, Method::Single, Vec::new()) }).expect("it ends well");
}

fn work_of_one_way_ends_in_order(device: &dyn Device) {
    let there = pool(device, 1 << 20);
    let host = Host::registered(device, &noise(1 << 20, 19));
    let (told, ends) = mpsc::channel();
    for number in 0..20_usize {
        let len = (1 << 20) >> (number % 7);
        let copy = work(Way::FromHost, Method::Batch, vec![run_of(host.base, there.span().base, len)]);
        let told = told.clone();
        // SAFETY: the memory outlives all ends, which are waited for.
        unsafe { device.submit(copy, Box::new(move |_| told.send(number).expect("the ends are waited for"))) }
            .expect("it is begun");
    }
    let order: Vec<usize> = (0..20).map(|_| ends.recv_timeout(SOON).expect("it ends")).collect();
    assert!(order.is_sorted(), "{order:?}");
}

fn too_much_is_refused(bench: &dyn Bench) {
    let device = &*bench.device();
    let stream = bench.held_stream();
    let fence = device.fence(stream.handle()).expect("a stream can be fenced");
    let waits = || Work { after: Some(fence.clone()), ..work(Way::Within, Method::Single, Vec::new()) };
    let ends: Vec<_> = (0..MAX_IN_FLIGHT).map(|_| begin(device, waits()).expect("there is room")).collect();
    assert_eq!(begin(device, waits()).err(), Some(DeviceError::Busy));
    stream.release();
    for end in ends {
        end.recv_timeout(SOON).expect("it ends").expect("and well");
    }
    finish(device, work(Way::Within, Method::Single, Vec::new())).expect("there is room again");
}

fn nonsense_is_refused(device: &dyn Device) {
    let invalid = |work: Work| matches!(begin(device, work), Err(DeviceError::Invalid { .. }));
    assert!(invalid(work(Way::Within, Method::Single, vec![run_of(0, 4096, 8)])), "a null source");
    assert!(invalid(work(Way::Within, Method::Single, vec![run_of(4096, u64::MAX, 8)])), "an end beyond all addresses");
    assert!(invalid(work(Way::Within, Method::Single, vec![run_of(4096, 4096, 0); MAX_RUNS + 1])), "too many runs");
    let foreign = Fence::new("another device's");
    assert!(invalid(Work { after: Some(foreign), ..work(Way::Within, Method::Single, Vec::new()) }), "a foreign fence");
    // SAFETY: nothing is registered of an empty range.
    let empty = unsafe { device.register(Span { base: 4096, bytes: 0 }, true) };
    assert!(empty.is_err(), "an empty range is registered");
    let devnull = std::fs::File::open("/dev/null").expect("there is /dev/null");
    assert!(device.import(devnull.into(), 4096).is_err(), "what is no device memory is imported");
    let all = device.facts().memory_bytes.saturating_mul(4);
    assert!(matches!(device.allocate(all), Err(DeviceError::NoMemory { .. })), "more than all memory is given");
}

fn memory_is_shared_and_given_back(device: &dyn Device) {
    // Many times the driver's own needs, which come and go.
    const BYTES: u64 = 256 << 20;
    let before = device.free_bytes().expect("free memory is told");
    let bytes = noise(1 << 20, 23);
    {
        let memory = device.allocate(BYTES).expect("there is device memory");
        assert!(memory.span().bytes >= BYTES);
        assert!(device.free_bytes().expect("free memory is told") < before);
        put(device, &bytes, memory.span().base);
        let imported = device.import(memory.export().expect("it can be exported"), BYTES).expect("and imported");
        assert_eq!(get(device, imported.span().base, bytes.len()), bytes);
        assert!(imported.export().is_err(), "imported memory is handed on");
        // What was imported stays when its owner lets it go.
        drop(memory);
        assert_eq!(get(device, imported.span().base, bytes.len()), bytes);
    }
    assert!(device.free_bytes().expect("free memory is told") > before - BYTES / 4, "device memory leaks");
}

fn threads_submit_side_by_side(device: &dyn Device) {
    std::thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || {
                let there = pool(device, 256 << 10);
                for round in 0..10 {
                    let bytes = noise(256 << 10, 31 + seed * 100 + round);
                    put(device, &bytes, there.span().base);
                    assert!(get(device, there.span().base, bytes.len()) == bytes, "thread {seed}, round {round}");
                }
            });
        }
    });
}
