//! Abuse of the C interface: whatever is passed, short of dangling pointers, is answered with a status.
#![expect(unsafe_code, reason = "calls the C interface")]

use std::ffi::{CStr, CString, c_char};
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::time::{Duration, Instant};

use serde_json::json;

use super::args::guarded;
use super::scheduler::{
    kvtier_hints_outcomes, kvtier_hints_submit, kvtier_lookup_frames, kvtier_lookup_poll, kvtier_lookup_submit,
    kvtier_release, kvtier_reserve_abandon, kvtier_reserve_poll, kvtier_reserve_submit,
};
use super::session::{
    kvtier_abi_version, kvtier_counters, kvtier_session_close, kvtier_session_open, kvtier_session_state,
    kvtier_switch_namespace, kvtier_weights_digest,
};
use super::types::{
    Frame, Handle, HitInfo, KVTIER_ABI_VERSION, KVTIER_BUFFER_TOO_SMALL, KVTIER_CLOSED, KVTIER_FORKED,
    KVTIER_INVALID_ARGUMENT, KVTIER_IO, KVTIER_LIMIT, KVTIER_MISS, KVTIER_OK, KVTIER_PANIC, KVTIER_REFUSED,
    KVTIER_STATE_ABSENT, LookupRequest, RegionInfo, ReserveRequest, TransferInfo,
};
use super::worker::{
    kvtier_job_cancel, kvtier_job_wait, kvtier_load_submit, kvtier_register_regions, kvtier_save_submit,
};
use crate::error::Error;
use crate::spec::tests::{sample, sample_with};

const BAD: i32 = KVTIER_INVALID_ARGUMENT;

/// Calls a C function; in one place, because every call of this file has the same excuse.
macro_rules! c {
    ($call:expr) => {{
        // SAFETY: pointers are null, misaligned, or point to what the function's contract says.
        unsafe { $call }
    }};
}

struct Open(*mut Handle);

impl Open {
    fn new() -> Self {
        let spec = CString::new(sample().to_string()).unwrap();
        let mut session = null_mut();
        assert_eq!(c!(kvtier_session_open(spec.as_ptr(), &raw mut session, null_mut(), 0)), KVTIER_OK);
        Self(session)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        c!(kvtier_session_close(self.0, 100));
    }
}

fn hit() -> HitInfo {
    HitInfo { size: 28, tokens: 9, host_tokens: 9, disk_tokens: 9, object_tokens: 9, peer_tokens: 9, device_tokens: 9 }
}

fn lookup(hashes: &[u8], count: u32) -> LookupRequest {
    LookupRequest {
        size: 56,
        hash_len: 32,
        request_id: c"r".as_ptr(),
        hashes: hashes.as_ptr(),
        hash_count: count,
        local_tokens: 0,
        cache_salt: null(),
        hints: null(),
        hints_len: 0,
        deadline_ms: 1000,
    }
}

fn reserve(hashes: &[u8], count: u32) -> ReserveRequest {
    ReserveRequest {
        size: 56,
        hash_len: 32,
        group: 0,
        first_block: 0,
        hashes: hashes.as_ptr(),
        count,
        hints_len: 0,
        parent_hash: null(),
        cache_salt: null(),
        hints: null(),
    }
}

#[test]
fn statuses_are_those_of_the_header() {
    let io = Error::Io { what: String::new(), reason: String::new() };
    let cases = [
        (Error::invalid(""), KVTIER_INVALID_ARGUMENT),
        (Error::Forked, KVTIER_FORKED),
        (Error::Closed, KVTIER_CLOSED),
        (Error::Panicked, KVTIER_PANIC),
        (Error::Refused(String::new()), KVTIER_REFUSED),
        (Error::Limit(""), KVTIER_LIMIT),
        (Error::BufferTooSmall { needed: 1 }, KVTIER_BUFFER_TOO_SMALL),
        (io, KVTIER_IO),
    ];
    for (error, status) in cases {
        assert_eq!(error.status(), status, "{error:?}");
    }
    assert_eq!(kvtier_abi_version(), KVTIER_ABI_VERSION);
}

