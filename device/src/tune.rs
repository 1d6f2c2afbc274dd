//! Which method of copying is fastest for a layout on this device: measured once, when an engine registers its memory.
#![expect(unsafe_code, reason = "submits copies within scratch memory of its own")]

use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvtier_memory::AlignedBuf;
use kvtier_memory::copy::Run;

use crate::{Device, DeviceError, Method, PoolMemory, Registered, Span, Way, Work};

/// Bytes of device memory, and of host memory, that a measurement takes for its time.
const SCRATCH_BYTES: u64 = 32 << 20;
/// Most runs of a measurement: shorter ones only make it longer.
const MEASURED_RUNS: u64 = 4096;
/// Longest wait for one copy of the scratch memory: at a hundredth of a bus's speed it takes this.
const PATIENCE: Duration = Duration::from_secs(1);
/// Copies of a method that count; one before them does not.
const ROUNDS: usize = 3;

/// The method for each way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Methods {
    /// By [`Way::ALL`].
    by_way: [Method; 3],
}

impl Methods {
    /// The same for all.
    #[must_use]
    pub const fn all(method: Method) -> Self {
        Self { by_way: [method; 3] }
    }

    /// What needs no measurement: batches where the driver has them.
    #[must_use]
    pub fn plain(device: &dyn Device) -> Self {
        let methods = &device.facts().methods;
        Self::all(if methods.contains(&Method::Batch) { Method::Batch } else { Method::Single })
    }

    /// The one for `way`.
    #[must_use]
    pub fn of(&self, way: Way) -> Method {
        self.by_way[way as usize]
    }
}

/// Measures the device's methods on runs of `run_bytes`, the shortest of a layout's, and answers the fastest for each way. Takes some milliseconds and
/// 64 MiB of scratch memory; where those are not to be had, it answers [`Methods::plain`].
#[must_use]
pub fn choose(device: &dyn Device, run_bytes: u64) -> Methods {
    measure(device, run_bytes).unwrap_or_else(|error| {
        tracing::info!(%error, "methods of copying were not measured");
        Methods::plain(device)
    })
}

/// Host memory that the device reaches, for the time of a measurement.
struct Scratch {
    // Before the memory: what is registered is let go first.
    _pin: Option<Box<dyn Registered>>,
    _host: AlignedBuf,
}

fn measure(device: &dyn Device, run_bytes: u64) -> Result<Methods, DeviceError> {
    let memory = [device.allocate(SCRATCH_BYTES)?, device.allocate(SCRATCH_BYTES)?];
    let mut host = AlignedBuf::zeroed(usize::try_from(SCRATCH_BYTES).expect("it is small"));
    let span = Span { base: host.as_mut_slice().as_mut_ptr().expose_provenance() as u64, bytes: SCRATCH_BYTES };
    let pin = pin(device, span);
    let is_reached = pin.is_some();
    let scratch = Arc::new(Scratch { _pin: pin, _host: host });
    let mut methods = Methods::plain(device);
    for way in Way::ALL {
        let (from, to) = match way {
            Way::ToHost => (memory[0].span(), span),
            Way::FromHost => (span, memory[0].span()),
            Way::Within => (memory[1].span(), memory[0].span()),
        };
        let runs = runs(run_bytes, from, to, way);
        let mut best: Option<(Duration, Method)> = None;
        // What the device does not reach directly only the driver itself can copy.
        let plainest = way != Way::Within && !is_reached;
        for method in device.facts().methods.iter().copied().take(if plainest { 1 } else { usize::MAX }) {
            let took = time(device, (way, method), &runs, &memory, &scratch)?;
            if best.is_none_or(|(least, _)| took < least) {
                best = Some((took, method));
            }
        }
        if let Some((_, method)) = best {
            methods.by_way[way as usize] = method;
        }
    }
    tracing::info!(run_bytes, ?methods, "methods of copying were measured");
    Ok(methods)
}

fn pin(device: &dyn Device, span: Span) -> Option<Box<dyn Registered>> {
    // SAFETY: the memory is the scratch's, which drops this registration before it.
    unsafe { device.register(span, true) }.ok()
}

/// Runs of that length: on the device every other one of its places, on the host one after the other, as frames are.
fn runs(run_bytes: u64, from: Span, to: Span, way: Way) -> Vec<Run> {
    let run = run_bytes.clamp(16, SCRATCH_BYTES / 4);
    let count = (SCRATCH_BYTES / 2 / run).min(MEASURED_RUNS);
    let stride = |is_device: bool| if is_device { 2 * run } else { run };
    let at = |span: Span, is_device: bool, i: u64| usize::try_from(span.base + i * stride(is_device)).expect("64 bits");
    let run_of = |i: u64| Run {
        src: std::ptr::with_exposed_provenance(at(from, way != Way::FromHost, i)),
        dst: std::ptr::with_exposed_provenance_mut(at(to, way != Way::ToHost, i)),
        len: usize::try_from(run).expect("64 bits"),
    };
    (0..count).map(run_of).collect()
}

fn time(
    device: &dyn Device,
    (way, method): (Way, Method),
    runs: &[Run],
    memory: &[Arc<dyn PoolMemory>; 2],
    scratch: &Arc<Scratch>,
) -> Result<Duration, DeviceError> {
    let mut least = Duration::MAX;
    for round in 0..=ROUNDS {
        let keeps = (memory.clone(), Arc::clone(scratch));
        let work = Work { way, runs: runs.to_vec(), method, after: None, sums: Vec::new(), keeps: Box::new(keeps) };
        let (told, end) = mpsc::sync_channel(1);
        let began = Instant::now();
        // SAFETY: every run lies in the device's or the host's scratch memory, which the work keeps.
        unsafe { device.submit(work, Box::new(move |result| drop(told.send(result)))) }?;
        end.recv_timeout(PATIENCE).map_err(|_| DeviceError::Busy)??;
        if round > 0 {
            least = least.min(began.elapsed());
        }
    }
    Ok(least)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::twin::{TwinConfig, TwinDevice};

    #[test]
    fn a_method_that_the_device_has_is_chosen_for_every_way() {
        let twin = TwinDevice::new(TwinConfig::default()).unwrap();
        for run_bytes in [1, 4096, 64 << 10, 1 << 40] {
            let methods = choose(&twin, run_bytes);
            assert!(Way::ALL.into_iter().all(|way| twin.facts().methods.contains(&methods.of(way))));
        }
        assert_eq!(twin.free_bytes().unwrap(), twin.facts().memory_bytes, "scratch memory was given back");
    }

    #[test]
    fn without_room_the_plain_method_is_taken() {
        let twin = TwinDevice::new(TwinConfig { memory_bytes: 1 << 20, ..TwinConfig::default() }).unwrap();
        assert_eq!(choose(&twin, 4096), Methods::all(Method::Batch));
        twin.fail_next(1);
        assert_eq!(choose(&twin, 4096), Methods::all(Method::Batch));
    }
}
