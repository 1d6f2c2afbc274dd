//! Extents: sealed memfds with their generation tables, as the daemon creates them and as an engine maps them.
//!
//! ```text
//! extent memfd       | frame        | frame        | ...          (writable for engines that reserve in it)
//! generation memfd   | u64 | u64 | u64 | ...                      one per 4 KiB of the extent, written by the daemon only
//! ```
//! *Invariants*: both are sealed against resizing before anybody else sees them; every page of an extent exists before
//! the first frame in it is granted; the table is sealed against new writable mappings once the daemon has its own.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::str::FromStr;

use rustix::fs::{FallocateFlags, MemfdFlags, OFlags, SealFlags, fallocate, fcntl_add_seals};
use rustix::io::Errno;

use self::populated::Populated;
use crate::generations::{GenerationTable, MappedGenerations, check_descriptor, reopen, sealed_memfd};
use crate::mapping::Mapping;
use crate::slab::Slots;
use crate::{MemoryError, NO_GENERATION, PAGE_BYTES, size};

mod populated;

/// Bytes of a huge page that extents ask for.
const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// Where the kernel says whether a shared mapping can have transparent huge pages.
const SHMEM_POLICY: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// What pages back an extent, from the fastest to the most available.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageKind {
    /// Reserved 2 MiB pages (`vm.nr_hugepages`).
    Huge,
    /// 4 KiB pages that the kernel may join (`MADV_HUGEPAGE`).
    Transparent,
    /// 4 KiB pages.
    Plain,
}

/// The text names no page kind.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no page kind: huge, transparent or plain")]
pub struct UnknownPageKind(String);

impl FromStr for PageKind {
    type Err = UnknownPageKind;

    fn from_str(text: &str) -> Result<Self, UnknownPageKind> {
        match text {
            "huge" => Ok(Self::Huge),
            "transparent" => Ok(Self::Transparent),
            "plain" => Ok(Self::Plain),
            _ => Err(UnknownPageKind(text.to_owned())),
        }
    }
}

impl fmt::Display for PageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Huge => "huge",
            Self::Transparent => "transparent",
            Self::Plain => "plain",
        })
    }
}

/// An extent as its owner, the daemon, has it: mapped writable, with the table it writes.
#[derive(Debug)]
pub struct Extent {
    fd: OwnedFd,
    memory: Mapping,
    table: GenerationTable,
    kind: PageKind,
}

impl Extent {
    /// Creates an extent of `bytes` (a positive multiple of 4 KiB) with every page present, with pages of kind `best` or,
    /// where those are not to be had, the next kind; [`Extent::page_kind`] says which. Takes about a second per GiB.
    ///
    /// # Errors
    /// [`MemoryError::BadSize`], or [`MemoryError::System`] when memory or descriptors ran out.
    pub fn create(bytes: u64, best: PageKind) -> Result<Self, MemoryError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::BadSize { what: "an extent", bytes, rule: "must be a positive multiple of 4096" });
        }
        let (fd, memory, kind) = match huge_memory(bytes, best) {
            Some((fd, memory)) => (fd, memory, PageKind::Huge),
            None => shmem_memory(bytes, best)?,
        };
        Ok(Self { fd, memory, table: GenerationTable::create(bytes)?, kind })
    }

    /// Start of the extent in this process.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.memory.base()
    }

    /// Bytes of the extent.
    #[expect(clippy::len_without_is_empty, reason = "an extent is never empty")]
    #[must_use]
    pub fn len(&self) -> u64 {
        self.memory.len() as u64
    }

    /// The pages it got.
    #[must_use]
    pub fn page_kind(&self) -> PageKind {
        self.kind
    }

    /// Pointer to a range of the extent.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn range(&self, offset: u64, bytes: u64) -> Result<*mut u8, MemoryError> {
        self.memory.range(offset, bytes)
    }

    /// Generation of the frame that starts at `offset`; 0 if none does.
    #[must_use]
    pub fn generation(&self, offset: u64) -> u64 {
        self.table.generation(offset)
    }

    /// Revokes every frame, and says that none will be granted any more: engines let go of it once they see that.
    pub fn retire(&self) {
        self.table.retire();
    }

    /// Gives the pages back, even where an engine still maps them; whoever reads them finds zeros. For an extent that was
    /// retired. Huge pages stay until the last mapping goes: an engine that touched a hole in them could be killed.
    pub fn give_back(&self) {
        if self.kind != PageKind::Huge {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Best effort: where it fails, the pages go with the last mapping.
            let _unpunched = fallocate(&self.fd, hole, 0, self.len());
        }
    }

    /// Publishes (or with 0 revokes) the frame at `offset`.
    pub(crate) fn set_generation(&self, offset: u64, generation: u64) {
        self.table.set(offset, generation);
    }

    /// Descriptors for another process: the extent's as `writable` says, the table's always read-only.
    ///
    /// # Errors
    /// [`MemoryError::System`] when descriptors ran out or /proc is not mounted.
    pub fn fds(&self, writable: bool) -> Result<ExtentFds, MemoryError> {
        let extent = reopen(&self.fd, if writable { OFlags::RDWR } else { OFlags::RDONLY })?;
        let generations = self.table.descriptor()?;
        Ok(ExtentFds { extent, generations })
    }
}

impl Slots for Extent {
    fn bytes(&self) -> u64 {
        self.len()
    }

    fn granted(&self, offset: u64, generation: u64) {
        self.set_generation(offset, generation);
    }

    fn revoked(&self, offset: u64) {
        self.set_generation(offset, NO_GENERATION);
    }
}

