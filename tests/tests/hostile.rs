//! Nonsense on the sockets: the daemon refuses it, says why, and goes on serving.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use kvtier_memory::fdpass::{Access, FdClient, Request};
use kvtier_proto::v1::{self, Outcome};
use kvtier_proto::{PROTOCOL_VERSION, convert};
use kvtier_tests::shape::HASH_TOKENS;
use kvtier_tests::{Daemon, Engine, Prompt, Setup, Shape, daemon};
use kvtier_types::BlockKey;
use tonic::{Code, Status};

/// The request that a connector of the default shape makes.
fn attach_request() -> v1::AttachRequest {
    let spec = Shape::default().spec("/nowhere", "by hand", "scheduler", 0);
    v1::AttachRequest {
        protocol_version: PROTOCOL_VERSION,
        build_version: "test".into(),
        engine_id: "by hand".into(),
        role: v1::Role::Scheduler.into(),
        rank: 0,
        shard: 0,
        namespace: Some(v1::Namespace::from(&spec.namespace)),
        layout: Some(v1::Layout::from(&spec.layout)),
        pid: 1,
        devices: Vec::new(),
    }
}

fn keys(count: u32) -> Vec<BlockKey> {
    Shape::default().keys(0, &Prompt::new("by hand", count))
}

fn range(group: u32, first_block: u32, keys: &[BlockKey]) -> v1::BlockRange {
    v1::BlockRange { group, first_block, keys: convert::pack_keys(keys) }
}

fn lookup(ranges: Vec<v1::BlockRange>) -> v1::LookupRequest {
    v1::LookupRequest { request_id: "r".into(), ranges, deadline_ms: 100, ..v1::LookupRequest::default() }
}

fn reserve(range: v1::BlockRange) -> v1::ReserveRequest {
    v1::ReserveRequest { range: Some(range), ..v1::ReserveRequest::default() }
}

/// Refused with this code and a text that helps.
fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, text: &str) {
    let status = result.expect_err("nonsense is refused");
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(text), "{:?} does not say {text:?}", status.message());
}

fn still_serves(daemon: &Daemon, engine: &Engine, what: &str) {
    assert!(engine.is_attached(), "{what}: {:?}", engine.states());
    let prompt = Prompt::new(format!("after {what}"), 6);
    engine.put_all(&prompt);
    assert_eq!(engine.get(&prompt).whole(), Some(96), "{what}");
    assert_eq!(daemon.status().incarnation, 1);
}

#[test]
fn raw_garbage_on_both_sockets() {
    let daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::default());
    let noise: Vec<u8> = (0..1_u32 << 20).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let mut huge_frame = preface.clone();
    huge_frame.extend([0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01]);
    let cases: [&[u8]; 7] = [&[], &[0], &noise[..31], &noise[..33], &noise, &preface, &huge_frame];
    for socket in [daemon.socket(), daemon.fd_socket()] {
        for bytes in cases {
            throw(&socket, bytes);
        }
    }
    still_serves(&daemon, &engine, "garbage");
}

/// Sends bytes, hangs up halfway, and reads whatever comes until the other side is done.
fn throw(socket: &Path, bytes: &[u8]) {
    let mut stream = UnixStream::connect(socket).expect("the daemon listens");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket");
    // The daemon may hang up before all is sent.
    drop(stream.write_all(bytes));
    drop(stream.shutdown(std::net::Shutdown::Write));
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) => {
            assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "the daemon neither answers nor hangs up")
        }
    }
}

