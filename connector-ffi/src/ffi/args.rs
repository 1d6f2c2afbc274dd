//! Reading and writing what C points to. The checks that can be made are made: null, alignment, counts, sizes, UTF-8.
#![expect(unsafe_code, reason = "arguments of a C interface are pointers")]

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bytes::Bytes;
use kvtier_types::EngineHash;
use kvtier_types::hints::MAX_JSON_BYTES;

use super::types::{Handle, KVTIER_OK};
use crate::error::Error;
use crate::session::Session;

/// Longest salt of a request.
const MAX_SALT_BYTES: usize = 1024;

/// Runs the body of a C function: a panic becomes a status.
pub(super) fn guarded(body: impl FnOnce() -> Result<i32, Error>) -> i32 {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => error.status(),
        Err(_) => Error::Panicked.status(),
    }
}

/// The open session behind a handle.
///
/// # Safety
/// `handle` is null or came from `kvtier_session_open`.
pub(super) unsafe fn session(handle: *const Handle) -> Result<Arc<Session>, Error> {
    // SAFETY: as this function's contract says; a handle is never freed.
    let handle = unsafe { handle.as_ref() }.ok_or_else(|| Error::invalid("the session is null"))?;
    if handle.pid != std::process::id() {
        return Err(Error::Forked);
    }
    handle.session.read().clone().ok_or(Error::Closed)
}

/// Runs the body of a C function on an open session.
///
/// # Safety
/// `handle` is null or came from `kvtier_session_open`.
pub(super) unsafe fn with_session(handle: *const Handle, body: impl FnOnce(&Session) -> Result<i32, Error>) -> i32 {
    guarded(|| {
        // SAFETY: as this function's contract says.
        let session = unsafe { session(handle) }?;
        body(&session)
    })
}

/// A text of at most `max` bytes.
///
/// # Safety
/// `text` is null or points to a NUL-terminated string that does not change during the call.
pub(super) unsafe fn text<'a>(field: &str, text: *const c_char, max: usize) -> Result<&'a str, Error> {
    // SAFETY: as this function's contract says.
    match unsafe { optional_text(field, text, max) }? {
        Some(text) => Ok(text),
        None => Err(Error::invalid(format!("{field} is null"))),
    }
}

/// A text of at most `max` bytes; `None` for null.
///
/// # Safety
/// As for [`text`].
pub(super) unsafe fn optional_text<'a>(field: &str, text: *const c_char, max: usize) -> Result<Option<&'a str>, Error> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: not null, and NUL-terminated as this function's contract says.
    let text = unsafe { CStr::from_ptr(text) };
    if text.to_bytes().len() > max {
        return Err(Error::invalid(format!("{field} has more than {max} bytes")));
    }
    text.to_str().map(Some).map_err(|_| Error::invalid(format!("{field} is not UTF-8")))
}

/// `count` elements, at most `max`.
///
/// # Safety
/// Unless null, `array` points to `count` initialized elements that do not change during the call.
pub(super) unsafe fn array<'a, T>(field: &str, array: *const T, count: usize, max: usize) -> Result<&'a [T], Error> {
    if count > max {
        return Err(Error::invalid(format!("{field} has {count} elements, at most {max} are allowed")));
    }
    if count == 0 {
        return Ok(&[]);
    }
    if array.is_null() || !array.is_aligned() {
        return Err(Error::invalid(format!("{field} is null or misaligned")));
    }
    // SAFETY: not null, aligned, and `count` elements as this function's contract says; their size is bounded by `max`.
    Ok(unsafe { std::slice::from_raw_parts(array, count) })
}

/// Room for `count` elements, at most `max`.
///
/// # Safety
/// Unless null, `array` points to room for `count` elements that nobody else uses during the call.
pub(super) unsafe fn room<'a, T>(
    field: &str,
    array: *mut T,
    count: usize,
    max: usize,
) -> Result<&'a mut [MaybeUninit<T>], Error> {
    if count > max {
        return Err(Error::invalid(format!("{field} has room for {count} elements, at most {max} are allowed")));
    }
    if count == 0 {
        return Ok(&mut []);
    }
    if array.is_null() || !array.is_aligned() {
        return Err(Error::invalid(format!("{field} is null or misaligned")));
    }
    // SAFETY: not null, aligned, and room as this function's contract says; it may be uninitialized.
    Ok(unsafe { std::slice::from_raw_parts_mut(array.cast(), count) })
}

