//! C functions of every session, whatever its role.
#![expect(unsafe_code, reason = "C interface: exported symbols and pointer arguments")]

use std::ffi::c_char;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;

use super::args::{guarded, out, text, with_session, write_text, write_whole};
use super::types::{Handle, KVTIER_ABI_VERSION, KVTIER_OK, Status};
use crate::error::Error;
use crate::session::Session;
use crate::spec::{MAX_SPEC_BYTES, Spec};
use crate::weights;

/// Longest path accepted.
const MAX_PATH_BYTES: usize = 4096;
/// Longest revision read; the session has a shorter bound of its own.
const MAX_REVISION_BYTES: usize = 4096;
/// Longest that closing may take.
const MAX_CLOSE: Duration = Duration::from_secs(60);

/// Version of the interface this library has: `KVTIER_ABI_VERSION`.
#[unsafe(no_mangle)]
pub extern "C" fn kvtier_abi_version() -> u32 {
    KVTIER_ABI_VERSION
}

/// Opens a session described by a JSON text; unknown fields are refused:
///
/// ```text
/// {"socket": "/run/kvtier/kvtierd.sock", "engine_id": "...", "role": "scheduler" | "worker", "rank": 0, "shard": 0,
///  "namespace": {"model", "weights_digest", "kv_dtype", "quantization", "adapter_digest", "hash_algorithm", "hash_seed",
///                "hash_block_tokens": 16, "revision"},
///  "layout": {"attention_backend", "isa", "layout", "tensor_parallel": 1, "pipeline_parallel": 1,
///             "prefill_context_parallel": 1, "decode_context_parallel": 1, "shards": 1,
///             "groups": [{"kind": "full" | "sliding_window" | "mla" | "state", "window_tokens": 0, "block_tokens": 16,
///                         "layers": [".."]}], "block_bytes": [65536]},
///  "call_timeout_ms": 2000, "copy_threads": 1, "max_inflight": 256}
/// ```
///
/// Never waits for the daemon: attaching goes on in the background. On an error, `err` (of `err_cap` bytes, may be null)
/// says what is wrong.
///
/// # Safety
/// `spec_json` is a NUL-terminated string; `out_session` has room for a pointer; `err` is null or has room for `err_cap`
/// bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_session_open(
    spec_json: *const c_char,
    out_session: *mut *mut Handle,
    err: *mut c_char,
    err_cap: usize,
) -> Status {
    guarded(|| {
        let opened = || {
            // SAFETY: the caller's promise on `out_session`.
            let out = unsafe { out("out", out_session) }?;
            out.write(std::ptr::null_mut());
            // SAFETY: the caller's promise on `spec_json`.
            let spec = unsafe { text("spec_json", spec_json, MAX_SPEC_BYTES) }?;
            let session = Session::open(Spec::parse(spec)?)?;
            let handle = Handle { pid: std::process::id(), session: RwLock::new(Some(Arc::new(session))) };
            out.write(Box::into_raw(Box::new(handle)));
            Ok(KVTIER_OK)
        };
        opened().inspect_err(|error: &Error| {
            // SAFETY: the caller's promise on `err`.
            unsafe { write_text(&error.to_string(), err, err_cap) };
        })
    })
}

/// Closes a session: copies that have begun end, reservations are given back and seals flushed, the latter two within
/// `deadline_ms`. When it returns, registered memory is not touched anymore. The few bytes of the handle stay, so that a
/// late call is answered `KVTIER_CLOSED`. In a forked child it does nothing.
///
/// # Safety
/// `session` is null or came from `kvtier_session_open`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_session_close(session: *mut Handle, deadline_ms: u32) {
    guarded(|| {
        // SAFETY: the caller's promise; a handle is never freed.
        let handle = unsafe { session.as_ref() }.ok_or_else(|| Error::invalid("the session is null"))?;
        if handle.pid != std::process::id() {
            return Err(Error::Forked);
        }
        let taken = handle.session.write().take();
        if let Some(session) = taken {
            session.close(Duration::from_millis(deadline_ms.into()).min(MAX_CLOSE));
        }
        Ok(KVTIER_OK)
    });
}

/// Says in `state` whether there is a daemon (`KVTIER_STATE_*`) and in `buf` why not, or the daemon's notes, cut to `cap`.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `state` has room for one number; `buf` is null or has room for `cap` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_session_state(
    session: *mut Handle,
    state: *mut i32,
    buf: *mut c_char,
    cap: usize,
) -> Status {
    let body = |session: &Session| {
        // SAFETY: the caller's promise on `state`.
        let out = unsafe { out("state", state) }?;
        let (state, message) = session.state();
        out.write(state as i32);
        // SAFETY: the caller's promise on `buf`.
        unsafe { write_text(&message, buf, cap) };
        Ok(KVTIER_OK)
    };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

/// Moves the engine to another revision of its namespace, at once: new keys, lookups answer 0, tickets are busy, and no
/// further transfer of any job begins.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `revision` is a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_switch_namespace(session: *mut Handle, revision: *const c_char) -> Status {
    let body = |session: &Session| {
        // SAFETY: the caller's promise on `revision`.
        let revision = unsafe { text("revision", revision, MAX_REVISION_BYTES) }?;
        session.switch_namespace(revision)?;
        Ok(KVTIER_OK)
    };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

/// Writes the session's counters to `json` (of `cap` bytes; 4096 are plenty) as one flat JSON object.
///
/// # Safety
/// `session` came from `kvtier_session_open`; `json` has room for `cap` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_counters(session: *mut Handle, json: *mut c_char, cap: usize) -> Status {
    // SAFETY: the caller's promise on `json`.
    let body = |session: &Session| unsafe { write_whole(&session.counters(), json, cap) };
    // SAFETY: the caller's promise on `session`.
    unsafe { with_session(session, body) }
}

/// Writes the weights digest of the checkpoint directory at `path` to `out` (of `cap` bytes; 256 are plenty):
/// `hub:<commit>` inside a hub snapshot, else a digest of its files. Reads files: call it at start-up.
///
/// # Safety
/// `path` is a NUL-terminated string; `out` has room for `cap` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvtier_weights_digest(path: *const c_char, out: *mut c_char, cap: usize) -> Status {
    guarded(|| {
        // SAFETY: the caller's promise on `path`.
        let path = unsafe { text("path", path, MAX_PATH_BYTES) }?;
        let digest = weights::digest(Path::new(path))?;
        // SAFETY: the caller's promise on `out`.
        unsafe { write_whole(&digest, out, cap) }
    })
}
