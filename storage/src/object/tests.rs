//! The conformance suite over a directory, and faults: flipped bytes, truncation, foreign objects, a store that is down.

use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};

use super::*;
use crate::conformance::{self, Fixture, Opened, buffer, get, meta, payload, put};

/// An object store in memory that can be switched off.
#[derive(Debug, Default)]
pub(super) struct Switched {
    pub(super) inner: InMemory,
    down: AtomicBool,
    pub(super) hangs: AtomicBool,
    calls: AtomicUsize,
    lists: AtomicUsize,
    /// It fails from this call on; never if 0.
    pub(super) fails_from: AtomicUsize,
    /// An object that cannot be read.
    pub(super) bad_sector: Mutex<Option<Path>>,
    /// An object that may not be read.
    archived: Mutex<Option<Path>>,
    denies_deletes: AtomicBool,
}

fn denied(at: &str) -> Error {
    Error::PermissionDenied { path: at.to_owned(), source: "denied".into() }
}

impl Switched {
    pub(super) fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    pub(super) fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    pub(super) fn lists(&self) -> usize {
        self.lists.load(Ordering::SeqCst)
    }

    fn check(&self) -> Result<(), Error> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        let fails_from = self.fails_from.load(Ordering::SeqCst);
        if self.down.load(Ordering::SeqCst) || (fails_from > 0 && call >= fails_from) {
            return Err(Error::Generic { store: "switched", source: "switched off".into() });
        }
        Ok(())
    }

    /// Never returns while it hangs.
    async fn answer(&self) -> Result<(), Error> {
        self.check()?;
        if self.hangs.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    /// Every object's path and bytes.
    pub(super) async fn objects(&self) -> Vec<(Path, Bytes)> {
        let mut found = Vec::new();
        for meta in self.inner.list(None).collect::<Vec<_>>().await {
            let path = meta.unwrap().location;
            let bytes = self.inner.get(&path).await.unwrap().bytes().await.unwrap();
            found.push((path, bytes));
        }
        found.sort();
        found
    }

    pub(super) async fn packs(&self) -> Vec<(Path, Bytes)> {
        let packs = self.objects().await.into_iter().filter(|(path, _)| path.as_ref().ends_with(".pack"));
        packs.collect()
    }

    pub(super) async fn replace(&self, path: &Path, bytes: impl Into<Bytes>) {
        self.inner.put(path, PutPayload::from(bytes.into())).await.unwrap();
    }
}

impl std::fmt::Display for Switched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("switched")
    }
}

