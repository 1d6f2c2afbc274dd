//! Descriptors and mappings are given back. In a process of its own, because it counts all of the process's.

use std::fs::{read_dir, read_to_string};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kvtier_memory::fdpass::{Access, FdClient, Grant, Request, serve_one};
use kvtier_memory::{Arena, ArenaConfig, PageKind};

/// Open descriptors, and mappings of extents and tables.
fn held() -> (usize, usize) {
    let maps = read_to_string("/proc/self/maps").expect("procfs");
    let mapped = maps.lines().filter(|line| line.contains("memfd:kvtier-")).count();
    (read_dir("/proc/self/fd").expect("procfs").count(), mapped)
}

#[test]
fn nothing_is_left_of_dropped_extents() {
    let before = held();
    {
        let (capacity_bytes, extent_bytes) = (4 << 20, 1 << 20);
        let config = ArenaConfig { capacity_bytes, extent_bytes, page_kind: PageKind::Plain, first_generation: 1 };
        let arena = Arena::new(config).expect("sizes are fine");
        assert!(arena.grow().expect("1 MiB is to be had"));
        assert_eq!(held(), (before.0 + 2, before.1 + 2));
        let frame = arena.alloc(4096).granted().expect("an empty arena has room");
        let (client, server) = UnixStream::pair().expect("a socket pair");
        let mapped = std::thread::scope(|scope| {
            let extent = arena.extent(frame.extent).expect("it has a frame");
            scope.spawn(move || serve_one(&server, |_| Ok(Grant::Host(extent))).expect("a good request"));
            let request = Request { attachment: [1; 16], extent: frame.extent, access: Access::Writable };
            FdClient::connected(client).map(&request, Duration::from_secs(20)).expect("granted")
        });
        assert_eq!(held(), (before.0 + 2, before.1 + 4), "a mapping keeps no descriptor");
        assert!(arena.free(frame));
        assert_eq!(arena.shrink(), 1 << 20);
        assert_eq!(held(), (before.0, before.1 + 2));
        drop(mapped);
    }
    assert_eq!(held(), before);
}
