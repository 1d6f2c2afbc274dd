//! The directory of a disk tier: its lock, its segment files, and blocking page I/O for headers and footers.
//!
//! *Invariants*: one process per directory (an exclusive `flock` on `lock`); a new segment file is allocated in full, and
//! its name durable, before anything is written to it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvtier_memory::AlignedBuf;
use rustix::fs::{FallocateFlags, fallocate};

use crate::disk::record::PAGE_BYTES;
use crate::disk::segment::file_name;
use crate::io::is_no_space;
use crate::store::{StorageError, io_error};

/// Locked by the process that has the directory open.
pub(crate) const LOCK_FILE: &str = "lock";
const PROBE_FILE: &str = "probe";

/// The directory, opened and locked.
#[derive(Debug)]
pub(crate) struct Medium {
    dir: PathBuf,
    segment_bytes: u64,
    direct: bool,
}

impl Medium {
    /// Finds out whether direct I/O works in `dir`, which is locked, if it is wanted. The note says when it does not.
    ///
    /// # Errors
    /// [`StorageError::Io`] when the directory cannot be written to.
    pub(crate) fn probe(
        dir: &Path,
        segment_bytes: u64,
        want_direct: bool,
    ) -> Result<(Self, Option<String>), StorageError> {
        let mut this = Self { dir: dir.to_owned(), segment_bytes, direct: want_direct };
        let path = dir.join(PROBE_FILE);
        let refused = match this.try_direct(&path) {
            Ok(()) => None,
            Err(error) if want_direct && error.kind() == io::ErrorKind::InvalidInput => {
                this.direct = false;
                this.try_direct(&path).map_err(|e| io_error("write", &path, e))?;
                Some(format!("{}: no direct I/O here, using the page cache", dir.display()))
            }
            // A full disk can still be read, and written to where it is allocated.
            Err(error) if is_no_space(&error) => None,
            Err(error) => return Err(io_error("write", &path, error)),
        };
        std::fs::remove_file(&path).map_err(|e| io_error("remove", &path, e))?;
        Ok((this, refused))
    }

    fn try_direct(&self, path: &Path) -> io::Result<()> {
        let file = self.options().create(true).truncate(true).open(path)?;
        file.write_all_at(AlignedBuf::zeroed(PAGE_BYTES).as_slice(), 0)
    }

    fn options(&self) -> OpenOptions {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        if self.direct {
            options.custom_flags(libc::O_DIRECT);
        }
        options
    }

    /// How files are opened, for logs.
    pub(crate) const fn describe(&self) -> &'static str {
        if self.direct { "direct I/O" } else { "buffered I/O" }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) const fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    pub(crate) fn path(&self, segment: u32) -> PathBuf {
        self.dir.join(file_name(segment))
    }

    /// An existing segment file.
    pub(crate) fn open(&self, segment: u32) -> Result<Arc<File>, StorageError> {
        let path = self.path(segment);
        self.options().open(&path).map(Arc::new).map_err(|e| io_error("open", &path, e))
    }

    /// A new segment file, allocated in full. Nothing is left behind when that fails.
    pub(crate) fn create(&self, segment: u32) -> Result<Arc<File>, StorageError> {
        let path = self.path(segment);
        let created = self.options().create(true).truncate(true).open(&path).and_then(|file| {
            self.allocate(&file)?;
            file.sync_all()?;
            File::open(&self.dir)?.sync_all()?;
            Ok(Arc::new(file))
        });
        created.map_err(|error| {
            // The file is of no use, and its space is what is missing; it may also never have come to be.
            let _absent = std::fs::remove_file(&path);
            io_error("allocate", &path, error)
        })
    }

    fn allocate(&self, file: &File) -> io::Result<()> {
        match fallocate(file, FallocateFlags::empty(), 0, self.segment_bytes) {
            Ok(()) => Ok(()),
            // File systems that cannot allocate ahead: the length still bounds the file, writes may find no space.
            Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(self.segment_bytes),
            Err(error) => Err(error.into()),
        }
    }

    /// Deletes a segment file.
    pub(crate) fn remove(&self, segment: u32) -> Result<(), StorageError> {
        let path = self.path(segment);
        std::fs::remove_file(&path).map_err(|e| io_error("remove", &path, e))
    }

    /// Writes whole pages and makes them durable.
    pub(crate) fn write_pages(&self, file: &File, offset: u64, pages: &[u8]) -> io::Result<()> {
        assert!(pages.len().is_multiple_of(PAGE_BYTES), "whole pages");
        file.write_all_at(AlignedBuf::from_slice(pages).as_slice(), offset)?;
        file.sync_data()
    }

    /// Reads `len` bytes from a page boundary on; the buffer is rounded up to whole pages.
    pub(crate) fn read_pages(&self, file: &File, offset: u64, len: usize) -> io::Result<AlignedBuf> {
        let mut buf = AlignedBuf::zeroed(len.next_multiple_of(PAGE_BYTES));
        file.read_exact_at(buf.as_mut_slice(), offset)?;
        buf.set_len(len);
        Ok(buf)
    }
}
