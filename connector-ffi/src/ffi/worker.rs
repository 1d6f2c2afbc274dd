//! C functions of the worker side: registering memory, jobs. Only `kvtier_job_wait` waits.
#![expect(unsafe_code, reason = "C interface: exported symbols and pointer arguments")]

use std::ffi::c_char;
use std::time::Duration;

use kvtier_memory::plan::Region;

use super::args::{array, out, room, text, with_session};
use super::types::{Handle, KVTIER_MISS, KVTIER_OK, KVTIER_PENDING, RegionInfo, Status, TransferInfo};
use crate::error::Error;
use crate::frame::FrameRef;
use crate::jobs::job::{Kind, Transfer};
use crate::jobs::{JobPoll, MAX_TRANSFERS};
use crate::lookup::MAX_REQUEST_ID_BYTES;
use crate::regions::MAX_REGIONS;
use crate::session::Session;

/// Registers the engine's memory, in place of what was registered before. A block of a group is the runs of the group's
/// regions in this order.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `regions` points to `count` structs with their sizes set. The memory they
/// name stays mapped and writable until the session is closed, and while a job names a block, nobody else uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_register_regions(
    session: *mut Handle,
    regions: *const RegionInfo,
    count: u32,
) -> Status {
    let body = |session: &Session| {
        // SAFETY: the caller's promise on `regions`.
        let regions = unsafe { array("regions", regions, count as usize, MAX_REGIONS) }?;
        session.register_regions(&regions.iter().map(region).collect::<Result<Vec<_>, _>>()?)?;
        Ok(KVTIER_OK)
    };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

fn region(wire: &RegionInfo) -> Result<(u32, Region), Error> {
    if wire.size as usize != size_of::<RegionInfo>() {
        return Err(Error::invalid("regions[].size is not this version's"));
    }
    let region = Region {
        base: usize::try_from(wire.base).map_err(|_| Error::invalid("base is no address"))?,
        block_count: wire.block_count,
        block_stride: wire.block_stride,
        run_bytes: wire.run_bytes,
        span: wire.span_bytes,
    };
    Ok((wire.group, region))
}

/// Submits a job that copies frames into the engine's blocks for a request, and returns its number. Transfers that have not
/// begun within `deadline_ms` are lost. `stream` is the engine's stream on its device: the copies come after what it was
/// given before this call, and the caller gives it nothing that uses the blocks before the job is over. Zero is the default
/// stream; without a device it means nothing.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `request_id` is a NUL-terminated string; `transfers` points to `count`
/// structs; `job` has room for one number. Until `kvtier_job_wait` answers `KVTIER_OK`, nobody else uses the blocks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_load_submit(
    session: *mut Handle,
    request_id: *const c_char,
    transfers: *const TransferInfo,
    count: u32,
    deadline_ms: u32,
    stream: u64,
    job: *mut u64,
) -> Status {
    let body = |session: &Session| {
        // SAFETY: the caller's promise on `request_id`.
        let request_id = unsafe { text("request_id", request_id, MAX_REQUEST_ID_BYTES) }?.to_owned();
        // SAFETY: the caller's promise on `transfers` and `job`.
        unsafe { submit(session, Kind::Load { request_id }, (transfers, count), (deadline_ms, stream), job) }
    };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

/// Submits a job that copies the engine's blocks into granted frames, and returns its number. What was copied is sealed in
/// the background; what was not is given up. `stream` as for `kvtier_load_submit`.
///
/// # Safety
/// As for `kvtier_load_submit`; nobody writes the blocks until the job is over.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_save_submit(
    session: *mut Handle,
    transfers: *const TransferInfo,
    count: u32,
    deadline_ms: u32,
    stream: u64,
    job: *mut u64,
) -> Status {
    // SAFETY: the caller's promise on `transfers` and `job`.
    let body =
        |session: &Session| unsafe { submit(session, Kind::Save, (transfers, count), (deadline_ms, stream), job) };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

/// # Safety
/// The pointer in `transfers` points to as many structs as it says; `job` has room for one number.
unsafe fn submit(
    session: &Session,
    kind: Kind,
    (transfers, count): (*const TransferInfo, u32),
    (deadline_ms, stream): (u32, u64),
    job: *mut u64,
) -> Result<Status, Error> {
    // SAFETY: as this function's contract says.
    let out = unsafe { out("job", job) }?;
    // SAFETY: as above.
    let transfers = unsafe { array("transfers", transfers, count as usize, MAX_TRANSFERS) }?;
    let transfers = transfers.iter().map(|t| Transfer { frame: FrameRef::from(&t.frame), block_id: t.block_id });
    let deadline = Duration::from_millis(deadline_ms.into());
    out.write(session.submit_job(kind, transfers.collect(), (deadline, stream))?);
    Ok(KVTIER_OK)
}

/// Waits until a job's last copy has ended or was never begun, at most `timeout_ms`; 0 only looks. `KVTIER_OK` writes one
/// byte a transfer (`KVTIER_TRANSFER_*`) and consumes the job; `KVTIER_MISS` for an unknown job.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `results` has room for `cap` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_job_wait(
    session: *mut Handle,
    job: u64,
    timeout_ms: u32,
    results: *mut u8,
    cap: u32,
) -> Status {
    let body = |session: &Session| {
        // SAFETY: the caller's promise on `results`.
        let room = unsafe { room("results", results, cap as usize, usize::MAX) }?;
        match session.wait_job(job, Duration::from_millis(timeout_ms.into()), room.len())? {
            JobPoll::Unknown => Ok(KVTIER_MISS),
            JobPoll::Pending => Ok(KVTIER_PENDING),
            JobPoll::Over(fates) => {
                room.iter_mut().zip(fates).for_each(|(room, fate)| {
                    room.write(fate.byte());
                });
                Ok(KVTIER_OK)
            }
        }
    };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

/// Begins no further transfer of a job; those not begun are lost. `kvtier_job_wait` still has to follow. `KVTIER_MISS` for
/// an unknown job.
///
/// # Safety
/// `session` came from `kvtier_session_open`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_job_cancel(session: *mut Handle, job: u64) -> Status {
    let body = |session: &Session| Ok(if session.cancel_job(job) { KVTIER_OK } else { KVTIER_MISS });
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}
