//! GPUs, opened at run time: copies, checksums, pinned memory, and pools of device memory that processes share.
//!
//! A [`Device`] is used by two kinds of process. An engine's connector copies between the engine's KV memory and frames,
//! ordered after what the engine has given its stream so far ([`Device::fence`]). The daemon fills a pool from host frames
//! and hands descriptors of it to the connectors of the same machine. Addresses are plain numbers: those of device memory
//! mean something to the device only.
//!
//! *Invariants* (pinned for every implementation by [`conformance`])
//! - What a [`Work`] keeps is dropped, and its end is told, once and only when nothing touches its memory any more: after its
//!   last copy has ended, or when none was begun.
//! - A checksum that a work answers is of the bytes in device memory after its copies.
//! - Work of one [`Way`] is carried out in the order in which it was submitted, and none before its fence.
//! - No library, no driver, no GPU, a symbol that an older driver lacks: an error, never a panic.
//!
//! *Bounds*: [`MAX_RUNS`] runs a work, [`MAX_IN_FLIGHT`] works of one way.

pub mod conformance;
pub mod cuda;
mod error;
pub mod fold;
mod frames;
mod open;
mod pace;
mod traits;
mod tune;
pub mod twin;

use std::any::Any;
use std::sync::Arc;

use kvtier_memory::copy::Run;

pub use error::DeviceError;
pub use frames::{OnCopied, PoolFrame, RegisteredExtent, off_device, onto_device};
pub use kvtier_types::DeviceId;
pub use open::{Backend, Found, UnknownBackend, find, open};
pub use pace::Pace;
pub use traits::{Device, OnEnd, PoolMemory, Registered};
pub use tune::{Methods, choose};

/// Most runs of one work: a table of them is a megabyte and a half.
pub const MAX_RUNS: usize = 65_536;
/// Most works of one way that have not ended: enough to keep a copy engine busy, few enough to be waited for.
pub const MAX_IN_FLIGHT: usize = 64;

/// What a device is and can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Its identity, the same in every process that sees it.
    pub id: DeviceId,
    /// Its number in this process.
    pub ordinal: u32,
    /// Devices whose memory it reads: itself, and those of this process's others that it reaches directly.
    pub reaches: Vec<DeviceId>,
    /// Its maker's name for it.
    pub name: String,
    /// Its memory in bytes.
    pub memory_bytes: u64,
    /// The driver's version as 1000 * major + 10 * minor; 0 for the twin.
    pub driver: u32,
    /// Methods of copying it has, the plainest first.
    pub methods: Vec<Method>,
    /// Whether it makes checksums itself; otherwise the host does.
    pub sums: bool,
    /// Why it lacks what others have, for people.
    pub notes: Vec<String>,
}

/// How runs are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Method {
    /// One call of the driver a run.
    Single,
    /// One call of the driver for all runs.
    Batch,
    /// A kernel: for layouts of many small runs.
    Kernel,
}

impl Method {
    /// The name used in logs and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Batch => "batch",
            Self::Kernel => "kernel",
        }
    }
}

/// Between what a work copies. Each has a queue of its own: the engines of a GPU work side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// From device memory to host memory.
    ToHost,
    /// From host memory to device memory.
    FromHost,
    /// Within device memory.
    Within,
}

impl Way {
    /// All of them, in the order of their queues.
    pub const ALL: [Self; 3] = [Self::ToHost, Self::FromHost, Self::Within];

    /// The name used in logs and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ToHost => "to_host",
            Self::FromHost => "from_host",
            Self::Within => "within",
        }
    }
}

/// A stream of the engine: the handle that its framework knows it by, zero for the default one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineStream(pub u64);

/// A point in an engine's stream: everything given to the stream before. Belongs to the device that made it.
#[derive(Debug, Clone)]
pub struct Fence(Arc<dyn Any + Send + Sync>);

impl Fence {
    pub(crate) fn new(state: impl Any + Send + Sync) -> Self {
        Self(Arc::new(state))
    }

    pub(crate) fn get<T: Any + Send + Sync>(&self) -> Result<&T, DeviceError> {
        self.0.downcast_ref().ok_or(DeviceError::Invalid { what: "the fence is another device's" })
    }
}

/// A range of memory, by address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Its first byte.
    pub base: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Span {
    /// Its end; `None` beyond the address space.
    #[must_use]
    pub const fn end(self) -> Option<u64> {
        self.base.checked_add(self.bytes)
    }
}

/// Copies that belong together.
#[derive(Debug)]
pub struct Work {
    /// Between what.
    pub way: Way,
    /// The copies, in no particular order.
    pub runs: Vec<Run>,
    /// How; a method that the device lacks is taken as its plainest.
    pub method: Method,
    /// What must have ended on the engine's stream before.
    pub after: Option<Fence>,
    /// What to make checksums of after the copies: ranges of device memory, those of one frame in their order together.
    pub sums: Vec<Vec<Span>>,
    /// Dropped once nothing touches the memory any more.
    pub keeps: Box<dyn Any + Send>,
}

/// What came of a work.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Done {
    /// CRC-64/NVME of each of [`Work::sums`].
    pub sums: Vec<u64>,
}

/// Checks a work's numbers: what no implementation can carry out.
pub(crate) fn check(work: &Work) -> Result<(), DeviceError> {
    let invalid = |what| Err(DeviceError::Invalid { what });
    if work.runs.len() > MAX_RUNS || work.sums.iter().map(Vec::len).sum::<usize>() > MAX_RUNS {
        return invalid("it has too many runs");
    }
    let bad_end = |at: u64, len: u64| at == 0 || at.checked_add(len).is_none();
    let bad_run =
        |run: &Run| bad_end(run.src.addr() as u64, run.len as u64) || bad_end(run.dst.addr() as u64, run.len as u64);
    if work.runs.iter().any(bad_run) || work.sums.iter().flatten().any(|s| bad_end(s.base, s.bytes)) {
        return invalid("a run is null or ends beyond the address space");
    }
    Ok(())
}
