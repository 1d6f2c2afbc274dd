//! UCX's context and worker as values that one thread owns: the unsafe wall of this transport, with a safe face.
//!
//! *Invariants*
//! - Everything made from a worker holds its [`Handles`], so the worker is destroyed last. An operation that UCX never
//!   returns keeps them, its buffer and its key for ever: memory that may still be written is not freed.
//! - Nothing here can be sent to another thread (`Rc`), which is what `UCS_THREAD_MODE_SINGLE` asks for.
//! - Callbacks only note what happened in [`Events`]; they call nothing else and do not unwind.
#![expect(unsafe_code, reason = "calls UCX and answers its callbacks")]

mod endpoint;
mod memory;

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, c_int};
use std::fmt;
use std::os::fd::BorrowedFd;
use std::ptr;
use std::rc::Rc;

use kvtier_ucx_sys::bindings::{
    UCP_FEATURE_RMA, UCP_FEATURE_WAKEUP, UCP_PARAM_FIELD_FEATURES, UCP_PARAM_FIELD_MT_WORKERS_SHARED,
    UCP_WORKER_PARAM_FIELD_THREAD_MODE, UCS_ERR_NO_ELEM, UCS_OK, UCS_THREAD_MODE_SINGLE, Ucp, ucp_config_t,
    ucp_context_h, ucp_params, ucp_worker_h, ucp_worker_params, ucs_status_t,
};
use kvtier_ucx_sys::version;

pub(super) use endpoint::{Endpoint, Get, Posted, RemoteKey};
pub(super) use memory::{Backing, Landing, Memory};

/// A UCX error.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    call: &'static str,
    text: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.call, self.text)
    }
}

impl std::error::Error for Failure {}

/// One setting of UCX, as in its documentation but without the prefix `UCX_`.
#[derive(Debug)]
pub(super) struct Setting {
    pub(super) name: &'static str,
    pub(super) value: String,
    /// Whether a library that does not know it is refused.
    pub(super) required: bool,
}

/// The end of an operation that did not end at once.
#[derive(Debug)]
pub(super) struct Completion {
    /// The operation, which may write no more.
    pub(super) get: Get,
    pub(super) result: Result<(), Failure>,
}

/// What callbacks noted.
#[derive(Debug, Default)]
struct Events {
    completions: RefCell<Vec<Completion>>,
    /// Endpoints whose peer failed, by [`Endpoint`]'s id.
    failures: RefCell<Vec<(u64, Failure)>>,
    /// Endpoints that are being closed.
    closing: Cell<usize>,
}

/// A context and its worker, destroyed with the last value made from them.
struct Handles {
    ucp: &'static Ucp,
    context: ucp_context_h,
    worker: ucp_worker_h,
    events: Events,
}

impl fmt::Debug for Handles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handles").field("events", &self.events).finish_non_exhaustive()
    }
}

impl Handles {
    fn failure(&self, call: &'static str, status: ucs_status_t) -> Failure {
        failure(self.ucp, call, status)
    }

    fn check(&self, call: &'static str, status: ucs_status_t) -> Result<(), Failure> {
        if status == UCS_OK { Ok(()) } else { Err(self.failure(call, status)) }
    }
}

impl Drop for Handles {
    fn drop(&mut self) {
        // SAFETY: a worker of this thread; endpoints, keys and operations hold these handles, so none is left.
        unsafe { self.ucp.ucp_worker_destroy(self.worker) };
        // SAFETY: its only worker is gone, and so is registered memory, which holds these handles.
        unsafe { self.ucp.ucp_cleanup(self.context) };
    }
}

/// A worker of the thread that made it.
#[derive(Debug)]
pub(super) struct Worker {
    handles: Rc<Handles>,
}

impl Worker {
    /// A context and worker with these settings.
    pub(super) fn new(ucp: &'static Ucp, settings: &[Setting]) -> Result<Self, Failure> {
        let config = Config::read(ucp)?;
        for setting in settings {
            config.set(setting)?;
        }
        let mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_MT_WORKERS_SHARED;
        let params = ucp_params {
            field_mask: u64::from(mask),
            features: u64::from(UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP),
            mt_workers_shared: 0,
            ..ucp_params::default()
        };
        let (major, minor) = version(ucp);
        let mut context: ucp_context_h = ptr::null_mut();
        // SAFETY: parameters with a mask of what is valid, a configuration that lives, and room for the answer.
        let status = unsafe { ucp.ucp_init_version(major, minor, &raw const params, config.raw, &raw mut context) };
        if status != UCS_OK {
            return Err(failure(ucp, "ucp_init", status));
        }
        let params = ucp_worker_params {
            field_mask: u64::from(UCP_WORKER_PARAM_FIELD_THREAD_MODE),
            thread_mode: UCS_THREAD_MODE_SINGLE,
            ..ucp_worker_params::default()
        };
        let mut worker: ucp_worker_h = ptr::null_mut();
        // SAFETY: the context was just made; parameters with a mask of what is valid, and room for the answer.
        let status = unsafe { ucp.ucp_worker_create(context, &raw const params, &raw mut worker) };
        if status != UCS_OK {
            // SAFETY: a context without workers.
            unsafe { ucp.ucp_cleanup(context) };
            return Err(failure(ucp, "ucp_worker_create", status));
        }
        Ok(Self { handles: Rc::new(Handles { ucp, context, worker, events: Events::default() }) })
    }