#[test]
fn a_panic_becomes_a_status() {
    assert_eq!(guarded(|| panic!("expected by the test")), KVTIER_PANIC);
}

#[test]
fn a_bad_spec_is_refused_with_a_message() {
    let mut session: *mut Handle = std::ptr::dangling_mut();
    let mut message = [1 as c_char; 24];
    let spec = CString::new(sample_with("/role", json!("router"))).unwrap();
    let status = c!(kvtier_session_open(spec.as_ptr(), &raw mut session, message.as_mut_ptr(), message.len()));
    assert_eq!(status, BAD);
    assert!(session.is_null());
    let message = c!(CStr::from_ptr(message.as_ptr())).to_str().unwrap();
    assert!(message.starts_with("invalid argument: spec"), "{message:?}");
    let not_utf8 = c"\xff\xfe";
    for (spec, out) in [
        (null(), &raw mut session),
        (not_utf8.as_ptr(), &raw mut session),
        (c"".as_ptr(), &raw mut session),
        (spec.as_ptr(), null_mut()),
    ] {
        assert_eq!(c!(kvtier_session_open(spec, out, null_mut(), 0)), BAD);
    }
}

#[test]
fn every_call_survives_a_null_session() {
    let mut number = 0_u64;
    let mut state = 0;
    let none: *mut Handle = null_mut();
    let statuses = [
        c!(kvtier_session_state(none, &raw mut state, null_mut(), 0)),
        c!(kvtier_switch_namespace(none, c"r".as_ptr())),
        c!(kvtier_counters(none, null_mut(), 0)),
        c!(kvtier_lookup_submit(none, &lookup(&[0; 32], 1))),
        c!(kvtier_lookup_poll(none, c"r".as_ptr(), 0, 0, &mut hit())),
        c!(kvtier_lookup_frames(none, c"r".as_ptr(), 0, 0, 0, 0, null_mut())),
        c!(kvtier_release(none, c"r".as_ptr(), 0, 0, 0)),
        c!(kvtier_reserve_submit(none, &reserve(&[0; 32], 1), &raw mut number)),
        c!(kvtier_reserve_poll(none, 0, null_mut(), null_mut(), 0)),
        c!(kvtier_reserve_abandon(none, null(), 0)),
        c!(kvtier_register_regions(none, null(), 0)),
        c!(kvtier_load_submit(none, c"r".as_ptr(), null(), 0, 0, 0, &raw mut number)),
        c!(kvtier_save_submit(none, null(), 0, 0, 0, &raw mut number)),
        c!(kvtier_job_wait(none, 0, 0, null_mut(), 0)),
        c!(kvtier_job_cancel(none, 0)),
    ];
    assert_eq!(statuses, [BAD; 15]);
    c!(kvtier_session_close(none, 0));
}

#[test]
fn bad_lookups_are_refused() {
    let open = Open::new();
    let long = CString::new("x".repeat(2000)).unwrap();
    let hashes = [0; 64];
    type Change = fn(&mut LookupRequest);
    let cases: [(&str, Change); 8] = [
        ("size", |r| r.size = 55),
        ("hash_len 15", |r| r.hash_len = 15),
        ("hash_len huge", |r| r.hash_len = u32::MAX),
        ("count huge", |r| r.hash_count = u32::MAX),
        ("hashes null", |r| r.hashes = null()),
        ("request_id null", |r| r.request_id = null()),
        ("request_id not UTF-8", |r| r.request_id = c"\xc3\x28".as_ptr()),
        ("salt not UTF-8", |r| r.cache_salt = c"\xff".as_ptr()),
    ];
    for (what, change) in cases {
        let mut request = lookup(&hashes, 2);
        change(&mut request);
        assert_eq!(c!(kvtier_lookup_submit(open.0, &raw const request)), BAD, "{what}");
    }
    let hinted = LookupRequest { hints: hashes.as_ptr(), hints_len: 65_537, ..lookup(&hashes, 2) };
    assert_eq!(c!(kvtier_lookup_submit(open.0, &raw const hinted)), BAD);
    let absent = LookupRequest { hints: null(), hints_len: 1, ..lookup(&hashes, 2) };
    assert_eq!(c!(kvtier_lookup_submit(open.0, &raw const absent)), BAD);
    let named = LookupRequest { request_id: long.as_ptr(), ..lookup(&hashes, 2) };
    assert_eq!(c!(kvtier_lookup_submit(open.0, &raw const named)), BAD);
    assert_eq!(c!(kvtier_lookup_submit(open.0, null())), BAD);
    let misaligned = (&raw const hinted).wrapping_byte_add(1);
    assert_eq!(c!(kvtier_lookup_submit(open.0, misaligned)), BAD);
    assert_eq!(c!(kvtier_lookup_poll(open.0, c"r".as_ptr(), 0, 0, null_mut())), BAD);
    assert_eq!(c!(kvtier_lookup_poll(open.0, c"r".as_ptr(), 0, 0, &mut HitInfo { size: 27, ..hit() })), BAD);
    assert_eq!(c!(kvtier_lookup_frames(open.0, c"r".as_ptr(), 0, 0, u32::MAX, 2, null_mut())), BAD);
    assert_eq!(c!(kvtier_lookup_frames(open.0, c"r".as_ptr(), 0, 0, 0, u32::MAX, null_mut())), BAD);
}

