//! Start-up: what of the segment files' content can be used.
//!
//! A sealed segment is taken from its footer: three small reads. One without a footer of its present life is hopped
//! through, header to header, checking every payload, and cut where the first record is not whole; it is then sealed.
//!
//! *Bounds*: payloads are read only for segments without a footer, of which a crash leaves two at most; of more (a
//! damaged disk) the excess over [`MAX_HOPPED_SEGMENTS`] is dropped rather than delaying the start.

use std::fs::File;
use std::sync::Arc;

use crate::disk::index::Segment;
use crate::disk::medium::Medium;
use crate::disk::record::{PAGE_BYTES, PageError, RecordHeader, record_pages};
use crate::disk::segment::{
    Entry, SegmentHeader, Trailer, decode_footer, encode_tail, entry_bytes, page_number, parse_file_name, tail_pages,
};
use crate::store::{Location, RecordMeta, StorageError, io_error};

/// Segments without a footer that are read through at start.
const MAX_HOPPED_SEGMENTS: u32 = 8;
/// Bytes read at a time while a payload is checked.
const CHUNK_BYTES: usize = 1 << 20;

/// What was found.
#[derive(Debug)]
pub(crate) struct Scan {
    pub(crate) segments: Vec<Segment>,
    pub(crate) records: Vec<(RecordMeta, Location)>,
    pub(crate) notes: Vec<String>,
}

/// What one file holds.
enum Content {
    /// Nothing that is alive.
    Empty,
    /// Records under a footer.
    Sealed(u64, Vec<Entry>),
    /// Records found by hopping.
    Hopped(SegmentHeader, Vec<Entry>),
    /// The file is of another version, size or place: it goes.
    Alien(String),
}

/// Reads every segment file, deletes those that do not belong, and seals those that a crash left open.
///
/// # Errors
/// [`StorageError::Io`] when the directory or a file cannot be read or written.
pub(crate) fn scan(medium: &Medium, max_segments: u32) -> Result<Scan, StorageError> {
    let mut scan = Scan { segments: Vec::new(), records: Vec::new(), notes: Vec::new() };
    scan.segments.resize_with(max_segments as usize, Segment::absent);
    let mut hops_left = MAX_HOPPED_SEGMENTS;
    for segment in segment_files(medium)? {
        if segment >= max_segments {
            scan.notes.push(format!("segment {segment}: beyond the configured capacity, deleted"));
            medium.remove(segment)?;
            continue;
        }
        let file = medium.open(segment)?;
        let content = read_segment(medium, segment, &file, &mut hops_left, &mut scan.notes);
        let (epoch, entries) = match content {
            Content::Alien(why) => {
                scan.notes.push(format!("segment {segment}: {why}, deleted"));
                medium.remove(segment)?;
                continue;
            }
            Content::Empty => (0, Vec::new()),
            Content::Sealed(epoch, entries) => (epoch, entries),
            Content::Hopped(header, entries) => {
                seal(medium, &file, &header, &entries)?;
                (header.epoch, entries)
            }
        };
        scan.segments[segment as usize] =
            if entries.is_empty() { Segment::free(file) } else { Segment::recovered(file, epoch, &entries) };
        let located = entries.into_iter().map(|(offset, meta)| (meta, Location { segment, offset }));
        scan.records.extend(located);
    }
    scan.records.sort_by_key(|(meta, _)| meta.sequence);
    Ok(scan)
}

fn segment_files(medium: &Medium) -> Result<Vec<u32>, StorageError> {
    let dir = medium.dir();
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| io_error("list", dir, e))? {
        let name = entry.map_err(|e| io_error("list", dir, e))?.file_name();
        found.extend(name.to_str().and_then(parse_file_name));
    }
    found.sort_unstable();
    Ok(found)
}

fn read_segment(medium: &Medium, segment: u32, file: &File, hops: &mut u32, notes: &mut Vec<String>) -> Content {
    let bytes = medium.segment_bytes();
    match file.metadata() {
        Ok(metadata) if metadata.len() == bytes => {}
        Ok(metadata) => return Content::Alien(format!("{} bytes long instead of {bytes}", metadata.len())),
        Err(error) => return Content::Alien(format!("unreadable ({error})")),
    }
    let header = match medium.read_pages(file, 0, PAGE_BYTES) {
        Ok(page) => SegmentHeader::decode(page.as_slice()),
        Err(error) => return Content::Alien(format!("unreadable ({error})")),
    };
    let header = match header {
        Ok(header) if header.segment == segment && header.bytes == bytes => header,
        Ok(header) => {
            return Content::Alien(format!("written as segment {} of {} bytes", header.segment, header.bytes));
        }
        Err(version @ PageError::Version(_)) => return Content::Alien(version.to_string()),
        Err(PageError::Malformed(why)) => return Content::Alien(format!("its header is not whole ({why})")),
    };
    match read_footer(medium, file, &header) {
        Ok(Some(entries)) => return Content::Sealed(header.epoch, entries),
        Ok(None) => {}
        Err(why) => notes.push(format!("segment {segment}: its footer is damaged ({why}), reading the records")),
    }
    hop(medium, file, &header, hops, notes)
}

