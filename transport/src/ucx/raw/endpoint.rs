//! Endpoints, the keys of a peer's memory, and reads of it.
//!
//! *Invariants*
//! - Endpoints handle peer errors (`UCP_ERR_HANDLING_MODE_PEER`): when a peer dies, operations return with an error.
//! - A read's buffer and key belong to it until UCX has returned it.
#![expect(unsafe_code, reason = "calls UCX and answers its callbacks")]

use std::cell::Cell;
use std::ffi::c_void;
use std::fmt;
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;

use kvtier_ucx_sys::Answer;
use kvtier_ucx_sys::bindings::{
    UCP_EP_CLOSE_FLAG_FORCE, UCP_EP_PARAM_FIELD_ERR_HANDLER, UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE,
    UCP_EP_PARAM_FIELD_REMOTE_ADDRESS, UCP_ERR_HANDLING_MODE_PEER, UCP_OP_ATTR_FIELD_CALLBACK, UCP_OP_ATTR_FIELD_FLAGS,
    UCP_OP_ATTR_FIELD_MEMORY_TYPE, UCP_OP_ATTR_FIELD_USER_DATA, UCS_MEMORY_TYPE_HOST, UCS_OK, ucp_ep_h, ucp_ep_params,
    ucp_err_handler, ucp_request_param_t, ucp_request_param_t__bindgen_ty_1, ucp_rkey_h, ucs_status_t,
};

use super::{Completion, Failure, Handles, Landing, Worker};

/// What the error callback of an endpoint needs; it lives until the endpoint is closed.
struct Watch {
    handles: Rc<Handles>,
    id: u64,
}

/// A connection to a peer's worker; dropping it closes it.
pub(in crate::ucx) struct Endpoint {
    handles: Rc<Handles>,
    raw: ucp_ep_h,
    watch: *mut Watch,
    /// Whether operations in flight are ended with an error, not awaited.
    forced: Cell<bool>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Connects to the worker with this address. `id` names the endpoint among [`Worker::take_failures`].
    ///
    /// The address must be a worker's: UCX does not survive every other input, so the caller has checked a checksum.
    pub(in crate::ucx) fn connect(worker: &Worker, address: &[u8], id: u64) -> Result<Self, Failure> {
        let handles = Rc::clone(&worker.handles);
        let watch = Box::into_raw(Box::new(Watch { handles: Rc::clone(&handles), id }));
        let mask =
            UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
        let params = ucp_ep_params {
            field_mask: u64::from(mask),
            address: address.as_ptr().cast(),
            err_mode: UCP_ERR_HANDLING_MODE_PEER,
            err_handler: ucp_err_handler { cb: Some(peer_failed), arg: watch.cast() },
            ..ucp_ep_params::default()
        };
        let mut raw: ucp_ep_h = ptr::null_mut();
        // SAFETY: a living worker of this thread, an address that lives for the call, a callback whose argument outlives it.
        let status = unsafe { handles.ucp.ucp_ep_create(handles.worker, &raw const params, &raw mut raw) };
        if let Err(failure) = handles.check("ucp_ep_create", status) {
            // SAFETY: made by `Box::into_raw` above; without an endpoint nobody else has it.
            drop(unsafe { Box::from_raw(watch) });
            return Err(failure);
        }
        Ok(Self { handles, raw, watch, forced: Cell::new(true) })
    }

    /// Closes it after what is in flight, for a peer that is well.
    pub(in crate::ucx) fn close_gently(self) {
        self.forced.set(false);
    }

    /// Makes a peer's key usable. As with [`Self::connect`], the caller has checked a checksum.
    pub(in crate::ucx) fn unpack(&self, key: &[u8]) -> Result<RemoteKey, Failure> {
        let mut raw: ucp_rkey_h = ptr::null_mut();
        let ucp = self.handles.ucp;
        // SAFETY: a living endpoint of this thread, a packed key that lives for the call, and room for the answer.
        let status = unsafe { ucp.ucp_ep_rkey_unpack(self.raw, key.as_ptr().cast(), &raw mut raw) };
        self.handles.check("ucp_ep_rkey_unpack", status)?;
        Ok(RemoteKey { handles: Rc::clone(&self.handles), raw })
    }