#[test]
fn hints_are_bounded_and_without_a_daemon_nothing_becomes_of_them() {
    let open = Open::new();
    let json = br#"{"v": 1, "session_id": "s"}"#;
    let submit = |id: *const c_char, at: *const u8, len: u32| c!(kvtier_hints_submit(open.0, id, null(), at, len));
    let len = u32::try_from(json.len()).unwrap();
    for (id, at, len) in [
        (null(), json.as_ptr(), len),
        (c"r".as_ptr(), null(), len),
        (c"r".as_ptr(), json.as_ptr(), 0),
        (c"r".as_ptr(), json.as_ptr(), 65_537),
    ] {
        assert_eq!(submit(id, at, len), BAD);
    }
    assert_eq!(submit(c"r".as_ptr(), json.as_ptr(), len), KVTIER_OK);
    let mut text = [0 as c_char; 64];
    assert_eq!(c!(kvtier_hints_outcomes(open.0, c"r".as_ptr(), text.as_mut_ptr(), text.len())), KVTIER_MISS);
    assert_eq!(c!(kvtier_hints_outcomes(open.0, null(), text.as_mut_ptr(), text.len())), BAD);
}

#[test]
fn without_a_daemon_a_lookup_is_zero_at_once_and_released_once() {
    let open = Open::new();
    let hashes = [7; 96];
    let mut answer = hit();
    assert_eq!(c!(kvtier_lookup_poll(open.0, c"r".as_ptr(), 0, 1000, &raw mut answer)), KVTIER_MISS);
    assert_eq!(c!(kvtier_lookup_submit(open.0, &lookup(&hashes, 3))), KVTIER_OK);
    assert_eq!(c!(kvtier_lookup_poll(open.0, c"r".as_ptr(), 0, 1000, &raw mut answer)), KVTIER_OK);
    assert_eq!(
        answer,
        HitInfo {
            size: 28,
            tokens: 0,
            host_tokens: 0,
            disk_tokens: 0,
            object_tokens: 0,
            peer_tokens: 0,
            device_tokens: 0
        }
    );
    let mut frames = [Frame { key: [1; 32], ..Frame::NONE }; 3];
    assert_eq!(c!(kvtier_lookup_frames(open.0, c"r".as_ptr(), 0, 0, 0, 3, frames.as_mut_ptr())), KVTIER_OK);
    assert_eq!(frames, [Frame::NONE; 3]);
    assert_eq!(c!(kvtier_release(open.0, c"r".as_ptr(), 0, 0, 0)), KVTIER_OK);
    assert_eq!(c!(kvtier_release(open.0, c"r".as_ptr(), 0, 0, 0)), KVTIER_MISS);
}

