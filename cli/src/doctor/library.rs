//! Foreign libraries asked for their version: the only unsafe code of this crate.
//!
//! A library is opened as the dynamic loader finds it, and never unloaded: its destructors are not ours to run.
#![expect(unsafe_code, reason = "opening a foreign library and calling it has no safe form")]

use std::error::Error;
use std::ffi::{CStr, c_char, c_int};
use std::mem::ManuallyDrop;

use libloading::{Library, Symbol};

/// Success of the CUDA driver API (`CUDA_SUCCESS`).
const CUDA_SUCCESS: c_int = 0;
/// The CUDA driver's library.
pub(super) const CUDA: &str = "libcuda.so.1";
/// UCX's protocol layer.
pub(super) const UCX: &str = "libucp.so.0";

/// Why a library has no version to tell.
#[derive(Debug, thiserror::Error)]
pub(super) enum LibraryError {
    /// The loader does not find it, or not what it needs.
    #[error("{}", loader_text(.0))]
    NotLoaded(#[source] libloading::Error),
    /// It has not the function.
    #[error("it lacks {name}")]
    Symbol {
        /// The function.
        name: &'static str,
    },
    /// The function failed.
    #[error("{name} answers error {code}")]
    Call {
        /// The function.
        name: &'static str,
        /// Its answer.
        code: c_int,
    },
}

/// The newest CUDA version the driver supports, as 1000 * major + 10 * minor.
///
/// # Errors
/// [`LibraryError::NotLoaded`] on a machine without the driver.
pub(super) fn cuda_driver_version() -> Result<i32, LibraryError> {
    const NAME: &str = "cuDriverGetVersion";
    type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
    let library = open(CUDA)?;
    // SAFETY: the type is that of cuda.h: `CUresult cuDriverGetVersion(int *)`; the symbol does not outlive `library`.
    let function: Symbol<'_, GetVersion> =
        unsafe { library.get(NAME) }.map_err(|_| LibraryError::Symbol { name: NAME })?;
    let mut version: c_int = 0;
    // SAFETY: `version` is a valid place for one int, and the function may be called before cuInit.
    let code = unsafe { function(&raw mut version) };
    if code == CUDA_SUCCESS { Ok(version) } else { Err(LibraryError::Call { name: NAME, code }) }
}

/// UCX's version as it prints it.
///
/// # Errors
/// [`LibraryError::NotLoaded`] on a machine without UCX.
pub(super) fn ucx_version() -> Result<String, LibraryError> {
    const NAME: &str = "ucp_get_version_string";
    type GetVersionString = unsafe extern "C" fn() -> *const c_char;
    let library = open(UCX)?;
    // SAFETY: the type is that of ucp.h: `const char *ucp_get_version_string(void)`; it does not outlive `library`.
    let function: Symbol<'_, GetVersionString> =
        unsafe { library.get(NAME) }.map_err(|_| LibraryError::Symbol { name: NAME })?;
    // SAFETY: the function has no parameters and no preconditions.
    let text = unsafe { function() };
    if text.is_null() {
        return Err(LibraryError::Call { name: NAME, code: 0 });
    }
    // SAFETY: UCX returns a NUL-terminated string of static lifetime, and the library is never unloaded.
    let text = unsafe { CStr::from_ptr(text) };
    Ok(text.to_string_lossy().into_owned())
}

/// What the dynamic loader itself said: libloading keeps that as the cause.
fn loader_text(error: &libloading::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

fn open(name: &str) -> Result<ManuallyDrop<Library>, LibraryError> {
    // SAFETY: the libraries named in this file run only their own initialization, which they support at any time in
    // any process; an operator who asks for this check trusts what the loader's path holds.
    let library = unsafe { Library::new(name) };
    library.map(ManuallyDrop::new).map_err(LibraryError::NotLoaded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_library_is_an_error_that_names_it() {
        let error = open("libkvtier-no-such-library.so.7").unwrap_err();
        assert!(matches!(error, LibraryError::NotLoaded(_)), "{error}");
        assert!(error.to_string().contains("libkvtier-no-such-library.so.7"), "{error}");
    }

    #[test]
    fn asking_for_versions_never_panics() {
        // Either answer is right: it depends on the machine.
        if let Ok(version) = cuda_driver_version() {
            assert!(version >= 1_000, "{version}");
        }
        if let Ok(version) = ucx_version() {
            assert!(!version.is_empty());
        }
    }
}
