use super::*;
use crate::conformance::{Fixture, Pair, arena, delivered, frame, suite, terms};
use kvtier_memory::Arena;

struct Twins;

#[async_trait]
impl Fixture for Twins {
    async fn pair(&self) -> Pair {
        let network = TwinNetwork::new();
        Pair { owner: Arc::new(network.start(1000)), reader: Arc::new(network.start(1000)) }
    }

    fn max_exposures(&self) -> usize {
        1000
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms() {
    suite(&Twins).await;
}

struct Rig {
    network: TwinNetwork,
    owner: TwinTransport,
    exposure: Box<dyn Exposure>,
    link: Box<dyn Link>,
    _arena: Arena,
}

async fn rig() -> Rig {
    let network = TwinNetwork::new();
    let (owner, reader, arena) = (network.start(10), network.start(10), arena());
    let exposure = owner.expose(frame(&arena, 1, 5000).1).unwrap();
    let link = reader.connect(&owner.address(), Duration::ZERO).await.unwrap();
    Rig { network, owner, exposure, link, _arena: arena }
}

impl Rig {
    fn read(&self) -> BoxFuture<'static, ReadDone> {
        self.link.read(self.exposure.descriptor(), IoBuf::heap(5000), terms())
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_ends_reads_at_their_deadline() {
    let rig = rig().await;
    rig.network.set_faults(Faults { silent: true, ..Faults::default() });
    let result = delivered(rig.read().await, 1, 5000);
    assert!(matches!(result, Err(TransportError::Deadline)), "{result:?}");
    assert!(rig.link.is_alive());
    rig.network.set_faults(Faults { delay: Duration::from_secs(20), ..Faults::default() });
    let begun = tokio::time::Instant::now();
    delivered(rig.read().await, 1, 5000).unwrap();
    assert_eq!(begun.elapsed().as_secs(), 20);
}

#[tokio::test]
async fn corrupt_bytes_show_in_the_checksum() {
    let rig = rig().await;
    let right = rig.read().await.result.unwrap();
    rig.network.set_faults(Faults { corrupt: true, ..Faults::default() });
    let done = rig.read().await;
    assert_eq!(done.result.unwrap(), done.into.checksum());
    assert_ne!(done.into.checksum(), right);
}

#[tokio::test]
async fn a_cut_link_stays_cut_and_a_new_one_works() {
    for faults in [Faults { cut: true, ..Faults::default() }, Faults { tear: true, ..Faults::default() }] {
        let mut rig = rig().await;
        rig.network.set_faults(faults);
        assert!(matches!(rig.read().await.result, Err(TransportError::LinkDown { .. })));
        rig.network.set_faults(Faults::default());
        assert!(!rig.link.is_alive());
        assert!(rig.read().await.result.is_err());
        let other = rig.network.start(10);
        rig.link = other.connect(&rig.owner.address(), Duration::ZERO).await.unwrap();
        delivered(rig.read().await, 1, 5000).unwrap();
        rig.network.set_faults(Faults { refuse: true, ..Faults::default() });
        assert!(other.connect(&rig.owner.address(), Duration::ZERO).await.is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn reordered_reads_end_in_the_other_order() {
    let rig = rig().await;
    rig.network.set_faults(Faults { reorder: true, ..Faults::default() });
    let mut first = rig.read();
    assert!(tokio::time::timeout(Duration::from_secs(1), &mut first).await.is_err(), "it waits to be overtaken");
    delivered(rig.read().await, 1, 5000).unwrap();
    delivered(first.await, 1, 5000).unwrap();
}
