use super::{ANSWER_BYTES, Access, FdClient, FdStatus, Grant, Request, Served, serve_one};
use crate::{Extent, MemoryError, PageKind};
use proptest::{collection::vec, prelude::any, proptest};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(20);

fn request(extent: u32, access: Access) -> Request {
    Request { attachment: [7; 16], extent, access }
}

/// Serves extent 1 to attachment 7 until the client hangs up; returns what happened.
fn serve(stream: &UnixStream, extent: &Arc<Extent>) -> Vec<Served> {
    let mut all = Vec::new();
    loop {
        let served = serve_one(stream, |request| match request {
            Request { attachment, .. } if *attachment != [7; 16] => Err(FdStatus::UnknownAttachment),
            Request { extent: 1, .. } => Ok(Grant::Host(Arc::clone(extent))),
            Request { extent: 2, .. } => Err(FdStatus::Denied),
            _ => Err(FdStatus::UnknownExtent),
        });
        let served = served.unwrap();
        all.push(served);
        if matches!(served, Served::HungUp | Served::Hostile) {
            return all;
        }
    }
}

#[test]
fn extents_pass_over_a_socket_and_share_memory() {
    let extent = Arc::new(Extent::create(256 << 10, PageKind::Plain).unwrap());
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(&theirs, &extent));
        let mut client = FdClient::connected(ours);
        let writable = client.map(&request(1, Access::Writable), SOON).unwrap();
        let readable = client.map(&request(1, Access::ReadOnly), SOON).unwrap();
        assert!(writable.writable() && !readable.writable());
        assert_eq!(readable.len(), 256 << 10);
        extent.set_generation(4096, 9);
        assert_eq!(readable.generation(4096), 9);
        let range = writable.range_mut(4096, 3).unwrap();
        crate::buffer::Span::of_slot(range, 3, 3).write(0, b"kv!");
        let mut seen = [0; 3];
        crate::buffer::Span::of_slot(extent.range(4096, 3).unwrap(), 3, 3).read(0, &mut seen);
        assert_eq!(&seen, b"kv!");
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let at = format!("{:x}-", readable.base().addr());
        let line = maps.lines().find(|line| line.contains(&at)).unwrap();
        assert!(line.contains(" r--s "), "{line}");

        for (extent, status) in [(2, FdStatus::Denied), (3, FdStatus::UnknownExtent)] {
            let refused = client.request(&request(extent, Access::ReadOnly), SOON).unwrap_err();
            assert!(matches!(refused, MemoryError::Refused { status: s } if s == status), "{refused}");
        }
        let stranger = Request { attachment: [8; 16], ..request(1, Access::ReadOnly) };
        let refused = client.request(&stranger, SOON).unwrap_err();
        assert!(matches!(refused, MemoryError::Refused { status: FdStatus::UnknownAttachment }), "{refused}");
        drop(client);
        let served = server.join().unwrap();
        assert!(matches!(served[..], [Served::Granted(_), Served::Granted(_), .., Served::HungUp]), "{served:?}");
    });
}

#[test]
fn a_hostile_client_gets_a_status() {
    let extent = Arc::new(Extent::create(4096, PageKind::Plain).unwrap());
    let good = request(1, Access::ReadOnly).encode();
    let with = |at: usize, byte: u8| {
        let mut bytes = good;
        bytes[at] = byte;
        bytes.to_vec()
    };
    let cases = [
        ("short", good[..31].to_vec()),
        ("magic", with(0, 0)),
        ("version", with(4, 2)),
        ("access", with(28, 2)),
        ("noise", vec![0xff; 32]),
    ];
    for (name, bytes) in cases {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&bytes).unwrap();
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(serve(&theirs, &extent), [Served::Hostile], "{name}");
        drop(theirs);
        let mut answer = Vec::new();
        ours.read_to_end(&mut answer).unwrap();
        assert_eq!((answer.len(), answer[0]), (ANSWER_BYTES, 4), "{name}");
    }
}

#[test]
fn a_silent_server_costs_the_deadline_and_a_hostile_one_is_refused() {
    let (ours, _silent) = UnixStream::pair().unwrap();
    let start = Instant::now();
    let late = FdClient::connected(ours).request(&request(1, Access::ReadOnly), Duration::from_millis(30)).unwrap_err();
    assert!(matches!(late, MemoryError::System { .. }), "{late}");
    assert!(start.elapsed() < Duration::from_secs(10));

    let answer = |status: u8, shift: u8| {
        let mut bytes = [0; ANSWER_BYTES];
        (bytes[0], bytes[4], bytes[9]) = (status, shift, 16);
        bytes
    };
    for (name, bytes) in [
        ("no descriptors", answer(0, 12).to_vec()),
        ("unknown status", answer(9, 12).to_vec()),
        ("other slots", answer(0, 13).to_vec()),
        ("cut", answer(0, 12)[..7].to_vec()),
        ("nothing", Vec::new()),
    ] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&bytes).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let refused = FdClient::connected(ours).map(&request(1, Access::ReadOnly), SOON).unwrap_err();
        assert!(matches!(refused, MemoryError::Protocol { .. }), "{name}: {refused}");
    }
}

#[test]
fn a_client_reconnects_after_a_failure() {
    let path = std::env::temp_dir().join(format!("kvtier-fd-{}.sock", std::process::id()));
    let mut client = FdClient::new(&path);
    let away = client.request(&request(1, Access::ReadOnly), SOON).unwrap_err();
    assert!(matches!(away, MemoryError::System { call: "connect", .. }), "{away}");
    let listener = UnixListener::bind(&path).unwrap();
    let extent = Arc::new(Extent::create(4096, PageKind::Plain).unwrap());
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            drop(listener.accept().unwrap());
            serve(&listener.accept().unwrap().0, &extent)
        });
        assert!(client.request(&request(1, Access::ReadOnly), SOON).is_err(), "the first connection is hung up");
        assert!(client.map(&request(1, Access::ReadOnly), SOON).is_ok());
        drop(client);
        assert_eq!(server.join().unwrap().len(), 2);
    });
    std::fs::remove_file(path).unwrap();
}

proptest! {
    #[test]
    fn decoding_never_panics_and_inverts_encoding(bytes in vec(any::<u8>(), 0..64), extent in any::<u32>()) {
        if let Ok(request) = Request::decode(&bytes) {
            assert_eq!(request.encode().to_vec(), bytes);
        }
        let request = request(extent, Access::Writable);
        assert_eq!(Request::decode(&request.encode()), Ok(request));
    }
}
