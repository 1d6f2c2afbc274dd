//! The wall around a stream that is held up, for tests: a stand-in for an engine's that has work to do.
#![expect(unsafe_code, reason = "calls of the driver, and a function that the driver calls")]

use std::ffi::{c_uint, c_void};
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::api::Handle;
use super::context::Context;
use crate::conformance::HeldStream;
use crate::{DeviceError, EngineStream};

/// A stream whose first work ends when it is let go.
pub(super) struct HeldUp {
    context: Arc<Context>,
    stream: Handle,
    gate: Arc<Gate>,
}

#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
}

/// Called by the driver in the stream's turn.
extern "C" fn hold(gate: *mut c_void) {
    // SAFETY: `HeldUp::new` gave one count of the gate away with this call.
    let gate = unsafe { Arc::from_raw(gate.cast_const().cast::<Gate>()) };
    let mut open = gate.open.lock();
    while !*open {
        gate.changed.wait(&mut open);
    }
}

impl HeldUp {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        let _entered = context.enter()?;
        let launch = context.api.host_function.ok_or(DeviceError::MissingSymbol { name: "cuLaunchHostFunc" })?;
        let mut stream: Handle = std::ptr::null_mut();
        let non_blocking: c_uint = 1;
        // SAFETY: room for one handle; destroyed when this value is dropped.
        let code = unsafe { (context.api.stream_create)(&raw mut stream, non_blocking, 0) };
        context.check("cuStreamCreateWithPriority", code)?;
        let gate = Arc::new(Gate::default());
        let given = Arc::into_raw(Arc::clone(&gate)).cast_mut().cast();
        // SAFETY: the function takes what is given, once.
        let code = unsafe { launch(stream, hold, given) };
        context.check("cuLaunchHostFunc", code)?;
        Ok(Self { context: Arc::clone(context), stream, gate })
    }
}

impl HeldStream for HeldUp {
    fn handle(&self) -> EngineStream {
        EngineStream(self.stream.expose_provenance() as u64)
    }

    fn release(&self) {
        *self.gate.open.lock() = true;
        self.gate.changed.notify_all();
    }
}

impl Drop for HeldUp {
    fn drop(&mut self) {
        self.release();
        let Ok(_entered) = self.context.enter() else { return };
        // SAFETY: ours; the driver ends its work first.
        let _code = unsafe { (self.context.api.stream_destroy)(self.stream) };
    }
}
