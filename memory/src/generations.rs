//! Generation tables: a number for each 4 KiB of an extent, written by the daemon and read by engines. What they are about
//! may be host memory or a device's; the tables themselves are host memory.
//!
//! *Invariants*: a table is sealed against resizing before anybody else sees it, and against new writable mappings once the
//! daemon has its own.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{
    MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create, open,
};
use rustix::io::Errno;

use crate::mapping::Mapping;
use crate::{MemoryError, NO_GENERATION, PAGE_BYTES, SLOT_SHIFT, size};

/// What an extent, or a table, must be sealed against before it is shared or mapped.
const SIZE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// In the first place of a table: its extent was given up. No frame has this generation.
const RETIRED: u64 = u64::MAX;

/// A table as its owner, the daemon, has it.
#[derive(Debug)]
pub struct GenerationTable {
    fd: OwnedFd,
    table: Mapping,
}

impl GenerationTable {
    /// A table for an extent of so many bytes, in which no frame starts.
    ///
    /// # Errors
    /// [`MemoryError::System`] when memory or descriptors ran out.
    pub fn create(extent_bytes: u64) -> Result<Self, MemoryError> {
        let bytes = table_bytes(extent_bytes);
        let fd = sealed_memfd("kvtier-generations", bytes, MemfdFlags::empty())?;
        let table = Mapping::shared(fd.as_fd(), size(bytes), true)?;
        match table.populate(0, size(bytes)) {
            Err(Errno::INVAL) => table.touch(0, size(bytes), true),
            other => other.map_err(MemoryError::system("madvise(MADV_POPULATE_WRITE)"))?,
        }
        // F_SEAL_FUTURE_WRITE (Linux 5.1) bars later writable mappings.
        match fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE | SealFlags::SEAL) {
            Err(Errno::INVAL) => fcntl_add_seals(&fd, SealFlags::SEAL),
            other => other,
        }
        .map_err(MemoryError::system("fcntl(F_ADD_SEALS)"))?;
        Ok(Self { fd, table })
    }

    /// Generation of the frame that starts at `offset`; 0 if none does.
    #[must_use]
    pub fn generation(&self, offset: u64) -> u64 {
        generation(&self.table, offset)
    }

    /// Publishes (or with 0 revokes) the frame at `offset`, a multiple of 4096 in the extent.
    pub fn set(&self, offset: u64, generation: u64) {
        self.table.set_word(offset >> SLOT_SHIFT, generation);
    }

    /// Revokes every frame, and says that none will be granted any more: whoever maps the extent lets it go.
    pub fn retire(&self) {
        self.clear();
        self.table.set_word(0, RETIRED);
    }

    /// Revokes every frame.
    pub fn clear(&self) {
        for slot in 0..self.table.len() as u64 / 8 {
            if self.table.word(slot) != Some(NO_GENERATION) {
                self.table.set_word(slot, NO_GENERATION);
            }
        }
    }

    #[cfg(test)]
    pub(crate) const fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// A read-only descriptor for another process.
    ///
    /// # Errors
    /// [`MemoryError::System`] when descriptors ran out or /proc is not mounted.
    pub fn descriptor(&self) -> Result<OwnedFd, MemoryError> {
        reopen(&self.fd, OFlags::RDONLY)
    }
}

/// A table as an engine has it: read-only.
#[derive(Debug)]
pub struct MappedGenerations(Mapping);

impl MappedGenerations {
    /// Maps the received table of an extent of so many bytes. The descriptor is closed; the mapping keeps the memory.
    ///
    /// # Errors
    /// [`MemoryError::BadDescriptor`] if it is shorter than it should be or not sealed against shrinking,
    /// [`MemoryError::System`].
    pub fn new(table: &OwnedFd, extent_bytes: u64) -> Result<Self, MemoryError> {
        check_descriptor(table, table_bytes(extent_bytes))?;
        Ok(Self(Mapping::shared(table.as_fd(), size(table_bytes(extent_bytes)), false)?))
    }

    /// Generation of the frame that starts at `offset`; 0 if none does. A copy out of a frame counts only if this was the
    /// frame's generation before and after it.
    #[must_use]
    pub fn generation(&self, offset: u64) -> u64 {
        generation(&self.0, offset)
    }

    /// Whether no frame of the extent will be granted any more.
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.0.word(0) == Some(RETIRED)
    }
}

/// Bytes of the generation table of an extent, whole pages.
pub(crate) fn table_bytes(extent_bytes: u64) -> u64 {
    ((extent_bytes >> SLOT_SHIFT) * 8).max(1).next_multiple_of(PAGE_BYTES)
}

fn generation(table: &Mapping, offset: u64) -> u64 {
    if offset.is_multiple_of(PAGE_BYTES) {
        table.word(offset >> SLOT_SHIFT).filter(|word| *word != RETIRED).unwrap_or(NO_GENERATION)
    } else {
        NO_GENERATION
    }
}

/// A memfd of `bytes` that can never be resized.
pub(crate) fn sealed_memfd(name: &str, bytes: u64, extra: MemfdFlags) -> Result<OwnedFd, MemoryError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | extra;
    let fd = memfd_create(name, flags).map_err(MemoryError::system("memfd_create"))?;
    ftruncate(&fd, bytes).map_err(MemoryError::system("ftruncate"))?;
    fcntl_add_seals(&fd, SIZE_SEALS).map_err(MemoryError::system("fcntl(F_ADD_SEALS)"))?;
    Ok(fd)
}

/// A second open file of the same memory with rights of its own.
pub(crate) fn reopen(fd: &OwnedFd, access: OFlags) -> Result<OwnedFd, MemoryError> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    open(path, access | OFlags::CLOEXEC, Mode::empty()).map_err(MemoryError::system("open(/proc/self/fd)"))
}

/// Checks that memory behind a received descriptor cannot vanish, and is long enough.
pub(crate) fn check_descriptor(fd: &OwnedFd, bytes: u64) -> Result<(), MemoryError> {
    let seals = fcntl_get_seals(fd).map_err(|_| MemoryError::BadDescriptor { reason: "cannot be sealed" })?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err(MemoryError::BadDescriptor { reason: "not sealed against shrinking" });
    }
    let stat = fstat(fd).map_err(MemoryError::system("fstat"))?;
    if u64::try_from(stat.st_size).map_or(true, |have| have < bytes) {
        return Err(MemoryError::BadDescriptor { reason: "shorter than the extent" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_owner_publishes_is_seen_and_revoked() {
        let table = GenerationTable::create(1 << 20).unwrap();
        let mapped = MappedGenerations::new(&table.descriptor().unwrap(), 1 << 20).unwrap();
        table.set(8192, 7);
        assert_eq!((mapped.generation(8192), mapped.generation(4096), mapped.generation(1)), (7, 0, 0));
        assert_eq!(mapped.generation(1 << 40), NO_GENERATION);
        assert!(!mapped.is_retired());
        table.retire();
        assert_eq!((mapped.generation(8192), table.generation(8192)), (0, 0));
        assert!(mapped.is_retired());
    }

    #[test]
    fn a_short_table_and_foreign_files_are_refused() {
        let table = GenerationTable::create(1 << 20).unwrap();
        assert!(MappedGenerations::new(&table.descriptor().unwrap(), 1 << 30).is_err());
        let null = std::fs::File::open("/dev/null").unwrap().into();
        assert!(MappedGenerations::new(&null, 4096).is_err());
    }
}