#[test]
fn descriptors_are_for_those_who_may_have_them() {
    let daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::default());
    engine.put_all(&Prompt::new("there is an extent", 4));
    let attached = daemon.control().attach(attach_request()).unwrap();
    let token: [u8; 16] = attached.said.attachment[..].try_into().unwrap();
    let mut client = FdClient::new(&daemon.fd_socket());
    let mut ask = |attachment, extent, access| {
        let asked = client.map(&Request { attachment, extent, access }, Duration::from_secs(10));
        asked.map(|mapped| mapped.writable()).map_err(|error| error.to_string())
    };
    assert_eq!(ask(token, 0, Access::ReadOnly), Ok(false));
    for (attachment, extent, access) in [
        ([7; 16], 0, Access::ReadOnly),
        (token, 0, Access::Writable),
        (token, 77, Access::ReadOnly),
        (token, u32::MAX, Access::Writable),
    ] {
        assert!(ask(attachment, extent, access).is_err(), "{attachment:?} {extent} {access:?}");
    }
    drop(attached);
    daemon.wait_status("the attachment to be gone", |status| status.attachments.len() == 2);
    assert!(ask(token, 0, Access::ReadOnly).is_err(), "a token ends with its stream");
    // A well-formed request of another version is answered, not ignored.
    let mut bytes = Request { attachment: token, extent: 0, access: Access::ReadOnly }.encode();
    bytes[4] = 9;
    let mut stream = UnixStream::connect(daemon.fd_socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(&bytes).unwrap();
    let mut answer = [0; 16];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[0], 4, "bad request");
    still_serves(&daemon, &engine, "descriptor requests");
}

#[test]
fn more_descriptor_connections_than_allowed() {
    let daemon = daemon!(Setup::default());
    let idle: Vec<_> = (0..400).map_while(|_| UnixStream::connect(daemon.fd_socket()).ok()).collect();
    assert!(idle.len() > 256, "{} connections", idle.len());
    drop(idle);
    let engine = Engine::attach(&daemon, &Shape::default());
    still_serves(&daemon, &engine, "400 connections");
}

#[test]
fn attaching_wrongly() {
    let daemon = daemon!(Setup::default());
    let control = daemon.control();
    let with = |change: &dyn Fn(&mut v1::AttachRequest)| {
        let mut request = attach_request();
        change(&mut request);
        control.attach(request).map(|attached| attached.said)
    };
    refused(with(&|r| r.protocol_version = 0), Code::FailedPrecondition, "install the same kvtier release");
    refused(with(&|r| r.protocol_version = u32::MAX), Code::FailedPrecondition, "protocol version");
    refused(with(&|r| r.namespace = None), Code::InvalidArgument, "namespace");
    refused(with(&|r| r.layout = None), Code::InvalidArgument, "layout");
    refused(with(&|r| r.role = 9), Code::InvalidArgument, "role");
    refused(with(&|r| r.shard = 1), Code::InvalidArgument, "shard 1 of 1");
    refused(with(&|r| r.engine_id = "x".repeat(1 << 20)), Code::InvalidArgument, "engine_id");
    refused(with(&|r| r.engine_id = String::new()), Code::InvalidArgument, "engine_id");
    let layout = |change: &dyn Fn(&mut v1::Layout)| with(&|r| change(r.layout.as_mut().unwrap()));
    refused(layout(&|l| l.shards = 0), Code::InvalidArgument, "shards");
    refused(layout(&|l| l.shards = u32::MAX), Code::InvalidArgument, "shards");
    refused(layout(&|l| l.groups.clear()), Code::InvalidArgument, "group");
    refused(layout(&|l| l.block_bytes = vec![u64::MAX]), Code::InvalidArgument, "bytes");
    refused(layout(&|l| l.groups[0].block_tokens = 0), Code::InvalidArgument, "0 tokens");
    refused(layout(&|l| l.groups[0].block_tokens = 17), Code::InvalidArgument, "17");
    refused(layout(&|l| l.groups = vec![l.groups[0].clone(); 5000]), Code::InvalidArgument, "group");
    refused(layout(&|l| l.groups[0].layers = vec!["l".into(); 100_000]), Code::InvalidArgument, "layers");
    let first = control.attach(attach_request()).unwrap();
    let other = layout(&|l| l.isa = "another".into());
    refused(other, Code::AlreadyExists, "give each engine its own id");
    drop(first);
}