    /// Starts a read. When it does not end at once, its end is among [`Worker::take_completions`].
    pub(in crate::ucx) fn get(&self, get: Get) -> Result<Posted, Failure> {
        let ucp = self.handles.ucp;
        let (target, len, remote, key) = (get.landing.part(get.at, get.len), get.len, get.remote, get.key.raw);
        let operation = Box::into_raw(Box::new(Operation { handles: Rc::clone(&self.handles), get }));
        let mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
        let params = ucp_request_param_t {
            op_attr_mask: mask,
            cb: ucp_request_param_t__bindgen_ty_1 { send: Some(get_ended) },
            user_data: operation.cast(),
            memory_type: UCS_MEMORY_TYPE_HOST,
            ..ucp_request_param_t::default()
        };
        // SAFETY: the target is inside the landing, which `operation` holds until UCX returns it, and so is the key; the
        // endpoint lives.
        let answer = unsafe { ucp.ucp_get_nbx(self.raw, target.cast(), len, remote, key, &raw const params) };
        let answer = Answer::of(answer);
        if matches!(answer, Answer::Started(_)) {
            return Ok(Posted::InFlight);
        }
        // SAFETY: made by `Box::into_raw` above; an operation that ended at once gets no callback.
        drop(unsafe { Box::from_raw(operation) });
        match answer {
            Answer::Failed(status) => Err(self.handles.failure("ucp_get", status)),
            Answer::Done | Answer::Started(_) => Ok(Posted::Done),
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        let params = ucp_request_param_t {
            op_attr_mask: UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS,
            flags: if self.forced.get() { UCP_EP_CLOSE_FLAG_FORCE } else { 0 },
            cb: ucp_request_param_t__bindgen_ty_1 { send: Some(closed) },
            user_data: self.watch.cast(),
            ..ucp_request_param_t::default()
        };
        let closing = &self.handles.events.closing;
        closing.set(closing.get() + 1);
        // SAFETY: a living endpoint of this thread, not used after; what it calls back with lives until then.
        let answer = unsafe { self.handles.ucp.ucp_ep_close_nbx(self.raw, &raw const params) };
        if !matches!(Answer::of(answer), Answer::Started(_)) {
            closing.set(closing.get() - 1);
            // SAFETY: made by `Box::into_raw` in `connect`; a closed endpoint calls nobody back.
            drop(unsafe { Box::from_raw(self.watch) });
        }
    }
}

/// A peer's key, ready for reads through the endpoint that unpacked it.
pub(in crate::ucx) struct RemoteKey {
    handles: Rc<Handles>,
    raw: ucp_rkey_h,
}

impl fmt::Debug for RemoteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteKey").finish_non_exhaustive()
    }
}

impl Drop for RemoteKey {
    fn drop(&mut self) {
        // SAFETY: a key of this thread's worker; operations that use it hold it, so none is in flight.
        unsafe { self.handles.ucp.ucp_rkey_destroy(self.raw) };
    }
}

/// A read of a peer's memory.
#[derive(Debug)]
pub(in crate::ucx) struct Get {
    /// Comes back with its [`Completion`].
    pub(in crate::ucx) tag: u64,
    pub(in crate::ucx) key: Rc<RemoteKey>,
    /// Address of the first byte at the peer.
    pub(in crate::ucx) remote: u64,
    pub(in crate::ucx) landing: Arc<Landing>,
    /// Where in the landing.
    pub(in crate::ucx) at: usize,
    /// Bytes.
    pub(in crate::ucx) len: usize,
}

/// How far a read came when it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::ucx) enum Posted {
    /// To its end.
    Done,
    /// It will be completed.
    InFlight,
}

/// A read that UCX holds.
struct Operation {
    handles: Rc<Handles>,
    get: Get,
}

/// UCX's error callback.
unsafe extern "C" fn peer_failed(watch: *mut c_void, _endpoint: ucp_ep_h, status: ucs_status_t) {
    // SAFETY: the argument of an endpoint that is not closed yet: `Watch` lives until its closing has ended.
    let watch = unsafe { &*watch.cast::<Watch>() };
    let failure = watch.handles.failure("peer", status);
    watch.handles.events.failures.borrow_mut().push((watch.id, failure));
}

/// UCX's callback of a read that did not end at once.
unsafe extern "C" fn get_ended(request: *mut c_void, status: ucs_status_t, operation: *mut c_void) {
    // SAFETY: made by `Box::into_raw` in `get`, and UCX calls back once.
    let operation = unsafe { Box::from_raw(operation.cast::<Operation>()) };
    let Operation { handles, get } = *operation;
    let result = handles.check("ucp_get", status);
    // SAFETY: the request is of this worker and has ended.
    unsafe { handles.ucp.ucp_request_free(request) };
    handles.events.completions.borrow_mut().push(Completion { get, result });
}

/// UCX's callback of a closing that did not end at once.
unsafe extern "C" fn closed(request: *mut c_void, status: ucs_status_t, watch: *mut c_void) {
    // SAFETY: made by `Box::into_raw` in `connect`; a closed endpoint calls nobody back after this.
    let watch = unsafe { Box::from_raw(watch.cast::<Watch>()) };
    if status != UCS_OK {
        tracing::debug!(failure = %watch.handles.failure("ucp_ep_close", status), "an endpoint closed with an error");
    }
    // SAFETY: the request is of this worker and has ended.
    unsafe { watch.handles.ucp.ucp_request_free(request) };
    let closing = &watch.handles.events.closing;
    closing.set(closing.get() - 1);
}
