//! Memory as UCX sees it: registered for peers to read, and buffers that reads land in.
//!
//! *Invariants*: registered memory stays mapped until it is unregistered; a buffer stays until the last operation that
//! writes to it has returned, see [`Landing`].
#![expect(unsafe_code, reason = "registers memory, and gives UCX the addresses of buffers that it owns meanwhile")]

use std::fmt;
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;

use kvtier_memory::{Extent, IoBuf};
use kvtier_ucx_sys::bindings::{
    UCP_MEM_MAP_PARAM_FIELD_ADDRESS, UCP_MEM_MAP_PARAM_FIELD_LENGTH, UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
    UCS_MEMORY_TYPE_HOST, ucp_mem_h, ucp_mem_map_params,
};

use super::{Failure, Handles, Worker};

/// What is registered.
#[derive(Debug)]
pub(in crate::ucx) enum Backing {
    /// An arena's extent.
    Extent(Arc<Extent>),
    /// A buffer of our own.
    Buffer(IoBuf),
}

impl Backing {
    /// First byte and length.
    pub(in crate::ucx) fn span(&self) -> (*mut u8, usize) {
        match self {
            Self::Extent(extent) => (
                extent.base(),
                usize::try_from(extent.len()).expect("an extent is mapped, so it fits the address space"),
            ),
            Self::Buffer(buf) => (buf.as_ptr().cast_mut(), buf.len()),
        }
    }
}

/// Registered memory, until it is dropped.
pub(in crate::ucx) struct Memory {
    handles: Rc<Handles>,
    raw: ucp_mem_h,
    backing: Backing,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("backing", &self.backing).finish_non_exhaustive()
    }
}

impl Memory {
    /// Registers it whole, which for RDMA pins its pages.
    pub(in crate::ucx) fn register(worker: &Worker, backing: Backing) -> Result<Self, Failure> {
        let handles = Rc::clone(&worker.handles);
        let (base, length) = backing.span();
        let mask =
            UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
        let params = ucp_mem_map_params {
            field_mask: u64::from(mask),
            address: base.cast(),
            length,
            memory_type: UCS_MEMORY_TYPE_HOST,
            ..ucp_mem_map_params::default()
        };
        let mut raw: ucp_mem_h = ptr::null_mut();
        // SAFETY: a living context of this thread; the memory is mapped and stays so while `backing` is held.
        let status = unsafe { handles.ucp.ucp_mem_map(handles.context, &raw const params, &raw mut raw) };
        handles.check("ucp_mem_map", status)?;
        Ok(Self { handles, raw, backing })
    }

    /// Address of its first byte, as peers name it.
    pub(in crate::ucx) fn address(&self) -> u64 {
        self.backing.span().0.expose_provenance() as u64
    }

    /// Sets every byte, if it is a buffer of our own.
    pub(in crate::ucx) fn fill(&mut self, byte: u8) {
        if let Backing::Buffer(buf) = &mut self.backing {
            buf.fill(byte);
        }
    }

    /// The key that a peer needs to read it.
    pub(in crate::ucx) fn pack(&self) -> Result<Vec<u8>, Failure> {
        let (ucp, context) = (self.handles.ucp, self.handles.context);
        let mut key = ptr::null_mut();
        let mut len = 0;
        // SAFETY: living handles of this thread, and room for the answer.
        let status = unsafe { ucp.ucp_rkey_pack(context, self.raw, &raw mut key, &raw mut len) };
        self.handles.check("ucp_rkey_pack", status)?;
        // SAFETY: UCX answered with so many bytes at this address, which stay until they are released below.
        let bytes = unsafe { std::slice::from_raw_parts(key.cast::<u8>(), len) }.to_vec();
        // SAFETY: made by the call above, and not used after.
        unsafe { ucp.ucp_rkey_buffer_release(key) };
        Ok(bytes)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: registered by `register` with this context. Peers that still read it get errors, which are theirs.
        let status = unsafe { self.handles.ucp.ucp_mem_unmap(self.handles.context, self.raw) };
        if let Err(failure) = self.handles.check("ucp_mem_unmap", status) {
            tracing::warn!(%failure, "registered memory could not be released");
        }
    }
}

/// A buffer that reads land in. Operations hold it in an `Arc` until they have returned, so that who takes the last
/// reference takes memory that nothing writes to any more.
#[derive(Debug)]
pub(in crate::ucx) struct Landing {
    base: *mut u8,
    buf: IoBuf,
}

// SAFETY: the address is the buffer's own, which can be sent; only operations that hold the landing write through it.
unsafe impl Send for Landing {}
// SAFETY: shared references only compute checksums, of whatever bytes are there.
unsafe impl Sync for Landing {}

impl Landing {
    /// Takes the buffer until [`Self::into_inner`].
    pub(in crate::ucx) fn new(mut buf: IoBuf) -> Self {
        Self { base: buf.as_mut_ptr(), buf }
    }

    /// The buffer.
    pub(in crate::ucx) fn into_inner(self) -> IoBuf {
        self.buf
    }

    /// CRC-64/NVME of bytes whose checksum is `before` and of a part after them that has arrived; of one that has not, it is
    /// arbitrary.
    pub(in crate::ucx) fn checksum(&self, before: u64, at: usize, len: usize) -> u64 {
        self.buf.checksum_after(before, at, len)
    }

    /// Its first bytes, once they have arrived.
    pub(in crate::ucx) fn copy_out(&self, into: &mut [u8]) {
        self.buf.copy_out(into);
    }

    /// Where UCX writes a part.
    ///
    /// # Panics
    /// If it is not inside the buffer.
    pub(super) fn part(&self, at: usize, len: usize) -> *mut u8 {
        assert!(
            at.checked_add(len).is_some_and(|end| end <= self.buf.len()),
            "a read of {len} bytes beyond its buffer"
        );
        self.base.wrapping_add(at)
    }
}
