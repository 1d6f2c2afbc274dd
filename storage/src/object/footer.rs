//! Reading the footer of a pack: one ranged GET off its end, and a second one where the footer is long.

use object_store::path::Path;

use super::pack::{Entry, PackName, TRAILER_BYTES, TRAILER_LEN, Trailer};
use super::remote::Remote;
use crate::codec::Malformed;
use crate::store::StorageError;

/// What the first read of a pack takes off its end: the trailer and, unless records are tiny, the whole footer.
const TAIL_BYTES: u64 = 64 << 10;

/// Which pack's footer.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    pub(super) path: &'a Path,
    pub(super) name: &'a PackName,
    pub(super) pack_bytes: u64,
    /// A longer footer is not read.
    pub(super) max_footer_bytes: u64,
}

/// Reads a footer. The outer error means that the store did not answer, the inner one that the pack is none.
///
/// # Errors
/// [`StorageError::NotFound`] when there is no such object; [`StorageError::Unavailable`].
pub(super) async fn read(remote: &Remote, wanted: &Wanted<'_>) -> Result<Result<Vec<Entry>, Malformed>, StorageError> {
    const TRUNCATED: Malformed = Malformed("shorter than a trailer");
    let Wanted { path, name, pack_bytes, max_footer_bytes } = *wanted;
    if pack_bytes < TRAILER_BYTES {
        return Ok(Err(TRUNCATED));
    }
    let tail_at = pack_bytes.saturating_sub(TAIL_BYTES);
    let tail = remote.get(path, tail_at..pack_bytes).await?;
    let Some((rest, trailer)) = tail.split_last_chunk::<TRAILER_LEN>() else {
        return Ok(Err(TRUNCATED));
    };
    let trailer = match Trailer::decode(trailer, pack_bytes) {
        Ok(trailer) => trailer,
        Err(malformed) => return Ok(Err(malformed)),
    };
    if trailer.footer_bytes > max_footer_bytes {
        return Ok(Err(Malformed("its footer is longer than its bound")));
    }
    let footer_end = pack_bytes - TRAILER_BYTES;
    let footer_at = footer_end - trailer.footer_bytes;
    if footer_at >= tail_at {
        let skipped = rest.len().saturating_sub(usize::try_from(trailer.footer_bytes).unwrap_or(usize::MAX));
        return Ok(trailer.decode_footer(name, &rest[skipped..], footer_at));
    }
    let footer = remote.get(path, footer_at..footer_end).await?;
    Ok(trailer.decode_footer(name, &footer, footer_at))
}
