//! What sysfs cannot tell about RDMA devices, asked of libibverbs: limits of registered memory, and dmabuf.
//!
//! A machine without devices, without the kernel's part or without permission has none: that is no error.
#![expect(unsafe_code, reason = "calls libibverbs")]

use std::ffi::{CStr, c_int};
use std::io;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

use rdma_sys::{
    ibv_close_device, ibv_context, ibv_device, ibv_device_attr, ibv_free_device_list, ibv_get_device_list,
    ibv_get_device_name, ibv_open_device, ibv_query_device,
};

use super::MAX_DEVICES;

/// What a device can register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// As sysfs calls the device.
    pub name: String,
    /// Longest memory region, in bytes.
    pub max_region_bytes: u64,
    /// Most memory regions.
    pub max_regions: u64,
}

/// What libibverbs says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verbs {
    /// Devices that could be opened and asked.
    pub devices: Vec<Limits>,
    /// Whether this libibverbs can register GPU memory by dmabuf; the driver has a say as well.
    pub dmabuf: bool,
}

/// Asks libibverbs about every device.
///
/// # Errors
/// What the system said, unless it is that there are no devices.
pub fn query() -> io::Result<Verbs> {
    let devices = match List::get()? {
        Some(list) => list.devices().iter().filter_map(|device| limits(*device)).collect(),
        None => Vec::new(),
    };
    Ok(Verbs { devices, dmabuf: has_dmabuf() })
}

/// libibverbs' list of devices.
struct List {
    first: NonNull<*mut ibv_device>,
    len: usize,
}

impl List {
    /// `None` on a machine that has none.
    fn get() -> io::Result<Option<Self>> {
        let mut len: c_int = 0;
        // SAFETY: the argument points to an int for the call.
        let first = unsafe { ibv_get_device_list(&raw mut len) };
        if let Some(first) = NonNull::new(first) {
            return Ok(Some(Self { first, len: usize::try_from(len).unwrap_or(0) }));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ENOSYS | libc::ENODEV | libc::ENOENT | libc::EPERM | libc::EACCES) => Ok(None),
            _ => Err(error),
        }
    }

    fn devices(&self) -> &[*mut ibv_device] {
        // SAFETY: an array of `len` pointers that lives until the list is freed, which is when `self` ends.
        let devices = unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) };
        &devices[..self.len.min(MAX_DEVICES)]
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: given out by `ibv_get_device_list` and freed once; no device of it is used any more.
        unsafe { ibv_free_device_list(self.first.as_ptr()) };
    }
}

/// An opened device.
struct Context(NonNull<ibv_context>);

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: given out by `ibv_open_device` and closed once.
        let closed = unsafe { ibv_close_device(self.0.as_ptr()) };
        if closed != 0 {
            tracing::debug!("an RDMA device did not close");
        }
    }
}

/// `None` for a device that cannot be opened or asked.
fn limits(device: *mut ibv_device) -> Option<Limits> {
    // SAFETY: a device of a list that lives during this call.
    let name = NonNull::new(unsafe { ibv_get_device_name(device) }.cast_mut())?;
    // SAFETY: a string that lives as long as the list.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    // SAFETY: a device of a list that lives during this call.
    let context = Context(NonNull::new(unsafe { ibv_open_device(device) })?);
    let mut attributes = MaybeUninit::<ibv_device_attr>::zeroed();
    // SAFETY: an open context, and room for the attributes.
    let failed = unsafe { ibv_query_device(context.0.as_ptr(), attributes.as_mut_ptr()) };
    if failed != 0 {
        return None;
    }
    // SAFETY: plain numbers and strings of bytes, zeroed at first and filled by the call that succeeded.
    let attributes = unsafe { attributes.assume_init() };
    let max_regions = u64::try_from(attributes.max_mr).unwrap_or(0);
    Some(Limits { name, max_region_bytes: attributes.max_mr_size, max_regions })
}

/// Since rdma-core 34.
fn has_dmabuf() -> bool {
    // SAFETY: looks a name up among the libraries that are loaded; the name ends in zero.
    let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"ibv_reg_dmabuf_mr".as_ptr()) };
    !symbol.is_null()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn libibverbs_and_sysfs_agree_on_the_devices() {
        let verbs = super::query().unwrap();
        let sysfs = super::super::discover(Path::new(super::super::SYSFS));
        if sysfs.devices.is_empty() {
            eprintln!("skipped: comparing the names of devices: this machine has no RDMA devices");
        }
        let known = |name: &String| sysfs.devices.iter().any(|device| device.name == *name);
        assert!(verbs.devices.iter().all(|limits| known(&limits.name)), "{verbs:?} {sysfs:?}");
        assert!(verbs.devices.len() <= sysfs.devices.len());
    }
}