#[test]
fn calls_of_strangers() {
    let daemon = daemon!(Setup::default());
    let control = daemon.control();
    let mut client = control.engine().unwrap();
    let attachment = || vec![3; 16].into();
    let code = Code::FailedPrecondition;
    control.block_on(async {
        let text = "unknown attachment: attach again";
        refused(client.heartbeat(v1::HeartbeatRequest { attachment: attachment() }).await, code, text);
        refused(client.heartbeat(v1::HeartbeatRequest { attachment: vec![].into() }).await, code, text);
        refused(client.heartbeat(v1::HeartbeatRequest { attachment: vec![0; 1 << 20].into() }).await, code, text);
        let request = v1::LookupRequest { attachment: attachment(), ..lookup(vec![range(0, 0, &keys(1))]) };
        refused(client.lookup(request).await, code, text);
        let request = v1::ReserveRequest { attachment: attachment(), ..reserve(range(0, 0, &keys(1))) };
        refused(client.reserve(request).await, code, text);
        refused(client.seal(v1::SealRequest { attachment: attachment(), frames: vec![] }).await, code, text);
        let request = v1::ReleaseRequest { attachment: attachment(), ..v1::ReleaseRequest::default() };
        refused(client.release(request).await, code, text);
        let request = v1::ReportLoadsRequest { attachment: attachment(), ..v1::ReportLoadsRequest::default() };
        refused(client.report_loads(request).await, code, text);
        let request = v1::AnnotateRequest { attachment: attachment(), ..v1::AnnotateRequest::default() };
        refused(client.annotate(request).await, code, text);
        let request = v1::SwitchNamespaceRequest { attachment: attachment(), namespace: None };
        refused(client.switch_namespace(request).await, code, text);
    });
    assert_eq!(daemon.status().looked_up_tokens, 0);
}

#[test]
fn lookups_and_reservations_out_of_bounds() {
    let daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::default());
    let attached = daemon.control().attach(attach_request()).unwrap();
    let some = keys(3);
    let many = vec![BlockKey::new([1; 32]); 70_000];
    refused(attached.lookup(lookup(vec![range(1, 0, &some)])), Code::InvalidArgument, "group 1 is not in the layout");
    refused(attached.lookup(lookup(vec![range(0, 0, &many)])), Code::ResourceExhausted, "at most 65536");
    let odd = v1::BlockRange { keys: vec![1; 33].into(), ..range(0, 0, &[]) };
    refused(attached.lookup(lookup(vec![odd.clone()])), Code::InvalidArgument, "32");
    let long_id = v1::LookupRequest { request_id: "r".repeat(5000), ..lookup(vec![range(0, 0, &some)]) };
    refused(attached.lookup(long_id), Code::ResourceExhausted, "request id");
    // Places that no prompt reaches: tokens are counted in 32 bits.
    for first in [u32::MAX, u32::MAX - 1, u32::MAX / HASH_TOKENS] {
        refused(attached.lookup(lookup(vec![range(0, first, &some)])), Code::InvalidArgument, "tokens");
    }
    let twice = lookup(vec![range(0, 0, &some), range(0, 0, &some)]);
    refused(attached.lookup(twice), Code::InvalidArgument, "twice");
    let beyond = v1::LookupRequest { local_tokens: u32::MAX, ..lookup(vec![range(0, 0, &some)]) };
    assert_eq!(attached.lookup(beyond).unwrap().ranges[0].found, vec![0; 3]);
    assert_eq!(attached.lookup(lookup(vec![])).unwrap().ranges.len(), 0);
    refused(attached.reserve(reserve(range(7, 0, &some))), Code::InvalidArgument, "group 7");
    refused(attached.reserve(reserve(range(0, 0, &many))), Code::ResourceExhausted, "at most 65536");
    refused(attached.reserve(reserve(odd)), Code::InvalidArgument, "32");
    refused(attached.reserve(v1::ReserveRequest::default()), Code::InvalidArgument, "range");
    let bad_parent = v1::ReserveRequest { parent_key: vec![1; 5].into(), ..reserve(range(0, 0, &some)) };
    refused(attached.reserve(bad_parent), Code::InvalidArgument, "parent_key");
    // More than fits is granted as far as there is room.
    let wide: Vec<BlockKey> = keys(3000);
    let reply = attached.reserve(reserve(range(0, u32::MAX - 5, &wide))).unwrap();
    let granted = reply.states.iter().filter(|state| **state == 1).count();
    assert!(granted <= 1024 && reply.frames.len() == granted, "{granted} of a memory for 1024");
    // The same key twice in one reservation is granted once.
    let own = BlockKey::new([5; 32]);
    let reply = attached.reserve(reserve(range(0, 0, &[own, own]))).unwrap();
    assert!(reply.states.iter().filter(|state| **state == 1).count() <= 1, "{:?}", reply.states);
    drop(attached);
    daemon.wait_status("the attachment to be gone", |status| status.attachments.len() == 2);
    still_serves(&daemon, &engine, "requests out of bounds");
}

