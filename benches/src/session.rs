//! A session over the C interface, as an engine uses it: submit, poll, wait.
#![expect(unsafe_code, reason = "calls the C interface")]

use std::ffi::{CStr, CString, c_char};
use std::ptr::{null, null_mut};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use kvtier::ffi::scheduler::{
    kvtier_lookup_frames, kvtier_lookup_poll, kvtier_lookup_submit, kvtier_release, kvtier_reserve_abandon,
    kvtier_reserve_poll, kvtier_reserve_submit,
};
use kvtier::ffi::session::{kvtier_counters, kvtier_session_close, kvtier_session_open, kvtier_session_state};
use kvtier::ffi::types::{
    Frame, Handle, HitInfo, KVTIER_BLOCK_GRANTED, KVTIER_OK, KVTIER_PENDING, KVTIER_STATE_ATTACHED,
    KVTIER_TRANSFER_DONE, LookupRequest, RegionInfo, ReserveRequest, TransferInfo,
};
use kvtier::ffi::worker::{kvtier_job_wait, kvtier_load_submit, kvtier_register_regions, kvtier_save_submit};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(20);
const PATIENCE_MS: u32 = 20_000;

/// Calls a C function; in one place, because every call of this file has the same excuse.
macro_rules! c {
    ($call:expr) => {{
        // SAFETY: the session is open; pointers are to values that outlive the call, with the counts given.
        unsafe { $call }
    }};
}

/// An open session; closed when dropped.
#[derive(Debug)]
pub(crate) struct Session(*mut Handle);

/// A reservation that was answered.
#[derive(Debug)]
pub(crate) struct Grant {
    /// One frame a block; an all-zero key where none was granted.
    pub(crate) frames: Vec<Frame>,
    /// Blocks without a frame.
    pub(crate) refused: usize,
}

