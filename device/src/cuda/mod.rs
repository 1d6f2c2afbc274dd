//! NVIDIA GPUs through their driver, opened at run time.
//!
//! *Invariants*: a thread's current context is as it was before when a call here returns; the context is the device's
//! primary one, which the engine's framework uses too; streams are ours and never wait for the host's spinning.
//!
//! The device belongs to a process: after a fork the child opens its own.
#![expect(unsafe_code, reason = "keeps the trait's promises; the driver is called behind other walls")]

mod api;
mod context;
mod copying;
#[cfg(test)]
mod held;
mod kernels;
mod lane;
mod pinned;
mod vmm;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvtier_types::DeviceId;

use self::api::Api;
use self::context::Context;
use self::copying::Copier;
use self::lane::Lane;
use self::pinned::HostPin;
use self::vmm::Vmm;
use crate::{
    Device, DeviceError, DeviceFacts, EngineStream, Fence, Found, Method, OnEnd, PoolMemory, Registered, Span, Way,
    Work, check,
};

/// Looks for GPUs.
///
/// # Errors
/// [`DeviceError::Absent`], [`DeviceError::MissingSymbol`].
pub fn find() -> Result<Found, DeviceError> {
    find_in(api::LIBRARY)
}

fn find_in(library: &str) -> Result<Found, DeviceError> {
    let api = Api::open(library)?;
    let devices = context::count(api)?;
    if devices == 0 {
        return Err(DeviceError::Absent { why: "the CUDA driver shows no GPU to this process".to_owned() });
    }
    Ok(Found { devices, driver: context::driver(api)? })
}

/// A GPU.
pub struct CudaDevice {
    facts: DeviceFacts,
    context: Arc<Context>,
    lanes: [Lane; 3],
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice").field("id", &self.facts.id).field("name", &self.facts.name).finish_non_exhaustive()
    }
}

impl CudaDevice {
    /// Opens a GPU by its number in this process.
    ///
    /// # Errors
    /// As [`find`]; [`DeviceError::Call`], [`DeviceError::NoMemory`].
    pub fn open(ordinal: u32) -> Result<Self, DeviceError> {
        Self::open_in(api::LIBRARY, ordinal)
    }

    fn open_in(library: &str, ordinal: u32) -> Result<Self, DeviceError> {
        let found = find_in(library)?;
        if ordinal >= found.devices {
            return Err(DeviceError::Absent {
                why: format!("there is no GPU {ordinal}: this process sees {}", found.devices),
            });
        }
        let context = Arc::new(Context::open(Api::open(library)?, ordinal)?);
        let copier = Arc::new(Copier::new(&context));
        let lane = |way| Lane::start(way, &context, &copier);
        let lanes = [lane(Way::ToHost)?, lane(Way::FromHost)?, lane(Way::Within)?];
        let id = DeviceId::new(context.uuid()?);
        let others = (0..found.devices).filter(|other| *other != ordinal);
        let reached = others.filter_map(|other| context.reaches(other)).map(DeviceId::new);
        let facts = DeviceFacts {
            id,
            ordinal,
            reaches: std::iter::once(id).chain(reached).collect(),
            name: context.name()?,
            memory_bytes: context.total_bytes()?,
            driver: found.driver,
            methods: copier.methods(),
            sums: copier.sums(),
            notes: copier.notes().to_vec(),
        };
        Ok(Self { facts, context, lanes })
    }
}

impl Device for CudaDevice {
    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    fn free_bytes(&self) -> Result<u64, DeviceError> {
        self.context.free_bytes()
    }

    unsafe fn register(&self, span: Span, writable: bool) -> Result<Box<dyn Registered>, DeviceError> {
        // SAFETY: the caller's promise is the one that is asked for.
        let pin = unsafe { HostPin::new(&self.context, span, writable) }?;
        Ok(Box::new(pin))
    }

    fn fence(&self, stream: EngineStream) -> Result<Fence, DeviceError> {
        Ok(Fence::new(self.context.fence(stream)?))
    }

    unsafe fn submit(&self, work: Work, on_end: OnEnd) -> Result<(), DeviceError> {
        check(&work)?;
        if !work.sums.is_empty() && !self.facts.sums {
            return Err(DeviceError::Unsupported { what: "making checksums on the device" });
        }
        let at = Way::ALL.iter().position(|way| *way == work.way).expect("every way has a lane");
        self.lanes[at].push(work, on_end)
    }

    fn allocate(&self, bytes: u64) -> Result<Arc<dyn PoolMemory>, DeviceError> {
        Ok(Arc::new(Vmm::allocate(&self.context, bytes)?))
    }

    fn import(&self, memory: OwnedFd, bytes: u64) -> Result<Arc<dyn PoolMemory>, DeviceError> {
        Ok(Arc::new(Vmm::import(&self.context, memory, bytes)?))
    }
}

/// What a plain copy is called where a device has no better method.
const PLAINEST: Method = Method::Single;

#[cfg(test)]
mod tests;
