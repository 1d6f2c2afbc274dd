use super::*;
use crate::conformance::{Fixture, Pair, arena, delivered, eventually, frame, payload, suite, terms};
use crate::tcp::address::{Address, Exposed};
use crate::tcp::wire::{HELLO_BYTES, REPLY_BYTES, REQUEST_BYTES, Reply, Request, Status};
use crate::{Descriptor, ReadTerms};
use kvtier_memory::{Arena, IoBuf};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::time::Instant;

const MIB: usize = 1 << 20;
/// Far more than any step takes.
const LONG: Duration = Duration::from_secs(60);
/// A silence that tests wait for.
const SILENCE: Duration = Duration::from_millis(300);

struct Tcp {
    streams: usize,
    max_inflight_bytes: u32,
}

fn config() -> TcpConfig {
    TcpConfig::new("127.0.0.1:0".parse().unwrap())
}

#[async_trait]
impl Fixture for Tcp {
    async fn pair(&self) -> Pair {
        let config = TcpConfig {
            streams_per_link: self.streams,
            max_inflight_bytes: self.max_inflight_bytes,
            max_exposures: self.max_exposures(),
            ..config()
        };
        let owner = TcpTransport::start(config.clone()).await.unwrap();
        let reader = TcpTransport::start(config).await.unwrap();
        Pair { owner: Arc::new(owner), reader: Arc::new(reader) }
    }

    fn max_exposures(&self) -> usize {
        2000
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms_with_several_streams() {
    suite(&Tcp { streams: 4, max_inflight_bytes: 64 << 20 }).await;
}

#[tokio::test]
async fn conforms_with_one_stream_and_little_room() {
    suite(&Tcp { streams: 1, max_inflight_bytes: 1 << 20 }).await;
}

/// An owner with one exposed frame, and a reader.
struct Rig {
    owner: TcpTransport,
    reader: TcpTransport,
    exposure: Box<dyn Exposure>,
    len: usize,
    arena: Arena,
}

impl Rig {
    async fn start(owner: TcpConfig, reader: TcpConfig, len: usize) -> Self {
        let owner = TcpTransport::start(owner).await.unwrap();
        let reader = TcpTransport::start(reader).await.unwrap();
        let arena = arena();
        let exposure = owner.expose(frame(&arena, 1, len).1).unwrap();
        Self { owner, reader, exposure, len, arena }
    }

    fn address(&self) -> Address {
        Address::decode(&self.owner.address()).unwrap()
    }

    async fn socket(&self) -> TcpStream {
        TcpStream::connect(&self.address().hosts[0]).await.unwrap()
    }

    async fn greeted(&self) -> TcpStream {
        let mut socket = self.socket().await;
        send_hello(&mut socket, Hello::new(Welcome::Ok, self.address().instance)).await.unwrap();
        assert_eq!(receive_hello(&mut socket).await.unwrap().welcome, Welcome::Ok);
        socket
    }

    async fn works(&self) {
        let link = self.reader.connect(&self.owner.address(), LONG).await.unwrap();
        let done = link.read(self.exposure.descriptor(), IoBuf::heap(self.len), terms()).await;
        delivered(done, 1, self.len).unwrap();
    }
}

#[tokio::test]
async fn garbage_on_the_port_ends_that_connection_only() {
    let handshake = TcpConfig { handshake: SILENCE, ..config() };
    let rig = Rig::start(handshake, config(), 5000).await;
    let link = rig.reader.connect(&rig.owner.address(), LONG).await.unwrap();
    let mut greeted = rig.greeted().await;
    greeted.write_all(&[0xff; REQUEST_BYTES]).await.unwrap();
    let mut sockets = vec![greeted, rig.socket().await];
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4096], &b"kvti"[..]] {
        let mut socket = rig.socket().await;
        socket.write_all(garbage).await.unwrap();
        sockets.push(socket);
    }
    for socket in &mut sockets {
        // Closed by the other end, in whatever way.
        let _closed = socket.read_to_end(&mut Vec::new()).await;
    }
    assert_eq!(rig.owner.turned_away(), TurnedAway { garbage: sockets.len() as u64, too_many: 0 });
    let done = link.read(rig.exposure.descriptor(), IoBuf::heap(5000), terms()).await;
    delivered(done, 1, 5000).unwrap();
    rig.works().await;
}