/// The footer's entries; `None` when this life has no footer yet.
fn read_footer(medium: &Medium, file: &File, header: &SegmentHeader) -> Result<Option<Vec<Entry>>, String> {
    let last = header.bytes - PAGE_BYTES as u64;
    let page = medium.read_pages(file, last, PAGE_BYTES).map_err(|e| e.to_string())?;
    let trailer = match Trailer::decode(page.as_slice()) {
        Ok(trailer) if trailer.epoch == header.epoch && trailer.segment == header.segment => trailer,
        _ => return Ok(None),
    };
    let start = u64::from(trailer.footer_page) * PAGE_BYTES as u64;
    if start.checked_add(trailer.footer_bytes).is_none_or(|end| end > last) {
        return Err("it lies outside the segment".into());
    }
    let len = usize::try_from(trailer.footer_bytes).map_err(|e| e.to_string())?;
    let footer = medium.read_pages(file, start, len).map_err(|e| e.to_string())?;
    decode_footer(&trailer, footer.as_slice()).map(Some).map_err(|e| e.to_string())
}

/// Goes from record to record until one is not whole.
fn hop(medium: &Medium, file: &File, header: &SegmentHeader, hops: &mut u32, notes: &mut Vec<String>) -> Content {
    let pages = header.bytes / PAGE_BYTES as u64;
    let (mut at, mut footer_bytes, mut entries) = (1, 0, Vec::new());
    let why = loop {
        if at + 1 >= pages {
            break None;
        }
        let record = match next_record(medium, file, header, page_number(at)) {
            Ok(Some(record)) => record,
            Ok(None) => break None,
            Err(why) => break Some(why),
        };
        if entries.is_empty() {
            if *hops == 0 {
                break Some("too many segments without a footer".into());
            }
            *hops -= 1;
        }
        footer_bytes += entry_bytes(&record) as u64;
        let next = at + record_pages(record.bytes);
        if next + tail_pages(footer_bytes) > pages {
            break Some("it leaves no room for a footer".into());
        }
        if let Err(why) = check_payload(medium, file, at, &record) {
            break Some(why);
        }
        entries.push((page_number(at), record));
        at = next;
    };
    let found = entries.len();
    if let Some(why) = why {
        notes.push(format!("segment {}: cut at page {at} after {found} records: {why}", header.segment));
    } else if found > 0 {
        notes.push(format!("segment {}: was not sealed, {found} records found by reading it", header.segment));
    }
    if entries.is_empty() { Content::Empty } else { Content::Hopped(*header, entries) }
}

/// The header at page `at`, `None` where this life's records end.
fn next_record(medium: &Medium, file: &File, header: &SegmentHeader, at: u32) -> Result<Option<RecordMeta>, String> {
    let offset = u64::from(at) * PAGE_BYTES as u64;
    let page = medium.read_pages(file, offset, PAGE_BYTES).map_err(|e| e.to_string())?;
    if page.as_slice().iter().all(|&b| b == 0) {
        return Ok(None);
    }
    let record = RecordHeader::decode(page.as_slice()).map_err(|e| e.to_string())?;
    if record.epoch != header.epoch {
        return Ok(None);
    }
    if record.offset != at {
        return Err("a record of another place".into());
    }
    if u64::from(at) + record_pages(record.meta.bytes) >= header.bytes / PAGE_BYTES as u64 {
        return Err("a record longer than its segment".into());
    }
    Ok(Some(record.meta))
}

fn check_payload(medium: &Medium, file: &File, at: u64, meta: &RecordMeta) -> Result<(), String> {
    let mut checksum = kvtier_memory::checksum::Checksum::new();
    let (mut offset, mut left) = ((at + 1) * PAGE_BYTES as u64, meta.bytes);
    while left > 0 {
        let len = usize::try_from(left).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let chunk = medium.read_pages(file, offset, len).map_err(|e| e.to_string())?;
        checksum.update(chunk.as_slice());
        offset += len as u64;
        left -= len as u64;
    }
    if checksum.value() == meta.checksum { Ok(()) } else { Err("its payload is not whole".into()) }
}

fn seal(medium: &Medium, file: &Arc<File>, header: &SegmentHeader, entries: &[Entry]) -> Result<(), StorageError> {
    let tail = encode_tail(header, entries);
    let offset = header.bytes - tail.len() as u64;
    let written = medium.write_pages(file, offset, &tail);
    written.map_err(|e| io_error("write the footer of", &medium.path(header.segment), e))
}
