//! C functions of the scheduler side: lookups, releases, reservations. None of them waits.
#![expect(unsafe_code, reason = "C interface: exported symbols and pointer arguments")]

use std::ffi::c_char;
use std::mem::MaybeUninit;
use std::time::Duration;

use super::args::{array, hashes, hints, out, room, salt, sized, text, with_session, write_whole};
use super::types::{
    Frame, Handle, HitInfo, KVTIER_MISS, KVTIER_OK, KVTIER_PENDING, LookupRequest, ReserveRequest, Status,
};
use crate::error::Error;
use crate::frame::FrameRef;
use crate::hints::{Hints, OutcomesPoll};
use crate::lookup::answer::Hit;
use crate::lookup::table::Settlement;
use crate::lookup::{FramesPoll, HitPoll, MAX_BLOCK_SHARDS, MAX_REQUEST_ID_BYTES, Query};
use crate::reserve::Reserve;
use crate::reserve::table::TicketPoll;
use crate::session::Session;

/// Most hashes of a request: 16 million tokens in blocks of 16.
const MAX_HASHES: usize = 1 << 20;

/// Submits a lookup of a request's prefix, and returns. `kvtier_release` must follow, once, whatever comes of it.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `request` and what it points to are as its fields say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_lookup_submit(session: *mut Handle, request: *const LookupRequest) -> Status {
    let body = |session: &Session| {
        // SAFETY: the caller's promise on `request`.
        let wire = unsafe { sized("request", request) }?;
        // SAFETY: the caller's promise on the struct's pointers.
        let request_id = unsafe { text("request_id", wire.request_id, MAX_REQUEST_ID_BYTES) }?.to_owned();
        // SAFETY: as above.
        let hashes = unsafe { hashes(wire.hashes, wire.hash_count, wire.hash_len, MAX_HASHES) }?;
        // SAFETY: as above.
        let cache_salt = unsafe { salt(wire.cache_salt) }?;
        // SAFETY: as above.
        let hints = unsafe { hints(wire.hints, wire.hints_len) }?;
        let deadline = Duration::from_millis(wire.deadline_ms.into());
        let local_tokens = wire.local_tokens;
        session.submit_lookup(Query { request_id, hashes, local_tokens, cache_salt, hints, deadline })?;
        Ok(KVTIER_OK)
    };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