#[async_trait]
impl ObjectStore for Switched {
    async fn put_opts(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult, Error> {
        self.answer().await?;
        self.inner.put_opts(at, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        _at: &Path,
        _options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>, Error> {
        unreachable!("not relied upon")
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult, Error> {
        self.answer().await?;
        if self.bad_sector.lock().as_ref() == Some(at) {
            return Err(Error::Generic { store: "switched", source: "bad sector".into() });
        }
        if self.archived.lock().as_ref() == Some(at) {
            return Err(denied(at.as_ref()));
        }
        self.inner.get_opts(at, options).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path, Error>>) -> BoxStream<'static, Result<Path, Error>> {
        match self.check() {
            Ok(()) if self.denies_deletes.load(Ordering::SeqCst) => stream::once(async { Err(denied("")) }).boxed(),
            Ok(()) => self.inner.delete_stream(paths),
            Err(error) => stream::once(async { Err(error) }).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta, Error>> {
        self.lists.fetch_add(1, Ordering::SeqCst);
        match self.check() {
            Ok(()) => self.inner.list(prefix),
            Err(error) => stream::once(async { Err(error) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, _prefix: Option<&Path>) -> Result<ListResult, Error> {
        unreachable!("not relied upon")
    }

    async fn copy_opts(&self, _from: &Path, _to: &Path, _options: CopyOptions) -> Result<(), Error> {
        unreachable!("not relied upon")
    }
}

/// Small packs, short waits.
pub(super) fn config(place: ObjectPlace) -> ObjectConfig {
    let millis = Duration::from_millis;
    ObjectConfig {
        pack_bytes: 128 << 10,
        max_linger: millis(3),
        max_inflight_bytes: 512 << 10,
        retry: RetryPolicy {
            attempts: 3,
            first_backoff: millis(1),
            max_backoff: millis(4),
            fail_fast: millis(30),
            ..RetryPolicy::default()
        },
        ..ObjectConfig::new(place, 4 << 20)
    }
}

async fn open(store: &Arc<Switched>) -> (ObjectStoreTier, Recovered) {
    open_as(store, config(ObjectPlace::Local("/unused".into()))).await
}

pub(super) async fn open_as(store: &Arc<Switched>, config: ObjectConfig) -> (ObjectStoreTier, Recovered) {
    ObjectStoreTier::open_with(config, Arc::clone(store) as Arc<dyn ObjectStore>).await.unwrap()
}

pub(super) async fn close(tier: &ObjectStoreTier) {
    tier.close(Duration::from_secs(30)).await.unwrap();
}

/// Waits until `done`, at most 30 s.
pub(super) async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !done().await {
        assert!(begun.elapsed() < Duration::from_secs(30), "never happened: {what}");
        tokio::task::yield_now().await;
        sleep(Duration::from_millis(1)).await;
    }
}

pub(super) fn is_unavailable<T>(result: &Result<T, StorageError>) -> bool {
    matches!(result, Err(StorageError::Unavailable { .. }))
}

struct Directory(tempfile::TempDir);

#[async_trait]
impl Fixture for Directory {
    async fn open(&self) -> Opened {
        let place = ObjectPlace::Local(self.0.path().to_owned());
        let (tier, recovered) = ObjectStoreTier::open(config(place)).await.unwrap();
        assert!(recovered.complete && recovered.notes.is_empty(), "{recovered:?}");
        Opened { store: Arc::new(tier), records: recovered.records }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms_over_a_directory() {
    conformance::suite(|| Directory(tempfile::tempdir().unwrap())).await;
}

struct InStore(Arc<Switched>);

#[async_trait]
impl Fixture for InStore {
    async fn open(&self) -> Opened {
        let (tier, recovered) = open(&self.0).await;
        Opened { store: Arc::new(tier), records: recovered.records }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms_over_an_object_store() {
    conformance::suite(|| InStore(Arc::default())).await;
}

#[tokio::test]
async fn records_share_packs_and_dead_packs_are_deleted() {
    let store = Arc::new(Switched::default());
    let (tier, _) = open(&store).await;
    let written = futures::future::join_all((0..20).map(|n| put(&tier, n, 5000))).await;
    let written: Vec<_> = written.into_iter().map(Result::unwrap).collect();
    let packs = store.packs().await.len();
    assert!(packs < 10, "20 records in {packs} packs");
    for (n, (meta, at)) in (0..).zip(&written) {
        get(&tier, n, meta, *at).await.unwrap();
        tier.forget(*at, meta.bytes);
    }
    until("every pack is deleted", async || store.packs().await.is_empty()).await;
    until("and accounted for", async || tier.usage().used_bytes == 0).await;
    close(&tier).await;
}

#[tokio::test]
async fn a_record_longer_than_a_pack_and_than_what_may_be_in_flight_is_stored() {
    let store = Arc::new(Switched::default());
    let (tier, _) = open(&store).await;
    let (meta, at) = put(&tier, 1, 700_000).await.unwrap();
    get(&tier, 1, &meta, at).await.unwrap();
    close(&tier).await;
}

#[tokio::test]
async fn the_candidate_can_be_given_up_for_room() {
    let store = Arc::new(Switched::default());
    let (tier, _) = open(&store).await;
    let mut n = 0;
    while put(&tier, n, 60_000).await.is_ok() {
        n += 1;
    }
    let pack = tier.reclaim_candidate().unwrap();
    for (_, at, bytes) in tier.live_records(pack) {
        tier.forget(at, bytes);
    }
    put(&tier, n, 60_000).await.expect("waits for the deletion");
    close(&tier).await;
}

#[tokio::test]
async fn the_newest_record_of_a_shard_wins_across_packs() {
    let store = Arc::new(Switched::default());
    let (tier, _) = open(&store).await;
    let bytes = payload(1, 4000);
    for sequence in [7, 9, 8] {
        let meta = RecordMeta { sequence, ..meta(1, &bytes) };
        tier.write(meta, buffer(&bytes)).await.result.unwrap();
    }
    close(&tier).await;
    assert_eq!(store.packs().await.len(), 3);
    let (tier, recovered) = open(&store).await;
    let sequences: Vec<u64> = recovered.records.iter().map(|(meta, _)| meta.sequence).collect();
    assert_eq!((sequences, recovered.next_sequence), (vec![9], 10));
    assert_eq!(recovered.notes, ["2 records are superseded by newer ones"]);
    until("superseded packs are deleted", async || store.packs().await.len() == 1).await;
    let (meta, at) = &recovered.records[0];
    get(&tier, 1, meta, *at).await.unwrap();
    close(&tier).await;
}

#[tokio::test]
async fn a_flipped_byte_of_a_record_is_never_returned() {
    let store = Arc::new(Switched::default());
    let (tier, _) = open(&store).await;
    let (meta, at) = put(&tier, 1, 1000).await.unwrap();
    let (path, good) = store.packs().await.remove(0);
    let record = pack::record_header(&meta).len() + 1000;
    for flipped in (0..record).step_by(7) {
        let mut bad = good.to_vec();
        bad[flipped] ^= 0x20;
        store.replace(&path, bad).await;
        let result = get(&tier, 1, &meta, at).await;
        assert!(matches!(result, Err(StorageError::Corrupt { .. })), "byte {flipped}: {result:?}");
    }
    store.replace(&path, good.slice(..record - 1)).await;
    let result = get(&tier, 1, &meta, at).await;
    assert!(matches!(result, Err(StorageError::Corrupt { .. })), "truncated: {result:?}");
    store.inner.delete(&path).await.unwrap();
    assert!(matches!(get(&tier, 1, &meta, at).await, Err(StorageError::NotFound)));
    store.replace(&path, good).await;
    get(&tier, 1, &meta, at).await.unwrap();
    close(&tier).await;
}

#[tokio::test]
async fn packs_that_cannot_be_read_and_foreign_objects_are_left_alone() {
    let store = Arc::new(Switched::default());
    let (tier, _) = open(&store).await;
    for n in 0..4 {
        put(&tier, n, 1000).await.unwrap();
    }
    close(&tier).await;
    let packs = store.packs().await;
    let mut flipped_footer = packs[0].1.to_vec();
    let at = flipped_footer.len() - 100;
    flipped_footer[at] ^= 1;
    store.replace(&packs[0].0, flipped_footer).await;
    store.replace(&packs[1].0, packs[1].1.slice(..packs[1].1.len() / 2)).await;
    store.replace(&packs[2].0, Bytes::new()).await;
    // A whole pack under another's name.
    let misnamed = pack::PackName([0xaa; 32]).path(&tier.shared.root);
    store.replace(&misnamed, packs[3].1.clone()).await;
    for foreign in ["kvtier/v2/readme.txt", "kvtier/v2/aa/x.pack", "other/file"] {
        store.replace(&Path::from(foreign), "hello").await;
    }
    let before = store.objects().await;
    let (tier, recovered) = open(&store).await;
    assert!(recovered.complete);
    assert_eq!(recovered.records.len(), 1);
    assert_eq!(recovered.notes.len(), 5, "{:#?}", recovered.notes);
    close(&tier).await;
    assert_eq!(store.objects().await, before, "nothing that is not understood is touched");
}

#[tokio::test]
async fn a_footer_longer_than_the_first_read_is_read_whole() {
    let store = Arc::new(Switched::default());
    let mut config = config(ObjectPlace::Local("/unused".into()));
    config.max_linger = Duration::from_millis(300);
    config.pack_bytes = 512 << 10;
    let (tier, _) = open_as(&store, config).await;
    let written = futures::future::join_all((0..400).map(|n| put(&tier, n, 10))).await;
    assert!(written.iter().all(Result::is_ok));
    close(&tier).await;
    assert_eq!(store.packs().await.len(), 1);
    assert_eq!(open(&store).await.1.records.len(), 400);
}

#[tokio::test]
async fn a_store_that_stops_answering_costs_nothing_and_comes_back() {
    let store = Arc::new(Switched::default());
    let (tier, _) = open(&store).await;
    let (meta, at) = put(&tier, 1, 5000).await.unwrap();
    store.set_down(true);
    assert!(is_unavailable(&put(&tier, 2, 5000).await));
    assert!(is_unavailable(&get(&tier, 1, &meta, at).await));
    // From now on nobody waits: thousands of calls reach the store as no more than the probes.
    let calls = store.calls();
    let begun = Instant::now();
    for n in 10..2010 {
        assert!(is_unavailable(&put(&tier, n, 100).await));
        assert!(is_unavailable(&get(&tier, 1, &meta, at).await));
    }
    let probes = begun.elapsed().as_millis() / 30 * 2 + 4;
    let reached = store.calls() - calls;
    assert!(reached as u128 <= probes, "{reached} calls in {:?}", begun.elapsed());
    store.set_down(false);
    until("reads go on", async || get(&tier, 1, &meta, at).await.is_ok()).await;
    until("writes go on", async || put(&tier, 3, 5000).await.is_ok()).await;
    let usage = tier.usage();
    assert_eq!(usage.pending_writes, 0);
    tier.forget(at, meta.bytes);
    until("the dead pack is deleted", async || store.packs().await.len() == 1).await;
    close(&tier).await;
}

#[tokio::test]
async fn a_store_that_hangs_is_given_up_within_the_deadline() {
    let store = Arc::new(Switched::default());
    let mut config = config(ObjectPlace::Local("/unused".into()));
    config.retry.attempt_timeout = Duration::from_millis(50);
    config.retry.read_deadline = Duration::from_millis(120);
    config.retry.write_deadline = Duration::from_millis(120);
    let (tier, _) = open_as(&store, config).await;
    let (meta, at) = put(&tier, 1, 5000).await.unwrap();
    store.hangs.store(true, Ordering::SeqCst);
    let begun = Instant::now();
    let (written, read) = tokio::join!(put(&tier, 2, 5000), get(&tier, 1, &meta, at));
    assert!(is_unavailable(&written) && is_unavailable(&read), "{written:?} {read:?}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    store.hangs.store(false, Ordering::SeqCst);
    until("writes go on", async || put(&tier, 3, 5000).await.is_ok()).await;
    until("reads go on", async || get(&tier, 1, &meta, at).await.is_ok()).await;
    close(&tier).await;
}

#[tokio::test]
async fn retries_ride_over_a_short_outage() {
    let store = Arc::new(Switched::default());
    let mut config = config(ObjectPlace::Local("/unused".into()));
    config.retry.attempts = 1000;
    let (tier, _) = open_as(&store, config).await;
    store.set_down(true);
    let calls = store.calls();
    let write = put(&tier, 1, 5000);
    let mend = async {
        until("it was tried", async || store.calls() > calls + 2).await;
        store.set_down(false);
    };
    let (written, ()) = tokio::join!(write, mend);
    let (meta, at) = written.unwrap();
    get(&tier, 1, &meta, at).await.unwrap();
    close(&tier).await;
}

#[tokio::test]
async fn a_store_that_is_down_at_the_start_is_recovered_later() {
    let store = Arc::new(Switched::default());
    let (tier, _) = open(&store).await;
    let (meta, _) = put(&tier, 1, 5000).await.unwrap();
    close(&tier).await;
    store.set_down(true);
    let (tier, recovered) = open(&store).await;
    assert!(!recovered.complete && recovered.records.is_empty() && recovered.notes.len() == 1, "{recovered:?}");
    assert!(is_unavailable(&put(&tier, 2, 5000).await), "what is stored is not known");
    let recovering = tier.recover();
    let mend = async {
        sleep(Duration::from_millis(50)).await;
        assert!(!tier.is_recovered());
        assert!(matches!(tier.recover().await, Err(StorageError::Refused { .. })), "one at a time");
        store.set_down(false);
    };
    let (recovered, ()) = tokio::join!(recovering, mend);
    let recovered = recovered.unwrap();
    assert!(recovered.complete && tier.is_recovered());
    assert_eq!(recovered.records[0].0, meta);
    get(&tier, 1, &meta, recovered.records[0].1).await.unwrap();
    until("writes go on", async || put(&tier, 2, 5000).await.is_ok()).await;
    assert!(matches!(tier.recover().await, Err(StorageError::Refused { .. })), "it is recovered");
    close(&tier).await;
}

#[tokio::test]
async fn a_store_that_refuses_to_delete_goes_on_storing() {
    let store = Arc::new(Switched::default());
    let (tier, _) = open(&store).await;
    store.denies_deletes.store(true, Ordering::SeqCst);
    let (meta, at) = put(&tier, 0, 5000).await.unwrap();
    tier.forget(at, meta.bytes);
    until("the deletion is refused", async || tier.shared.remote.deletes.probe_at().is_some()).await;
    for n in 1..40 {
        let (meta, at) = put(&tier, n, 5000).await.expect("no upload fails for that");
        get(&tier, n, &meta, at).await.unwrap();
    }
    assert_eq!(store.packs().await.len(), 40);
    store.denies_deletes.store(false, Ordering::SeqCst);
    until("the dead pack is deleted", async || store.packs().await.len() == 39).await;
    close(&tier).await;
}

#[tokio::test]
async fn nothing_living_is_given_up_for_dead_packs_that_the_store_keeps() {
    let store = Arc::new(Switched::default());
    let (tier, _) = open(&store).await;
    store.denies_deletes.store(true, Ordering::SeqCst);
    let (kept, kept_at) = put(&tier, 0, 60_000).await.unwrap();
    let begun = Instant::now();
    let mut n = 1;
    let refused = loop {
        match put(&tier, n, 60_000).await {
            Ok((meta, at)) => tier.forget(at, meta.bytes),
            Err(error) => break error,
        }
        n += 1;
    };
    assert!(matches!(refused, StorageError::Unavailable { .. }), "{refused}");
    assert!(begun.elapsed() < Duration::from_secs(20), "it waited for what does not happen: {:?}", begun.elapsed());
    get(&tier, 0, &kept, kept_at).await.unwrap();
    store.denies_deletes.store(false, Ordering::SeqCst);
    until("there is room again", async || put(&tier, n, 60_000).await.is_ok()).await;
    close(&tier).await;
}

/// Makes one object unreadable, one way or another.
fn spoil(store: &Switched, way: usize, object: Option<Path>) {
    let ways = [&store.bad_sector, &store.archived];
    *ways[way].lock() = object;
}

#[tokio::test]
async fn an_object_that_cannot_be_read_does_not_keep_others_from_being_read() {
    for way in 0..2 {
        let store = Arc::new(Switched::default());
        let (tier, _) = open(&store).await;
        let (bad, bad_at) = put(&tier, 1, 5000).await.unwrap();
        spoil(&store, way, Some(store.packs().await.remove(0).0));
        let (good, good_at) = put(&tier, 2, 5000).await.unwrap();
        for _ in 0..3 {
            assert!(is_unavailable(&get(&tier, 1, &bad, bad_at).await));
            get(&tier, 2, &good, good_at).await.expect("the store answers");
        }
        spoil(&store, way, None);
        get(&tier, 1, &bad, bad_at).await.expect("nothing was given up");
        close(&tier).await;
    }
}

#[tokio::test]
async fn a_pack_that_cannot_be_read_does_not_keep_the_tier_from_recovering() {
    for way in 0..2 {
        let store = Arc::new(Switched::default());
        let (tier, _) = open(&store).await;
        for n in 0..2 {
            put(&tier, n, 5000).await.unwrap();
        }
        close(&tier).await;
        let (bad, _) = store.packs().await.remove(0);
        spoil(&store, way, Some(bad.clone()));
        let (tier, recovered) = open(&store).await;
        assert!(!recovered.complete, "it may be an accident");
        let recovered = tier.recover().await.unwrap();
        assert_eq!((recovered.complete, recovered.records.len(), recovered.notes.len()), (true, 1, 1));
        let digits = bad.as_ref().rsplit('/').next().unwrap().trim_end_matches(".pack");
        assert!(recovered.notes[0].contains(digits), "{:?}", recovered.notes);
        let (meta, at) = &recovered.records[0];
        get(&tier, meta.sequence, meta, *at).await.expect("its neighbor is read");
        put(&tier, 2, 5000).await.expect("writes go on");
        let packs = store.packs().await;
        let sum: u64 = packs.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        assert_eq!((packs.len(), tier.usage().used_bytes), (3, sum), "it takes its room and is not deleted");
        close(&tier).await;
        spoil(&store, way, None);
        assert_eq!(open(&store).await.1.records.len(), 3, "the next opening finds it");
    }
}

#[tokio::test]
async fn a_tier_whose_only_pack_cannot_be_read_takes_longer_to_give_it_up() {
    let store = Arc::new(Switched::default());
    let (tier, _) = open(&store).await;
    put(&tier, 1, 5000).await.unwrap();
    close(&tier).await;
    spoil(&store, 1, Some(store.packs().await.remove(0).0));
    let lists = store.lists();
    let (tier, _) = open(&store).await;
    let recovered = tier.recover().await.unwrap();
    assert_eq!((recovered.records.len(), recovered.notes.len()), (0, 1));
    let lists = store.lists() - lists;
    assert!(lists >= 30, "{lists} listings: it may be the store's fault");
    put(&tier, 2, 5000).await.expect("writes go on");
    close(&tier).await;
}

#[tokio::test]
async fn a_store_that_dies_while_it_is_read_is_not_taken_for_recovered() {
    let store = Arc::new(Switched::default());
    let (tier, _) = open(&store).await;
    for n in 0..2 {
        put(&tier, n, 5000).await.unwrap();
    }
    close(&tier).await;
    // From here on the first listing of each round is all that is answered.
    let die_after_one_call = || store.fails_from.store(store.calls() + 1, Ordering::SeqCst);
    die_after_one_call();
    let (tier, recovered) = open(&store).await;
    assert!(!recovered.complete);
    for _ in 0..40 {
        store.fails_from.store(0, Ordering::SeqCst);
        until("it answers", async || tier.shared.remote.reads.probe_at().is_none()).await;
        die_after_one_call();
        let round = tier.recovery_round(Duration::from_secs(30)).await;
        assert!(is_unavailable(&round) && !tier.is_recovered(), "{round:?}");
    }
    store.fails_from.store(0, Ordering::SeqCst);
    assert_eq!(tier.recover().await.unwrap().records.len(), 2);
    close(&tier).await;
}

#[tokio::test]
async fn closing_a_tier_whose_store_is_down_ends_in_time() {
    let store = Arc::new(Switched::default());
    let mut config = config(ObjectPlace::Local("/unused".into()));
    config.retry.attempts = u32::MAX;
    let (tier, _) = open_as(&store, config).await;
    store.set_down(true);
    let begun = Instant::now();
    let calls = store.calls();
    let (written, closed) = tokio::join!(put(&tier, 1, 5000), async {
        until("it was tried", async || store.calls() > calls).await;
        tier.close(Duration::from_millis(50)).await
    });
    assert!(matches!(written, Err(StorageError::Closed)), "{written:?}");
    assert!(is_unavailable(&closed));
    assert!(begun.elapsed() < Duration::from_secs(10));
}