#[test]
fn a_message_beyond_the_limit() {
    let daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::default());
    let attached = daemon.control().attach(attach_request()).unwrap();
    let keys = vec![BlockKey::new([1; 32]); 300_000];
    let status = attached.lookup(lookup(vec![range(0, 0, &keys)])).unwrap_err();
    assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status}");
    still_serves(&daemon, &engine, "a large message");
}

#[test]
fn seals_of_frames_that_were_not_granted() {
    // Without a disk: the way down would find that nothing was written to these frames.
    let daemon = daemon!(Setup { disk_mib: None, ..Setup::default() });
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("by hand", 2);
    engine.put_all(&prompt);
    let stranger = daemon.control().attach(attach_request()).unwrap();
    let own = BlockKey::new([9; 32]);
    let reply = stranger.reserve(reserve(range(0, 0, &[own]))).unwrap();
    let frame = reply.frames[0];
    let seal = |key: &BlockKey, generation, offset| v1::SealedFrame {
        key: key.as_bytes().to_vec().into(),
        extent: frame.extent,
        generation,
        offset,
        ..v1::SealedFrame::default()
    };
    let other = BlockKey::new([8; 32]);
    let frames = vec![
        seal(&own, frame.generation + 1, frame.offset),
        seal(&own, frame.generation, frame.offset + (64 << 10)),
        seal(&other, frame.generation, frame.offset),
        v1::SealedFrame { shard: 1, ..seal(&own, frame.generation, frame.offset) },
        v1::SealedFrame { extent: 999, ..seal(&own, frame.generation, frame.offset) },
    ];
    let outcomes = stranger.seal(frames).unwrap();
    assert_eq!(outcomes, [i32::from(Outcome::Missing); 5]);
    let too_far = seal(&own, frame.generation, u64::MAX);
    refused(stranger.seal(vec![too_far]), Code::InvalidArgument, "outside any extent");
    let short = v1::SealedFrame { key: vec![1; 3].into(), ..seal(&own, 1, 0) };
    refused(stranger.seal(vec![short]), Code::InvalidArgument, "key");
    // Another engine's reservation, and another engine's sealed block.
    let request = v1::AttachRequest { engine_id: "thief".into(), ..attach_request() };
    let thief = daemon.control().attach(request).unwrap();
    let theft = seal(&own, frame.generation, frame.offset);
    let abandon = v1::SealedFrame { abandoned: true, ..theft.clone() };
    let outcomes = thief.seal(vec![theft.clone(), abandon]).unwrap();
    assert_eq!(outcomes, [i32::from(Outcome::Rejected); 2]);
    assert_eq!(stranger.seal(vec![theft.clone()]).unwrap(), [i32::from(Outcome::Applied)]);
    assert_eq!(stranger.seal(vec![theft]).unwrap(), [i32::from(Outcome::Duplicate)]);
    assert_eq!(engine.get(&prompt).whole(), Some(32), "nobody else's block was touched");
}

