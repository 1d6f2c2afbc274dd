//! The twin keeps the suite's promises, and misbehaves as told.
#![expect(unsafe_code, reason = "submits copies between memory that the tests keep")]

use std::sync::mpsc;
use std::time::Duration;

use kvtier_memory::copy::Run;

use super::*;
use crate::Done;
use crate::conformance::{self, Bench, HeldStream};

const SOON: Duration = Duration::from_secs(20);
const A_WHILE: Duration = Duration::from_millis(50);

struct TwinBench(Arc<TwinDevice>);

impl Bench for TwinBench {
    fn device(&self) -> Arc<dyn Device> {
        Arc::clone(&self.0) as Arc<dyn Device>
    }

    fn held_stream(&self) -> Box<dyn HeldStream> {
        let stream = self.0.stream();
        stream.give(|| ());
        Box::new(stream)
    }
}

impl HeldStream for TwinStream {
    fn handle(&self) -> EngineStream {
        Self::handle(self)
    }

    fn release(&self) {
        self.run();
    }
}

#[test]
fn the_twin_keeps_every_promise_of_a_device() {
    for sums in [true, false] {
        let twin = TwinDevice::new(TwinConfig { sums, ..TwinConfig::default() }).unwrap();
        conformance::run(&TwinBench(Arc::new(twin)));
    }
}

fn copy(
    twin: &TwinDevice,
    from: &TwinMemory,
    to: &TwinMemory,
    sums: bool,
) -> mpsc::Receiver<Result<Done, DeviceError>> {
    let at = |memory: &TwinMemory| usize::try_from(memory.span().base).unwrap();
    let run = Run {
        src: std::ptr::with_exposed_provenance(at(from)),
        dst: std::ptr::with_exposed_provenance_mut(at(to)),
        len: 4096,
    };
    let sums = if sums { vec![vec![Span { base: to.span().base, bytes: 4096 }]] } else { Vec::new() };
    let work =
        Work { way: Way::Within, runs: vec![run], method: Method::Batch, after: None, sums, keeps: Box::new(()) };
    let (told, end) = mpsc::channel();
    // SAFETY: every test waits for the end before it lets the memory go.
    unsafe { twin.submit(work, Box::new(move |result| drop(told.send(result)))) }.unwrap();
    end
}

fn memory() -> TwinMemory {
    TwinMemory { memory: Bytes::create(GRANULARITY).unwrap(), taken: None }
}

#[test]
fn it_fails_flips_stalls_and_is_lost_as_told() {
    let twin = TwinDevice::new(TwinConfig::default()).unwrap();
    let (from, to) = (memory(), memory());
    let sum = |end: mpsc::Receiver<Result<Done, DeviceError>>| end.recv_timeout(SOON).unwrap().map(|done| done.sums[0]);
    let right = sum(copy(&twin, &from, &to, true)).unwrap();
    twin.flip_next(1);
    assert_ne!(sum(copy(&twin, &from, &to, true)), Ok(right));
    assert_eq!(sum(copy(&twin, &from, &to, true)), Ok(right));
    twin.fail_next(1);
    assert!(matches!(sum(copy(&twin, &from, &to, true)), Err(DeviceError::Call { .. })));
    twin.stall();
    let held = copy(&twin, &from, &to, true);
    assert!(held.recv_timeout(A_WHILE).is_err());
    twin.resume();
    assert_eq!(held.recv_timeout(SOON).unwrap().unwrap().sums, [right]);
    twin.stall();
    let held = copy(&twin, &from, &to, false);
    twin.lose();
    assert!(matches!(held.recv_timeout(SOON).unwrap(), Err(DeviceError::Lost { .. })));
    assert!(matches!(twin.free_bytes(), Err(DeviceError::Lost { .. })));
}

#[test]
fn memory_runs_out_and_comes_back() {
    let twin = TwinDevice::new(TwinConfig { memory_bytes: 3 * GRANULARITY, ..TwinConfig::default() }).unwrap();
    let first = twin.allocate(2 * GRANULARITY).unwrap();
    assert_eq!(twin.allocate(2 * GRANULARITY).err(), Some(DeviceError::NoMemory { bytes: 2 * GRANULARITY }));
    drop(first);
    assert!(twin.allocate(2 * GRANULARITY + 1).is_ok(), "what is given is whole units");
}

#[test]
fn dropping_it_ends_what_it_was_given() {
    let twin = TwinDevice::new(TwinConfig::default()).unwrap();
    let (from, to) = (memory(), memory());
    let ends: Vec<_> = (0..8).map(|_| copy(&twin, &from, &to, false)).collect();
    drop(twin);
    assert!(ends.iter().all(|end| end.try_recv().unwrap().is_ok()));
}