#[test]
fn lookups_are_bounded() {
    let open = Open::new();
    let submit = |id: u32| {
        let id = CString::new(id.to_string()).unwrap();
        let request = LookupRequest { request_id: id.as_ptr(), ..lookup(&[0; 32], 1) };
        c!(kvtier_lookup_submit(open.0, &raw const request))
    };
    assert!((0..8).all(|id| submit(id) == KVTIER_OK));
    assert_eq!(submit(8), KVTIER_LIMIT);
    assert_eq!(submit(7), KVTIER_OK, "a replacement");
}

#[test]
fn without_a_daemon_a_reservation_is_busy() {
    let open = Open::new();
    let (mut ticket, mut states, mut frames) = (0, [9_u8; 2], [Frame::NONE; 2]);
    assert_eq!(c!(kvtier_reserve_submit(open.0, &reserve(&[0; 64], 2), &raw mut ticket)), KVTIER_OK);
    let poll = |ticket| c!(kvtier_reserve_poll(open.0, ticket, states.as_mut_ptr(), frames.as_mut_ptr(), 2));
    let mut poll = poll;
    assert_eq!(poll(ticket), KVTIER_MISS);
    assert_eq!(poll(u64::MAX), KVTIER_MISS);
    assert_eq!(c!(kvtier_reserve_poll(open.0, ticket, null_mut(), null_mut(), 0)), BAD);
    assert_eq!(c!(kvtier_reserve_poll(open.0, ticket, null_mut(), null_mut(), u32::MAX)), BAD);
    assert_eq!(c!(kvtier_reserve_submit(open.0, &reserve(&[0; 64], 2), null_mut())), BAD);
    let empty = reserve(&[0; 64], 0);
    assert_eq!(c!(kvtier_reserve_submit(open.0, &raw const empty, &raw mut ticket)), BAD);
    let unknown_group = ReserveRequest { group: 9, ..reserve(&[0; 64], 2) };
    assert_eq!(c!(kvtier_reserve_submit(open.0, &raw const unknown_group, &raw mut ticket)), BAD);
    assert_eq!(c!(kvtier_reserve_abandon(open.0, frames.as_ptr(), 2)), KVTIER_OK);
    assert_eq!(c!(kvtier_reserve_abandon(open.0, null(), 2)), BAD);
    assert_eq!(c!(kvtier_reserve_abandon(open.0, frames.as_ptr(), u32::MAX)), BAD);
}

#[test]
fn bad_regions_and_jobs_are_refused() {
    let open = Open::new();
    let good = RegionInfo {
        size: 48,
        group: 0,
        base: 4096,
        span_bytes: 8192 * 4,
        block_stride: 8192,
        run_bytes: 8192,
        block_count: 4,
    };
    let register = |region: RegionInfo| c!(kvtier_register_regions(open.0, &raw const region, 1));
    assert_eq!(register(good), KVTIER_OK);
    for bad in [
        RegionInfo { size: 47, ..good },
        RegionInfo { group: 1, ..good },
        RegionInfo { base: 0, ..good },
        RegionInfo { base: u64::MAX - 10, ..good },
        RegionInfo { run_bytes: 4096, ..good },
        RegionInfo { block_count: u64::MAX, ..good },
        RegionInfo { block_stride: u64::MAX, ..good },
    ] {
        assert_eq!(register(bad), BAD, "{bad:?}");
    }
    assert_eq!(c!(kvtier_register_regions(open.0, null(), 1)), BAD);
    assert_eq!(c!(kvtier_register_regions(open.0, &raw const good, u32::MAX)), BAD);
    let frame = Frame { key: [1; 32], bytes: 8192, ..Frame::NONE };
    let transfer = TransferInfo { frame, block_id: 3, reserved: 0 };
    let mut job = 0;
    let beyond = TransferInfo { block_id: 4, ..transfer };
    assert_eq!(c!(kvtier_save_submit(open.0, &raw const beyond, 1, 1000, 0, &raw mut job)), BAD);
    assert_eq!(c!(kvtier_save_submit(open.0, &raw const transfer, u32::MAX, 1000, 0, &raw mut job)), BAD);
    assert_eq!(c!(kvtier_save_submit(open.0, null(), 1, 1000, 0, &raw mut job)), BAD);
    assert_eq!(c!(kvtier_load_submit(open.0, null(), &raw const transfer, 1, 1000, 0, &raw mut job)), BAD);
    assert_eq!(c!(kvtier_load_submit(open.0, c"r".as_ptr(), &raw const transfer, 1, 1000, 0, &raw mut job)), KVTIER_OK);
    let mut results = [9_u8; 1];
    assert_eq!(c!(kvtier_job_wait(open.0, job, 0, results.as_mut_ptr(), 0)), KVTIER_BUFFER_TOO_SMALL);
    assert_eq!(c!(kvtier_job_wait(open.0, job, 0, results.as_mut_ptr(), 1)), KVTIER_OK, "no daemon: over at once");
    assert_eq!(results, [3]);
    assert_eq!(c!(kvtier_job_wait(open.0, job, 0, results.as_mut_ptr(), 1)), KVTIER_MISS);
    assert_eq!(c!(kvtier_job_cancel(open.0, job)), KVTIER_MISS);
}