#[tokio::test]
async fn connections_are_bounded() {
    let few = TcpConfig { max_connections: 4, ..config() };
    let rig = Rig::start(few, config(), 5000).await;
    let link = rig.reader.connect(&rig.owner.address(), LONG).await.unwrap();
    let refused = rig.reader.connect(&rig.owner.address(), LONG).await;
    assert!(matches!(refused, Err(TransportError::LinkDown { source: Some(_) })), "{refused:?}");
    assert!(rig.owner.turned_away().too_many > 0);
    drop(link);
    eventually("connections end with their link", || rig.owner.server.connections.available_permits() == 4).await;
    rig.works().await;
}

#[tokio::test]
async fn a_peer_that_stops_reading_is_dropped_and_pins_nothing() {
    let impatient = TcpConfig { silence: SILENCE, ..config() };
    let rig = Rig::start(impatient, config(), 4 * MIB).await;
    let mut socket = rig.greeted().await;
    let Exposed { capability, .. } = Exposed::decode(rig.exposure.descriptor()).unwrap();
    for id in 0..64 {
        let request = Request { id, capability, offset: 0, len: u32::try_from(rig.len).unwrap() };
        socket.write_all(&request.encode()).await.unwrap();
    }
    let mut head = [0; REPLY_BYTES];
    socket.read_exact(&mut head).await.unwrap();
    assert_eq!(Reply::decode(&head).unwrap().status, Status::Ok);
    let Rig { owner, reader, exposure, arena, .. } = rig;
    drop(exposure);
    assert_eq!(arena.stats().pinned_frames, 1, "replies under way");
    eventually("the silent peer is dropped", || arena.stats().pinned_frames == 0).await;
    eventually("it is counted", || owner.turned_away().garbage == 1).await;
    let exposure = owner.expose(frame(&arena, 1, 5000).1).unwrap();
    Rig { owner, reader, exposure, len: 5000, arena }.works().await;
}

/// Passes connections on to `host`, cutting each in the other direction after `bytes`: `silently`, by passing no more.
async fn proxy(host: String, bytes: u64, silently: bool) -> (String, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let over = CancellationToken::new();
    let stop = over.clone();
    tokio::spawn(async move {
        while let Some(Ok((client, _))) = stop.run_until_cancelled(listener.accept()).await {
            let (host, stop) = (host.clone(), stop.clone());
            tokio::spawn(async move {
                let owner = TcpStream::connect(host).await.unwrap();
                let (mut from_owner, mut to_owner) = owner.into_split();
                let (mut from_client, mut to_client) = client.into_split();
                let requests = async { copy(&mut from_client, &mut to_owner).await.map(|_| ()) };
                let replies = async {
                    copy(&mut (&mut from_owner).take(bytes), &mut to_client).await?;
                    if silently {
                        stop.cancelled().await;
                    }
                    Ok(())
                };
                // Whichever ends first closes both.
                let _ended: io::Result<()> = tokio::select! { ended = requests => ended, ended = replies => ended };
            });
        }
    });
    (address, over)
}

/// Cuts a link in the middle of a read; returns how it ended, after it was shown that the memory is left alone then.
async fn cut_in_mid_read(silently: bool, deadline: Duration, silence: Duration) -> TransportError {
    let reader = TcpConfig { streams_per_link: 1, silence, ..config() };
    let rig = Rig::start(config(), reader, 4 * MIB).await;
    let mut address = rig.address();
    let (host, over) = proxy(address.hosts[0].clone(), HELLO_BYTES as u64 + 1_500_000, silently).await;
    address.hosts = vec![host];
    let link = rig.reader.connect(&address.encode(), LONG).await.unwrap();
    let (id, into) = frame(&rig.arena, 2, 4 * MIB);
    let terms = ReadTerms { deadline: Instant::now() + deadline, ..terms() };
    let done = link.read(rig.exposure.descriptor(), into.into(), terms).await;
    let error = delivered(done, 1, 4 * MIB).unwrap_err();
    let pin = rig.arena.pin(id).unwrap();
    let mut bytes = vec![0; 4 * MIB];
    pin.copy_out(&mut bytes);
    assert!(bytes[..MIB] == payload(1, 4 * MIB)[..MIB], "the first bytes came");
    pin.fill(0x77);
    over.cancel();
    eventually("the link knows that it was cut", || !link.is_alive()).await;
    pin.copy_out(&mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0x77), "written after the read had ended");
    rig.works().await;
    error
}