/// Room for one value.
///
/// # Safety
/// As for [`room`].
pub(super) unsafe fn out<'a, T>(field: &str, out: *mut T) -> Result<&'a mut MaybeUninit<T>, Error> {
    // SAFETY: as this function's contract says, for one element.
    let room = unsafe { room(field, out, 1, 1) }?;
    room.first_mut().ok_or_else(|| Error::invalid(field))
}

/// A struct that begins with its size, which must be this version's.
///
/// # Safety
/// `value` is null or points to a struct at least as long as its first word says, which does not change during the call.
pub(super) unsafe fn sized<T: Copy>(field: &str, value: *const T) -> Result<T, Error> {
    if value.is_null() || !value.is_aligned() {
        return Err(Error::invalid(format!("{field} is null or misaligned")));
    }
    // SAFETY: not null, aligned for a struct that begins with a u32, and at least that long.
    let size = unsafe { value.cast::<u32>().read() };
    if size as usize != size_of::<T>() {
        return Err(Error::invalid(format!("{field}.size is {size}, this version's is {}", size_of::<T>())));
    }
    // SAFETY: as long as T, since its first word says so.
    Ok(unsafe { value.read() })
}

/// `count` hashes of `len` bytes each, at most `max`.
///
/// # Safety
/// Unless null, `hashes` points to `count * len` bytes that do not change during the call.
pub(super) unsafe fn hashes(hashes: *const u8, count: u32, len: u32, max: usize) -> Result<Vec<EngineHash>, Error> {
    let (count, len) = (count as usize, len as usize);
    if !(EngineHash::MIN_BYTES..=EngineHash::MAX_BYTES).contains(&len) {
        return Err(Error::invalid(format!("hash_len is {len}, expected 16 to 32")));
    }
    if count > max {
        return Err(Error::invalid(format!("{count} hashes, at most {max} are allowed")));
    }
    // SAFETY: as this function's contract says; the product is bounded by `max` and a hash's length.
    let bytes = unsafe { array("hashes", hashes, count * len, max * EngineHash::MAX_BYTES) }?;
    bytes.chunks_exact(len).map(|hash| EngineHash::new(hash).map_err(|e| Error::invalid(e.to_string()))).collect()
}

/// The salt of a request, empty for null.
///
/// # Safety
/// As for [`text`].
pub(super) unsafe fn salt(salt: *const c_char) -> Result<String, Error> {
    // SAFETY: as this function's contract says.
    let salt = unsafe { optional_text("cache_salt", salt, MAX_SALT_BYTES) }?;
    Ok(salt.unwrap_or_default().to_owned())
}

/// What a request's client said, empty for null. It is read by the daemon.
///
/// # Safety
/// As for [`array`].
pub(super) unsafe fn hints(hints: *const u8, len: u32) -> Result<Bytes, Error> {
    // SAFETY: as this function's contract says.
    let bytes = unsafe { array("hints", hints, len as usize, MAX_JSON_BYTES) }?;
    Ok(Bytes::copy_from_slice(bytes))
}

/// Copies a text and a NUL, cut at a character boundary if need be. Answers whether it fitted; without room, nothing is
/// written.
///
/// # Safety
/// Unless null, `buffer` points to room for `capacity` bytes that nobody else uses during the call.
pub(super) unsafe fn write_text(text: &str, buffer: *mut c_char, capacity: usize) -> bool {
    if buffer.is_null() || capacity == 0 {
        return false;
    }
    // A NUL inside would end the text early on the other side anyway.
    let text = text.split('\0').next().unwrap_or_default();
    let mut len = text.len().min(capacity - 1);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    // SAFETY: the two do not overlap, and there is room for `len` bytes and a NUL.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), buffer.cast(), len) };
    // SAFETY: as above: `len` is less than `capacity`.
    unsafe { buffer.wrapping_add(len).write(0) };
    len == text.len()
}

/// [`write_text`] that must fit.
///
/// # Safety
/// As for [`write_text`].
pub(super) unsafe fn write_whole(text: &str, buffer: *mut c_char, capacity: usize) -> Result<i32, Error> {
    if buffer.is_null() {
        return Err(Error::invalid("the buffer is null"));
    }
    // SAFETY: as this function's contract says.
    if unsafe { write_text(text, buffer, capacity) } {
        Ok(KVTIER_OK)
    } else {
        Err(Error::BufferTooSmall { needed: text.len() + 1 })
    }
}