impl Drop for Extent {
    /// Revokes every frame, then gives the pages back.
    fn drop(&mut self) {
        self.retire();
        self.give_back();
    }
}

/// The two descriptors of an extent, as sent to an engine.
#[derive(Debug)]
pub struct ExtentFds {
    /// The extent.
    pub extent: OwnedFd,
    /// Its generation table.
    pub generations: OwnedFd,
}

/// An extent as an engine has it: mapped as granted, with the table read-only.
#[derive(Debug)]
pub struct MappedExtent {
    memory: Mapping,
    table: MappedGenerations,
    populated: Populated,
}

impl MappedExtent {
    /// Maps `bytes` of a received extent. The descriptors are closed; the mapping keeps the memory.
    ///
    /// # Errors
    /// [`MemoryError::BadDescriptor`] if a descriptor is shorter than it should be or not sealed against shrinking (an
    /// access could then kill this process), [`MemoryError::System`] if it cannot be mapped (a read-only one writable).
    pub fn new(fds: ExtentFds, bytes: u64, writable: bool) -> Result<Self, MemoryError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::BadDescriptor { reason: "the extent's length is no positive multiple of 4096" });
        }
        check_descriptor(&fds.extent, bytes)?;
        let memory = Mapping::shared(fds.extent.as_fd(), size(bytes), writable)?;
        let table = MappedGenerations::new(&fds.generations, bytes)?;
        Ok(Self { memory, table, populated: Populated::none_of(bytes) })
    }

    /// Start of the extent in this process; not writable unless [`MappedExtent::writable`].
    #[must_use]
    pub fn base(&self) -> *const u8 {
        self.memory.base()
    }

    /// Bytes of the extent.
    #[expect(clippy::len_without_is_empty, reason = "an extent is never empty")]
    #[must_use]
    pub fn len(&self) -> u64 {
        self.memory.len() as u64
    }

    /// Whether it is mapped writable.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.memory.writable()
    }

    /// Pointer for reading a range.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`].
    pub fn range(&self, offset: u64, bytes: u64) -> Result<*const u8, MemoryError> {
        self.memory.range(offset, bytes).map(<*mut u8>::cast_const)
    }

    /// Pointer for writing a range.
    ///
    /// # Errors
    /// [`MemoryError::OutOfBounds`], [`MemoryError::ReadOnly`].
    pub fn range_mut(&self, offset: u64, bytes: u64) -> Result<*mut u8, MemoryError> {
        if !self.writable() {
            return Err(MemoryError::ReadOnly);
        }
        self.memory.range(offset, bytes)
    }

    /// Generation of the frame that starts at `offset`; 0 if none does. A copy out of a frame counts only if this was the
    /// frame's generation before and after it.
    #[must_use]
    pub fn generation(&self, offset: u64) -> u64 {
        self.table.generation(offset)
    }

    /// Whether its owner gave it up: no frame of it will be granted any more.
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.table.is_retired()
    }

    /// Maps all pages now, so that the first copies do not fault page by page. A failure only costs those faults.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn populate(&self) -> Result<(), MemoryError> {
        self.populate_range(0, self.len())
    }

    /// Maps the pages of a range now, unless that was done before; what lies beyond the extent is ignored.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn populate_range(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        if self.populated.has(offset, bytes) {
            return Ok(());
        }
        match self.memory.populate(size(offset), size(bytes)) {
            Err(Errno::INVAL) => self.memory.touch(size(offset), size(bytes), false),
            other => other.map_err(MemoryError::system("madvise(MADV_POPULATE)"))?,
        }
        self.populated.add(offset, bytes);
        Ok(())
    }
}

/// Memory of reserved huge pages, if `best` asks for them and all can be had. Mapping reserves them and populating takes
/// them, both with an error and never a signal; kernels that cannot populate do not get huge pages.
fn huge_memory(bytes: u64, best: PageKind) -> Option<(OwnedFd, Mapping)> {
    if best != PageKind::Huge || !bytes.is_multiple_of(HUGE_PAGE_BYTES) {
        return None;
    }
    let fd = sealed_memfd("kvtier-extent-huge", bytes, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).ok()?;
    fcntl_add_seals(&fd, SealFlags::SEAL).ok()?;
    let memory = Mapping::shared(fd.as_fd(), size(bytes), true).ok()?;
    memory.populate(0, size(bytes)).ok()?;
    Some((fd, memory))
}

fn shmem_memory(bytes: u64, best: PageKind) -> Result<(OwnedFd, Mapping, PageKind), MemoryError> {
    let fd = sealed_memfd("kvtier-extent", bytes, MemfdFlags::empty())?;
    fcntl_add_seals(&fd, SealFlags::SEAL).map_err(MemoryError::system("fcntl(F_ADD_SEALS)"))?;
    let memory = Mapping::shared(fd.as_fd(), size(bytes), true)?;
    let transparent = best <= PageKind::Transparent && shmem_can_be_huge() && memory.advise_huge().is_ok();
    match memory.populate(0, size(bytes)) {
        Err(Errno::INVAL) => memory.touch(0, size(bytes), true),
        other => other.map_err(MemoryError::system("madvise(MADV_POPULATE_WRITE)"))?,
    }
    Ok((fd, memory, if transparent { PageKind::Transparent } else { PageKind::Plain }))
}

/// The kernel's policy for shared memory marks its choice with brackets, as in `always [advise] never`.
fn shmem_can_be_huge() -> bool {
    std::fs::read_to_string(SHMEM_POLICY).is_ok_and(|policy| !policy.contains("[never]") && !policy.contains("[deny]"))
}

#[cfg(test)]
mod tests;
