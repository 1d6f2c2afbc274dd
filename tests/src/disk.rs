//! Hurting what lies on disk, between a kill and a restart.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Unit of everything in a log segment.
pub const PAGE: u64 = 4096;
/// Bytes compared to find something.
const NEEDLE: usize = 32;

/// A place in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// The byte.
    pub offset: u64,
}

impl Place {
    /// Flips one bit of the byte `at` bytes further on.
    ///
    /// # Panics
    /// When the file cannot be read or written.
    pub fn flip(&self, at: u64) {
        let file = OpenOptions::new().read(true).write(true).open(&self.path).expect("the file is there");
        let mut byte = [0];
        file.read_exact_at(&mut byte, self.offset + at).expect("the byte is there");
        byte[0] ^= 0x20;
        file.write_all_at(&byte, self.offset + at).expect("the byte can be written");
        file.sync_all().expect("synced");
    }
}

/// Regular files below a directory.
#[must_use]
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => todo.push(entry.path()),
                Ok(kind) if kind.is_file() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

/// Bytes that the files below a directory take, by their blocks on the device, as `du` counts.
#[must_use]
pub fn allocated_bytes(dir: &Path) -> u64 {
    files(dir).iter().filter_map(|path| path.metadata().ok()).map(|m| m.blocks() * 512).sum()
}

/// Where a payload starts, in any log segment below `dir`.
#[must_use]
pub fn find_payload(dir: &Path, payload: &[u8]) -> Vec<Place> {
    find(dir, &payload[..NEEDLE], PAGE)
}

/// Where `needle` lies in a file below `dir`, at multiples of `step`.
#[must_use]
pub fn find(dir: &Path, needle: &[u8], step: u64) -> Vec<Place> {
    let mut places = Vec::new();
    for path in files(dir) {
        let Ok(bytes) = std::fs::read(&path) else { continue };
        let step = usize::try_from(step).expect("a step in memory");
        let starts = (0..bytes.len().saturating_sub(needle.len())).step_by(step);
        for offset in starts.filter(|&at| bytes[at..].starts_with(needle)) {
            places.push(Place { path: path.clone(), offset: offset as u64 });
        }
    }
    places
}

/// Whether the last page of a log segment is a footer's trailer.
///
/// # Panics
/// When the file cannot be read.
#[must_use]
pub fn is_sealed(segment: &Path) -> bool {
    let file = File::open(segment).expect("the segment is there");
    let len = file.metadata().expect("its length").len();
    let mut magic = [0; 6];
    file.read_exact_at(&mut magic, len - PAGE).expect("a segment has pages");
    &magic == b"KVTFTR"
}
