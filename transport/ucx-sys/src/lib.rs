//! Bindings of UCX's UCP interface, opened at run time: the binary neither links UCX nor needs it to start.
//!
//! *Invariants*: a library that lacks a function of [`bindings::Ucp`] is refused when it is opened; an opened library is
//! never unloaded, because UCX starts threads and registers exit handlers.
#![expect(unsafe_code, reason = "opens a foreign library, whose functions the bindings declare")]

#[allow(
    missing_debug_implementations,
    missing_docs,
    non_camel_case_types,
    unsafe_op_in_unsafe_fn,
    unused,
    clippy::all,
    clippy::missing_safety_doc,
    clippy::multiple_unsafe_ops_per_block,
    clippy::too_many_arguments,
    clippy::undocumented_unsafe_blocks,
    reason = "generated: names, documents and shapes are UCX's"
)]
pub mod bindings;

use std::ffi::{OsStr, c_uint};
use std::path::Path;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use self::bindings::{UCS_ERR_LAST, UCS_OK, Ucp, ucs_status_ptr_t, ucs_status_t};

/// The name under which systems install the library.
pub const LIBRARY: &str = "libucp.so.0";
/// What a library outside of the system's paths needs beside it, in the order of need.
const COMPANIONS: [&str; 3] = ["libucm.so.0", "libucs.so.0", "libuct.so.0"];

/// Why the library cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot open {library}: {source}")]
pub struct OpenError {
    /// What was to be opened.
    library: String,
    /// What the loader said: no such file, or a function that it lacks.
    source: libloading::Error,
}

/// Opens the library at `path`, or the system's.
///
/// # Errors
/// [`OpenError`] when there is none, or when it lacks a function.
pub fn open(path: Option<&Path>) -> Result<&'static Ucp, OpenError> {
    if let Some(folder) = path.and_then(Path::parent) {
        open_companions(folder);
    }
    let name = path.map_or(OsStr::new(LIBRARY), Path::as_os_str);
    let failed = |source| OpenError { library: name.display().to_string(), source };
    // SAFETY: runs UCX's initialisers, which expect nothing of their caller.
    let library = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL) }.map_err(failed)?;
    // SAFETY: the functions are UCX's, whose types the bindings declare; its structures only grow, by masks of valid fields.
    let ucp = unsafe { Ucp::from_library(library) }.map_err(failed)?;
    Ok(Box::leak(Box::new(ucp)))
}

/// Opens what lies beside a library that is not in the system's paths, so that the loader finds it by name. What is not
/// there is left to the loader.
fn open_companions(folder: &Path) {
    for name in COMPANIONS {
        // SAFETY: runs UCX's initialisers, which expect nothing of their caller.
        let companion = unsafe { Library::open(Some(folder.join(name)), RTLD_NOW | RTLD_LOCAL) };
        if let Ok(companion) = companion {
            // Never unloaded, see the crate's invariants.
            companion.into_raw();
        }
    }
}

/// The library's major and minor version.
#[must_use]
pub fn version(ucp: &Ucp) -> (u32, u32) {
    let (mut major, mut minor, mut release): (c_uint, c_uint, c_uint) = (0, 0, 0);
    // SAFETY: writes three integers that live here.
    unsafe { ucp.ucp_get_version(&raw mut major, &raw mut minor, &raw mut release) };
    (major, minor)
}

/// What a function that may start a request answered: the macros `UCS_PTR_IS_ERR` and `UCS_PTR_STATUS` of UCX, which no
/// library exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done already, well.
    Done,
    /// Failed already, with this status.
    Failed(ucs_status_t),
    /// Started: this is its request.
    Started(ucs_status_ptr_t),
}

impl Answer {
    /// Of what the function returned.
    #[must_use]
    pub fn of(returned: ucs_status_ptr_t) -> Self {
        let value = returned.addr().cast_signed();
        if value == isize::from(UCS_OK) {
            return Self::Done;
        }
        match ucs_status_t::try_from(value) {
            Ok(status) if (UCS_ERR_LAST..0).contains(&status) => Self::Failed(status),
            _ => Self::Started(returned),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::{Answer, open};
    use crate::bindings::{UCS_ERR_CANCELED, UCS_ERR_LAST};

    #[test]
    fn a_missing_library_is_an_error_that_names_it() {
        let error = open(Some("/nonexistent/libucp.so.0".as_ref())).err().expect("there is none");
        assert!(error.to_string().contains("/nonexistent/libucp.so.0"), "{error}");
    }

    #[test]
    fn a_library_without_the_functions_is_an_error() {
        assert!(open(Some("libc.so.6".as_ref())).is_err());
    }

    #[test]
    fn an_answer_is_a_status_or_a_request() {
        assert_eq!(Answer::of(ptr::null_mut()), Answer::Done);
        let failed = ptr::without_provenance_mut(isize::from(UCS_ERR_CANCELED).cast_unsigned());
        assert_eq!(Answer::of(failed), Answer::Failed(UCS_ERR_CANCELED));
        let last = ptr::without_provenance_mut(isize::from(UCS_ERR_LAST).cast_unsigned());
        assert_eq!(Answer::of(last), Answer::Failed(UCS_ERR_LAST));
        let request = ptr::without_provenance_mut(0x7f00_0000_1000);
        assert_eq!(Answer::of(request), Answer::Started(request));
    }
}
