use super::{Extent, ExtentFds, MappedExtent, PageKind, sealed_memfd};
use crate::MemoryError;
use crate::generations::table_bytes;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_get_seals, ftruncate, memfd_create};
use std::os::fd::AsFd;

#[test]
fn an_extent_is_sealed_and_says_what_pages_it_got() {
    for best in [PageKind::Huge, PageKind::Transparent, PageKind::Plain] {
        let extent = Extent::create(4 << 20, best).unwrap();
        assert!(extent.page_kind() >= best, "{best} asked, {} given", extent.page_kind());
        assert_eq!(extent.len(), 4 << 20);
        for fd in [&extent.fd, extent.table.fd()] {
            let seals = fcntl_get_seals(fd).unwrap();
            assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL), "{seals:?}");
            assert!(ftruncate(fd, 4096).is_err());
        }
    }
    for bytes in [0, 1, 4095, 4097] {
        assert!(matches!(Extent::create(bytes, PageKind::Plain), Err(MemoryError::BadSize { .. })));
    }
}

#[test]
fn engines_see_bytes_and_generations_and_write_only_where_granted() {
    let extent = Extent::create(1 << 20, PageKind::Plain).unwrap();
    let writable = MappedExtent::new(extent.fds(true).unwrap(), extent.len(), true).unwrap();
    let readable = MappedExtent::new(extent.fds(false).unwrap(), extent.len(), false).unwrap();
    writable.populate().unwrap();
    readable.populate_range(4096, u64::MAX).unwrap();
    extent.set_generation(8192, 77);
    assert_eq!((writable.generation(8192), readable.generation(8192), readable.generation(4096)), (77, 77, 0));
    assert_eq!((readable.generation(8193), readable.generation(1 << 20), readable.generation(u64::MAX)), (0, 0, 0));

    let view = |at: *const u8, len| crate::buffer::Span::of_slot(at.cast_mut(), len, len);
    let range = writable.range_mut(8192, 5).unwrap();
    view(range, 5).write(0, b"hello");
    let mut seen = [0; 5];
    view(readable.range(8192, 5).unwrap(), 5).read(0, &mut seen);
    assert_eq!(&seen, b"hello");
    assert!(matches!(readable.range_mut(0, 1), Err(MemoryError::ReadOnly)));
    for (offset, bytes) in [(0, (1 << 20) + 1), (1 << 20, 1), (u64::MAX, 2)] {
        assert!(matches!(readable.range(offset, bytes), Err(MemoryError::OutOfBounds { .. })), "{offset} {bytes}");
    }
}

#[test]
fn a_read_only_descriptor_cannot_be_mapped_writable() {
    let extent = Extent::create(64 << 10, PageKind::Plain).unwrap();
    let refused = MappedExtent::new(extent.fds(false).unwrap(), extent.len(), true);
    assert!(matches!(refused, Err(MemoryError::System { call: "mmap", .. })), "{refused:?}");
    // The table cannot be, even through the owner's own descriptor.
    let table = crate::mapping::Mapping::shared(extent.table.fd().as_fd(), 4096, true);
    assert!(matches!(table, Err(MemoryError::System { call: "mmap", .. })), "{table:?}");
}

#[test]
fn descriptors_that_could_kill_the_reader_are_refused() {
    let bytes = 64 << 10;
    let table = || sealed_memfd("table", table_bytes(bytes), MemfdFlags::empty()).unwrap();
    let unsealed = memfd_create("unsealed", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&unsealed, bytes).unwrap();
    let short = sealed_memfd("short", bytes - 4096, MemfdFlags::empty()).unwrap();
    let file = tempfile_of(bytes);
    for (name, fd) in [("unsealed", unsealed), ("short", short), ("file", file)] {
        let refused = MappedExtent::new(ExtentFds { extent: fd, generations: table() }, bytes, true);
        assert!(matches!(refused, Err(MemoryError::BadDescriptor { .. })), "{name}: {refused:?}");
    }
    let good = || sealed_memfd("good", bytes, MemfdFlags::empty()).unwrap();
    let short_table = sealed_memfd("table", 0, MemfdFlags::empty()).unwrap();
    let refused = MappedExtent::new(ExtentFds { extent: good(), generations: short_table }, bytes, true);
    assert!(matches!(refused, Err(MemoryError::BadDescriptor { .. })));
    for length in [0, 4097, u64::MAX] {
        let refused = MappedExtent::new(ExtentFds { extent: good(), generations: table() }, length, true);
        assert!(matches!(refused, Err(MemoryError::BadDescriptor { .. })), "{length}: {refused:?}");
    }
}

/// A file on disk, which has no seals.
fn tempfile_of(bytes: u64) -> std::os::fd::OwnedFd {
    let path = std::env::temp_dir().join(format!("kvtier-memory-{}", std::process::id()));
    let file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(bytes).unwrap();
    file.into()
}

#[test]
fn a_dropped_extent_revokes_its_frames_where_it_is_still_mapped() {
    let extent = Extent::create(64 << 10, PageKind::Plain).unwrap();
    let mapped = MappedExtent::new(extent.fds(false).unwrap(), extent.len(), false).unwrap();
    crate::buffer::Span::of_slot(extent.base(), 4096, 4096).fill(0, 4096, 0xab);
    extent.set_generation(0, 5);
    let span = crate::buffer::Span::of_slot(mapped.base().cast_mut(), 4096, 4096);
    assert_eq!(span.checksum(crate::checksum::EMPTY, 0, 4096), crate::checksum::checksum(&[0xab; 4096]));
    drop(extent);
    assert_eq!(mapped.generation(0), 0);
    assert_eq!(
        span.checksum(crate::checksum::EMPTY, 0, 4096),
        crate::checksum::checksum(&[0; 4096]),
        "its pages were given back"
    );
}

#[test]
fn page_kinds_have_names() {
    for kind in [PageKind::Huge, PageKind::Transparent, PageKind::Plain] {
        assert_eq!(kind.to_string().parse::<PageKind>().unwrap(), kind);
    }
    assert!("enormous".parse::<PageKind>().is_err());
}