/// The usable prefix of a lookup, for an engine that has computed `computed_tokens` itself and wants at most `max_tokens`.
/// `KVTIER_PENDING` until it is answered or its deadline has passed, `KVTIER_MISS` for an unknown request. Local state only.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `request_id` is a NUL-terminated string; `hit` points to a struct with its
/// size set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_lookup_poll(
    session: *mut Handle,
    request_id: *const c_char,
    computed_tokens: u32,
    max_tokens: u32,
    hit: *mut HitInfo,
) -> Status {
    let body = |session: &Session| {
        // SAFETY: the caller's promise on `hit`.
        let HitInfo { size, .. } = unsafe { sized("hit", hit.cast_const()) }?;
        // SAFETY: as above.
        let out = unsafe { out("hit", hit) }?;
        // SAFETY: the caller's promise on `request_id`.
        let request_id = unsafe { text("request_id", request_id, MAX_REQUEST_ID_BYTES) }?;
        let (status, hit) = match session.poll_lookup(request_id, computed_tokens, max_tokens) {
            HitPoll::Unknown => (KVTIER_MISS, Hit::default()),
            HitPoll::Pending => (KVTIER_PENDING, Hit::default()),
            HitPoll::Ready(hit) => (KVTIER_OK, hit),
        };
        out.write(HitInfo {
            size,
            tokens: hit.tokens,
            host_tokens: hit.host_tokens,
            disk_tokens: hit.disk_tokens,
            object_tokens: hit.object_tokens,
            peer_tokens: hit.peer_tokens,
            device_tokens: hit.device_tokens,
        });
        Ok(status)
    };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

/// Frames of an answered lookup for blocks `first_block` to `first_block + count - 1` of a group, for one shard. A block
/// that was not found has an all-zero key.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `request_id` is a NUL-terminated string; `frames` has room for `count`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_lookup_frames(
    session: *mut Handle,
    request_id: *const c_char,
    group: u32,
    shard: u32,
    first_block: u32,
    count: u32,
    frames: *mut Frame,
) -> Status {
    let body = |session: &Session| {
        // SAFETY: the caller's promise on `request_id`.
        let request_id = unsafe { text("request_id", request_id, MAX_REQUEST_ID_BYTES) }?;
        // SAFETY: the caller's promise on `frames`.
        let room = unsafe { room("frames", frames, count as usize, MAX_BLOCK_SHARDS) }?;
        let end = first_block.checked_add(count).ok_or_else(|| Error::invalid("first_block + count overflows"))?;
        match session.lookup_frames(request_id, (group, shard), first_block..end) {
            FramesPoll::Unknown => Ok(KVTIER_MISS),
            FramesPoll::Pending => Ok(KVTIER_PENDING),
            FramesPoll::Ready(found) => {
                write_frames(room, &found);
                Ok(KVTIER_OK)
            }
        }
    };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

/// Ends a request: its lease is released and its tokens settled, in the background. Once for every submitted lookup.
/// `KVTIER_MISS` for an unknown request.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `request_id` is a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_release(
    session: *mut Handle,
    request_id: *const c_char,
    local_tokens: u32,
    claimed_tokens: u32,
    lost_tokens: u32,
) -> Status {
    let body = |session: &Session| {
        // SAFETY: the caller's promise on `request_id`.
        let request_id = unsafe { text("request_id", request_id, MAX_REQUEST_ID_BYTES) }?;
        let known = session.release(request_id, Settlement { local_tokens, claimed_tokens, lost_tokens });
        Ok(if known { KVTIER_OK } else { KVTIER_MISS })
    };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

/// Hands on what a request's client said, once a request, and returns: its actions are carried out in the background, and
/// `kvtier_hints_outcomes` tells what became of them. Lookups and reservations carry the same hints for their blocks.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `request_id` is a NUL-terminated string, `cache_salt` one or null; `hints`
/// points to `hints_len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_hints_submit(
    session: *mut Handle,
    request_id: *const c_char,
    cache_salt: *const c_char,
    hints_json: *const u8,
    hints_len: u32,
) -> Status {
    let body = |session: &Session| {
        // SAFETY: the caller's promise on `request_id`.
        let request_id = unsafe { text("request_id", request_id, MAX_REQUEST_ID_BYTES) }?.to_owned();
        // SAFETY: the caller's promise on `cache_salt`.
        let cache_salt = unsafe { salt(cache_salt) }?;
        // SAFETY: the caller's promise on `hints_json`.
        let client_hints = unsafe { hints(hints_json, hints_len) }?;
        session.submit_hints(Hints { request_id, cache_salt, client_hints })?;
        Ok(KVTIER_OK)
    };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

/// What became of a request's hints, as a JSON list of `{"action_id", "action_type", "outcome", "reason"}`. `KVTIER_OK`
/// consumes the answer, which takes at most 61,441 bytes; `KVTIER_PENDING` until the daemon gave it; `KVTIER_MISS` when none
/// will come. Local state only.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `request_id` is a NUL-terminated string; `buffer` has room for `capacity`
/// bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_hints_outcomes(
    session: *mut Handle,
    request_id: *const c_char,
    buffer: *mut c_char,
    capacity: usize,
) -> Status {
    let body = |session: &Session| {
        // SAFETY: the caller's promise on `request_id`.
        let request_id = unsafe { text("request_id", request_id, MAX_REQUEST_ID_BYTES) }?;
        match session.poll_hints(request_id) {
            OutcomesPoll::Unknown => Ok(KVTIER_MISS),
            OutcomesPoll::Pending => Ok(KVTIER_PENDING),
            OutcomesPoll::Ready(json) => {
                // SAFETY: the caller's promise on `buffer`.
                let status = unsafe { write_whole(&json, buffer, capacity) }?;
                session.forget_hints(request_id);
                Ok(status)
            }
        }
    };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

/// Submits a wish for frames, for all shards of consecutive blocks of a group, and returns its ticket.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `request` and what it points to are as its fields say; `ticket` has room for
/// one number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_reserve_submit(
    session: *mut Handle,
    request: *const ReserveRequest,
    ticket: *mut u64,
) -> Status {
    let body = |session: &Session| {
        // SAFETY: the caller's promise on `ticket`.
        let ticket = unsafe { out("ticket", ticket) }?;
        // SAFETY: the caller's promise on `request`.
        let wire = unsafe { sized("request", request) }?;
        // SAFETY: the caller's promise on the struct's pointers.
        let blocks = unsafe { hashes(wire.hashes, wire.count, wire.hash_len, MAX_BLOCK_SHARDS) }?;
        let parent = if wire.parent_hash.is_null() {
            None
        } else {
            // SAFETY: as above: one hash.
            unsafe { hashes(wire.parent_hash, 1, wire.hash_len, 1) }?.pop()
        };
        // SAFETY: as above.
        let cache_salt = unsafe { salt(wire.cache_salt) }?;
        // SAFETY: as above.
        let hints = unsafe { hints(wire.hints, wire.hints_len) }?;
        let (group, first_block) = (wire.group, wire.first_block);
        let number =
            session.submit_reserve(Reserve { group, first_block, hashes: blocks, parent, cache_salt, hints })?;
        ticket.write(number);
        Ok(KVTIER_OK)
    };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

/// The answer to a reservation: for each block a state (`KVTIER_BLOCK_*`), and `frames` as `[block][shard]`, zeroed where
/// not granted. `KVTIER_OK` consumes the ticket; `KVTIER_MISS` means busy.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `states` has room for as many bytes as blocks were asked for, `frames` for
/// `frame_cap` frames.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_reserve_poll(
    session: *mut Handle,
    ticket: u64,
    states: *mut u8,
    frames: *mut Frame,
    frame_cap: u32,
) -> Status {
    let body = |session: &Session| {
        // SAFETY: the caller's promise on `frames`.
        let room_frames = unsafe { room("frames", frames, frame_cap as usize, usize::MAX) }?;
        if states.is_null() {
            return Err(Error::invalid("states is null"));
        }
        match session.poll_reserve(ticket, room_frames.len())? {
            TicketPoll::Unknown => Ok(KVTIER_MISS),
            TicketPoll::Pending => Ok(KVTIER_PENDING),
            TicketPoll::Ready(grant) => {
                // SAFETY: the caller's promise on `states`: one byte a block of the wish.
                let room_states = unsafe { room("states", states, grant.states.len(), MAX_BLOCK_SHARDS) }?;
                room_states.iter_mut().zip(grant.states).for_each(|(room, state)| {
                    room.write(state);
                });
                write_frames(room_frames, &grant.frames);
                Ok(KVTIER_OK)
            }
        }
    };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

/// Gives granted frames up; entries with an all-zero key are skipped.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `frames` points to `count` frames.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_reserve_abandon(session: *mut Handle, frames: *const Frame, count: u32) -> Status {
    let body = |session: &Session| {
        // SAFETY: the caller's promise on `frames`.
        let frames = unsafe { array("frames", frames, count as usize, MAX_BLOCK_SHARDS) }?;
        let given: Vec<_> = frames.iter().filter(|frame| frame.key != [0; 32]).map(FrameRef::from).collect();
        session.abandon(&given);
        Ok(KVTIER_OK)
    };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

fn write_frames(room: &mut [MaybeUninit<Frame>], frames: &[Option<FrameRef>]) {
    for (room, frame) in room.iter_mut().zip(frames) {
        room.write(Frame::from(*frame));
    }
}