impl Session {
    /// Opens a session and waits until it is attached.
    ///
    /// # Errors
    /// The library's message.
    pub(crate) fn open(spec: &str) -> anyhow::Result<Self> {
        let spec = CString::new(spec)?;
        let mut handle = null_mut();
        let mut message: [c_char; 512] = [0; 512];
        let opened = c!(kvtier_session_open(spec.as_ptr(), &raw mut handle, message.as_mut_ptr(), message.len()));
        let this = Self(handle);
        ensure!(opened == KVTIER_OK, "{}", text(&message));
        let mut state = 0;
        let begin = Instant::now();
        while state != KVTIER_STATE_ATTACHED {
            let buffer = message.as_mut_ptr();
            check(c!(kvtier_session_state(this.0, &raw mut state, buffer, message.len())), "state")?;
            ensure!(begin.elapsed() < PATIENCE, "not attached: {}", text(&message));
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(this)
    }

    /// # Errors
    /// The status.
    pub(crate) fn register(&self, regions: &[RegionInfo]) -> anyhow::Result<()> {
        check(c!(kvtier_register_regions(self.0, regions.as_ptr(), count(regions))), "register_regions")
    }

    /// Reserves the blocks of a prompt from the first on.
    ///
    /// # Errors
    /// The status.
    pub(crate) fn reserve(&self, hashes: &[[u8; 32]]) -> anyhow::Result<Grant> {
        let request = ReserveRequest {
            size: size_u32::<ReserveRequest>(),
            hash_len: 32,
            group: 0,
            first_block: 0,
            hashes: hashes.as_ptr().cast(),
            count: count(hashes),
            hints_len: 0,
            parent_hash: null(),
            cache_salt: null(),
            hints: null(),
        };
        let mut ticket = 0;
        check(c!(kvtier_reserve_submit(self.0, &raw const request, &raw mut ticket)), "reserve_submit")?;
        let mut states = vec![0_u8; hashes.len()];
        let mut frames = vec![Frame::NONE; hashes.len()];
        let (to_states, to_frames, room) = (states.as_mut_ptr(), frames.as_mut_ptr(), count(hashes));
        until(|| c!(kvtier_reserve_poll(self.0, ticket, to_states, to_frames, room)), "reserve_poll")?;
        let refused = states.iter().filter(|state| **state != KVTIER_BLOCK_GRANTED).count();
        Ok(Grant { frames, refused })
    }

    /// # Errors
    /// The status.
    pub(crate) fn abandon(&self, frames: &[Frame]) -> anyhow::Result<()> {
        check(c!(kvtier_reserve_abandon(self.0, frames.as_ptr(), count(frames))), "reserve_abandon")
    }

    /// Saves blocks and waits until they are copied.
    ///
    /// # Errors
    /// When not all were.
    pub(crate) fn save(&self, transfers: &[TransferInfo]) -> anyhow::Result<()> {
        let mut job = 0;
        let (at, n) = (transfers.as_ptr(), count(transfers));
        check(c!(kvtier_save_submit(self.0, at, n, PATIENCE_MS, 0, &raw mut job)), "save_submit")?;
        self.wait(job, transfers.len())
    }

    /// Loads blocks for a request and waits until they are copied.
    ///
    /// # Errors
    /// When not all were.
    pub(crate) fn load(&self, request: &CStr, transfers: &[TransferInfo]) -> anyhow::Result<()> {
        let mut job = 0;
        let (at, n) = (transfers.as_ptr(), count(transfers));
        let submitted = c!(kvtier_load_submit(self.0, request.as_ptr(), at, n, PATIENCE_MS, 0, &raw mut job));
        check(submitted, "load_submit")?;
        self.wait(job, transfers.len())
    }

    fn wait(&self, job: u64, transfers: usize) -> anyhow::Result<()> {
        let mut results = vec![0_u8; transfers];
        let waited = c!(kvtier_job_wait(self.0, job, PATIENCE_MS, results.as_mut_ptr(), count(&results)));
        check(waited, "job_wait")?;
        let failed = results.iter().filter(|result| **result != KVTIER_TRANSFER_DONE).count();
        ensure!(failed == 0, "{failed} of {transfers} transfers failed");
        Ok(())
    }

    /// Looks a prompt up; the tokens of it that can be loaded.
    ///
    /// # Errors
    /// The status.
    pub(crate) fn lookup(&self, request: &CStr, hashes: &[[u8; 32]]) -> anyhow::Result<u32> {
        let question = LookupRequest {
            size: size_u32::<LookupRequest>(),
            hash_len: 32,
            request_id: request.as_ptr(),
            hashes: hashes.as_ptr().cast(),
            hash_count: count(hashes),
            local_tokens: 0,
            cache_salt: null(),
            hints: null(),
            hints_len: 0,
            deadline_ms: PATIENCE_MS,
        };
        check(c!(kvtier_lookup_submit(self.0, &raw const question)), "lookup_submit")?;
        let size = size_u32::<HitInfo>();
        let mut hit = HitInfo {
            size,
            tokens: 0,
            host_tokens: 0,
            disk_tokens: 0,
            object_tokens: 0,
            peer_tokens: 0,
            device_tokens: 0,
        };
        let answer = &raw mut hit;
        until(|| c!(kvtier_lookup_poll(self.0, request.as_ptr(), 0, u32::MAX, answer)), "lookup_poll")?;
        Ok(hit.tokens)
    }

    /// Frames of a lookup's first `blocks` blocks.
    ///
    /// # Errors
    /// The status.
    pub(crate) fn frames(&self, request: &CStr, blocks: usize) -> anyhow::Result<Vec<Frame>> {
        let mut frames = vec![Frame::NONE; blocks];
        let (to, n) = (frames.as_mut_ptr(), count(&frames));
        check(c!(kvtier_lookup_frames(self.0, request.as_ptr(), 0, 0, 0, n, to)), "lookup_frames")?;
        Ok(frames)
    }

    /// # Errors
    /// The status.
    pub(crate) fn release(&self, request: &CStr, tokens: u32) -> anyhow::Result<()> {
        check(c!(kvtier_release(self.0, request.as_ptr(), 0, tokens, 0)), "release")
    }

    /// Waits until `total` seals of this session have been applied: until then nobody sees the blocks.
    ///
    /// # Errors
    /// When they are not in time.
    pub(crate) fn wait_sealed(&self, total: u64) -> anyhow::Result<()> {
        let begin = Instant::now();
        while self.counter("seals_applied")? < total {
            ensure!(begin.elapsed() < PATIENCE, "seals are not applied");
            std::thread::yield_now();
        }
        Ok(())
    }

    /// # Errors
    /// When there is no such counter.
    pub(crate) fn counter(&self, name: &str) -> anyhow::Result<u64> {
        let mut json: [c_char; 4096] = [0; 4096];
        check(c!(kvtier_counters(self.0, json.as_mut_ptr(), json.len())), "counters")?;
        let json: serde_json::Value = serde_json::from_str(&text(&json))?;
        json[name].as_u64().with_context(|| format!("no counter {name}"))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        c!(kvtier_session_close(self.0, 1000));
    }
}

fn check(status: i32, what: &str) -> anyhow::Result<()> {
    ensure!(status == KVTIER_OK, "kvtier_{what} answered {status}");
    Ok(())
}

/// Polls until the answer is there. Yields between polls: sleeping would measure the timer.
fn until(poll: impl Fn() -> i32, what: &str) -> anyhow::Result<()> {
    let begin = Instant::now();
    loop {
        match poll() {
            KVTIER_PENDING if begin.elapsed() < PATIENCE => std::thread::yield_now(),
            KVTIER_PENDING => bail!("kvtier_{what}: no answer"),
            status => return check(status, what),
        }
    }
}

fn count<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).expect("benchmarks pass a few thousand items")
}

fn size_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("structs of the interface are small")
}

/// A text that C wrote, NUL included.
fn text(chars: &[c_char]) -> String {
    let bytes = chars.iter().map(|c| c.cast_unsigned()).take_while(|byte| *byte != 0).collect();
    String::from_utf8(bytes).unwrap_or_default()
}