#[tokio::test]
async fn a_link_cut_in_mid_read_ends_the_read() {
    let error = cut_in_mid_read(false, LONG, LONG).await;
    assert!(matches!(error, TransportError::LinkDown { source: Some(_) }), "{error}");
}

#[tokio::test]
async fn a_link_that_falls_silent_in_mid_read_ends_the_read_by_its_deadline() {
    let error = cut_in_mid_read(true, SILENCE, LONG).await;
    assert!(matches!(error, TransportError::Deadline), "{error}");
}

#[tokio::test]
async fn a_link_that_falls_silent_counts_as_cut() {
    let error = cut_in_mid_read(true, LONG, SILENCE).await;
    assert!(matches!(error, TransportError::LinkDown { source: Some(_) }), "{error}");
}

#[tokio::test]
async fn an_owner_that_restarts_on_its_port_is_another_one() {
    let rig = Rig::start(config(), config(), 5000).await;
    let (before, old) = (rig.owner.address(), rig.exposure.descriptor().clone());
    let listen = rig.address().hosts[0].parse().unwrap();
    let link = rig.reader.connect(&before, LONG).await.unwrap();
    rig.owner.close(LONG).await;
    drop(rig.owner);
    eventually("the link noticed", || !link.is_alive()).await;
    let owner = TcpTransport::start(TcpConfig { listen, ..config() }).await.unwrap();
    let stale = rig.reader.connect(&before, LONG).await;
    assert!(matches!(stale, Err(TransportError::Gone)), "{stale:?}");
    let link = rig.reader.connect(&owner.address(), LONG).await.unwrap();
    let done = link.read(&old, IoBuf::heap(5000), terms()).await;
    assert!(matches!(done.result, Err(TransportError::Gone)), "{:?}", done.result);
    let exposure = owner.expose(frame(&rig.arena, 1, 5000).1).unwrap();
    delivered(link.read(exposure.descriptor(), IoBuf::heap(5000), terms()).await, 1, 5000).unwrap();
}

#[tokio::test]
async fn a_forged_range_is_refused() {
    let rig = Rig::start(config(), config(), 5000).await;
    let exposed = Exposed::decode(rig.exposure.descriptor()).unwrap();
    let forged: Descriptor = Exposed { bytes: 5001, ..exposed }.encode().unwrap();
    let link = rig.reader.connect(&rig.owner.address(), LONG).await.unwrap();
    let done = link.read(&forged, IoBuf::heap(5001), terms()).await;
    assert!(matches!(done.result, Err(TransportError::BadDescriptor { .. })), "{:?}", done.result);
    assert!(link.is_alive());
    rig.works().await;
}

#[tokio::test]
async fn an_address_that_nobody_can_reach_is_refused() {
    let listen = "0.0.0.0:0".parse().unwrap();
    let refused = TcpTransport::start(TcpConfig { listen, ..config() }).await;
    assert!(matches!(refused, Err(TransportError::Unavailable { .. })), "{refused:?}");
    let named = TcpConfig { listen, advertise: Some("127.0.0.1".into()), ..config() };
    Rig::start(named, config(), 5000).await.works().await;
    let refused = TcpTransport::start(TcpConfig { streams_per_link: 0, ..config() }).await;
    assert!(matches!(refused, Err(TransportError::Unavailable { .. })), "{refused:?}");
}