#[test]
fn a_lying_checksum_is_caught_on_the_way_down() {
    let daemon = daemon!(Setup::default());
    let attached = daemon.control().attach(attach_request()).unwrap();
    let key = BlockKey::new([4; 32]);
    let frame = attached.reserve(reserve(range(0, 0, &[key]))).unwrap().frames[0];
    let seal = v1::SealedFrame {
        key: key.as_bytes().to_vec().into(),
        extent: frame.extent,
        offset: frame.offset,
        generation: frame.generation,
        checksum: 0xdead_beef,
        ..v1::SealedFrame::default()
    };
    assert_eq!(attached.seal(vec![seal]).unwrap(), [i32::from(Outcome::Applied)]);
    daemon.wait_status("the offload to find out", |status| status.corrupt_blocks == 1);
    let found = daemon.control().locate(&[key]).unwrap();
    assert_eq!(found[0].outcome(), Outcome::Missing);
}

#[test]
fn control_calls_out_of_bounds() {
    let daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::default());
    let many = vec![BlockKey::new([1; 32]); 65_537];
    refused(daemon.control().evict(&many, false), Code::InvalidArgument, "more than 65536 blocks in one call");
    refused(daemon.control().locate(&many), Code::InvalidArgument, "at most 4096");
    assert_eq!(daemon.control().evict(&many[..65_536], false).unwrap().len(), 65_536);
    let blocks = v1::target::Target::Blocks(v1::BlockKeys { keys: vec![1; 31].into() });
    let short_key = v1::Target { target: Some(blocks), ..v1::Target::default() };
    let short = v1::EvictRequest { targets: vec![short_key], ..v1::EvictRequest::default() };
    refused(daemon.control().evict_from(short), Code::InvalidArgument, "keys");
    let tier = v1::EvictRequest { tiers: vec![99], ..v1::EvictRequest::default() };
    refused(daemon.control().evict_from(tier), Code::InvalidArgument, "tiers");
    let token = v1::ListRequest { page_token: vec![1; 3].into(), ..v1::ListRequest::default() };
    refused(daemon.control().list(token), Code::InvalidArgument, "page_token");
    let far = v1::ListRequest { page_token: vec![255; 4].into(), page_size: u32::MAX, ..v1::ListRequest::default() };
    assert!(daemon.control().list(far).unwrap().blocks.is_empty());
    still_serves(&daemon, &engine, "control calls");
}

#[test]
fn reports_of_loads_that_never_were() {
    let daemon = daemon!(Setup::default());
    let engine = Engine::attach(&daemon, &Shape::default());
    let prompt = Prompt::new("slandered", 4);
    engine.put_all(&prompt);
    let attached = daemon.control().attach(attach_request()).unwrap();
    let report = |shard, generation, result: i32| v1::LoadedFrame {
        key: Shape::default().keys(0, &prompt)[0].as_bytes().to_vec().into(),
        shard,
        generation,
        result,
        source: v1::Tier::Host.into(),
    };
    let corrupt = i32::from(v1::LoadResult::Corrupt);
    attached.report_loads("unknown", vec![report(0, 12345, corrupt), report(60_000, 1, corrupt)]).unwrap();
    refused(attached.report_loads("r", vec![report(70_000, 1, corrupt)]), Code::InvalidArgument, "shard");
    refused(attached.report_loads("r", vec![report(0, 1, 55)]), Code::InvalidArgument, "load result");
    assert_eq!(engine.get(&prompt).whole(), Some(64), "a report of another generation drops nothing");
}