#[test]
fn texts_are_cut_or_refused_when_their_buffer_is_short() {
    let open = Open::new();
    let mut state = -1;
    let mut buffer = [MaybeUninit::<c_char>::uninit(); 4096];
    let text = buffer.as_mut_ptr().cast::<c_char>();
    assert_eq!(c!(kvtier_session_state(open.0, &raw mut state, text, 4)), KVTIER_OK);
    assert_eq!(state, KVTIER_STATE_ABSENT);
    assert!(c!(CStr::from_ptr(text)).to_bytes().len() <= 3);
    assert_eq!(c!(kvtier_session_state(open.0, null_mut(), text, 4)), BAD);
    assert_eq!(c!(kvtier_counters(open.0, text, 8)), KVTIER_BUFFER_TOO_SMALL);
    assert_eq!(c!(kvtier_counters(open.0, null_mut(), 0)), BAD);
    assert_eq!(c!(kvtier_counters(open.0, text, 4096)), KVTIER_OK);
    let json: serde_json::Value = serde_json::from_slice(c!(CStr::from_ptr(text)).to_bytes()).unwrap();
    assert_eq!(json["lookups"], 0);
    assert_eq!(c!(kvtier_weights_digest(c"/nonexistent".as_ptr(), text, 4096)), KVTIER_IO);
    assert_eq!(c!(kvtier_weights_digest(null(), text, 4096)), BAD);
}

#[test]
fn a_closed_session_says_so_and_closing_is_quick() {
    let open = Open::new();
    let start = Instant::now();
    c!(kvtier_session_close(open.0, 10_000));
    assert!(start.elapsed() < Duration::from_secs(5), "nothing to wait for: {:?}", start.elapsed());
    assert_eq!(c!(kvtier_switch_namespace(open.0, c"r".as_ptr())), KVTIER_CLOSED);
    c!(kvtier_session_close(open.0, 0));
}

#[test]
fn switching_checks_its_text() {
    let open = Open::new();
    let long = CString::new("x".repeat(1025)).unwrap();
    assert_eq!(c!(kvtier_switch_namespace(open.0, long.as_ptr())), BAD);
    assert_eq!(c!(kvtier_switch_namespace(open.0, null())), BAD);
    assert_eq!(c!(kvtier_switch_namespace(open.0, c"weights-2".as_ptr())), KVTIER_OK);
}

#[test]
fn another_process_is_told_that_it_forked() {
    let open = Open::new();
    // What a child sees after a fork: a handle with its parent's process id, and a lock that nobody will open.
    let child = Handle { pid: std::process::id() + 1, session: parking_lot::RwLock::new(None) };
    let locked = child.session.write();
    let handle = (&raw const child).cast_mut();
    assert_eq!(c!(kvtier_release(handle, c"r".as_ptr(), 0, 0, 0)), KVTIER_FORKED);
    c!(kvtier_session_close(handle, 1000));
    drop(locked);
    assert_eq!(c!(kvtier_release(open.0, c"r".as_ptr(), 0, 0, 0)), KVTIER_MISS);
}