    /// What a peer's [`Endpoint::connect`] takes.
    pub(super) fn address(&self) -> Result<Vec<u8>, Failure> {
        let (ucp, worker) = (self.handles.ucp, self.handles.worker);
        let mut address = ptr::null_mut();
        let mut len = 0;
        // SAFETY: a living worker of this thread, and room for the answer.
        let status = unsafe { ucp.ucp_worker_get_address(worker, &raw mut address, &raw mut len) };
        self.handles.check("ucp_worker_get_address", status)?;
        // SAFETY: UCX answered with so many bytes at this address, which stay until they are released below.
        let bytes = unsafe { std::slice::from_raw_parts(address.cast::<u8>(), len) }.to_vec();
        // SAFETY: the address is this worker's, and not used after.
        unsafe { ucp.ucp_worker_release_address(worker, address) };
        Ok(bytes)
    }

    /// Lets UCX work; returns whether it did something.
    pub(super) fn progress(&self) -> bool {
        // SAFETY: a living worker of this thread; callbacks do not call back into it.
        unsafe { self.handles.ucp.ucp_worker_progress(self.handles.worker) != 0 }
    }

    /// Makes [`Self::event_fd`] report the next event. False when there is one already: progress first.
    pub(super) fn arm(&self) -> bool {
        // SAFETY: a living worker of this thread.
        let status = unsafe { self.handles.ucp.ucp_worker_arm(self.handles.worker) };
        // Only `UCS_ERR_BUSY` is expected, and after any other error one does better to progress than to sleep.
        status == UCS_OK
    }

    /// Becomes readable when there is work, once armed.
    pub(super) fn event_fd(&self) -> Result<BorrowedFd<'_>, Failure> {
        let mut fd: c_int = -1;
        // SAFETY: a living worker of this thread, and room for the answer.
        let status = unsafe { self.handles.ucp.ucp_worker_get_efd(self.handles.worker, &raw mut fd) };
        self.handles.check("ucp_worker_get_efd", status)?;
        // SAFETY: UCX keeps the descriptor open as long as the worker lives, which the borrow ensures.
        Ok(unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// Takes what callbacks noted about operations.
    pub(super) fn take_completions(&self) -> Vec<Completion> {
        self.handles.events.completions.take()
    }

    /// Takes what callbacks noted about peers.
    pub(super) fn take_failures(&self) -> Vec<(u64, Failure)> {
        self.handles.events.failures.take()
    }

    /// Endpoints that are being closed.
    pub(super) fn closing(&self) -> usize {
        self.handles.events.closing.get()
    }
}

/// UCX's configuration: the environment's, then what is set here.
struct Config {
    ucp: &'static Ucp,
    raw: *mut ucp_config_t,
}

impl Config {
    fn read(ucp: &'static Ucp) -> Result<Self, Failure> {
        let mut raw = ptr::null_mut();
        // SAFETY: no prefix and no file are allowed by null; there is room for the answer.
        let status = unsafe { ucp.ucp_config_read(ptr::null(), ptr::null(), &raw mut raw) };
        if status == UCS_OK { Ok(Self { ucp, raw }) } else { Err(failure(ucp, "ucp_config_read", status)) }
    }

    fn set(&self, setting: &Setting) -> Result<(), Failure> {
        let call = "ucp_config_modify";
        let malformed = |_| Failure { call, text: format!("{} has a zero byte", setting.name) };
        let name = CString::new(setting.name).map_err(malformed)?;
        let value = CString::new(setting.value.as_str()).map_err(malformed)?;
        // SAFETY: a living configuration and two strings that end in zero, which UCX copies.
        let status = unsafe { self.ucp.ucp_config_modify(self.raw, name.as_ptr(), value.as_ptr()) };
        match status {
            UCS_OK => Ok(()),
            UCS_ERR_NO_ELEM if !setting.required => Ok(()),
            status => {
                let reason = failure(self.ucp, call, status);
                Err(Failure { call, text: format!("{}={}: {}", setting.name, setting.value, reason.text) })
            }
        }
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        // SAFETY: read by `read`, and not used after; the context copied what it needs.
        unsafe { self.ucp.ucp_config_release(self.raw) };
    }
}

fn failure(ucp: &Ucp, call: &'static str, status: ucs_status_t) -> Failure {
    // SAFETY: takes any number.
    let text = unsafe { ucp.ucs_status_string(status) };
    // SAFETY: UCX answers with a string that ends in zero and stays, if only until this thread's next unknown status.
    let text = unsafe { CStr::from_ptr(text) };
    Failure { call, text: text.to_string_lossy().into_owned() }
}
