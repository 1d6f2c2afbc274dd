//! From what lies on disk to a core that serves it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::Context;
use kvtier_memory::{Arena, ArenaConfig};
use kvtier_policy::Core;
use kvtier_storage::StorageError;
use kvtier_storage::disk::DiskStore;
use kvtier_storage::journal::{Entry, Journal, batches};
use kvtier_storage::object::ObjectStoreTier;
use kvtier_types::{BlockKey, Instant, Location, RecordMeta, ShardKey, Tier};

use crate::cluster::Cluster;
use crate::config::Config;
use crate::device;
use crate::node::{Node, Parts, Stores};
use crate::pool::{ArenaPool, slot_bytes};
use crate::programs::Former;
use crate::rules::RulesFile;
use crate::{claims, marks};

/// Keys evicted by verb, with the last sequence each eviction covers.
pub type Tombstones = BTreeMap<ShardKey, u64>;

/// Opens everything and recovers the catalog.
///
/// A tier that cannot be opened is absent, with the reason in the log and in status; the journal must open.
///
/// # Errors
/// When directories, the journal or memory cannot be had.
pub async fn open(config: Config) -> anyhow::Result<Arc<Node>> {
    open_with(config, Box::new(device::open_all)).await
}

/// As [`open`], with devices opened so.
pub(crate) async fn open_with(config: Config, opener: device::Opener) -> anyhow::Result<Arc<Node>> {
    let origin = std::time::Instant::now();
    std::fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("cannot create data_dir {}", config.data_dir.display()))?;
    let mut notes = Vec::new();
    let (journal, mut state) = Journal::open(&config.data_dir.join("journal")).context("cannot open the journal")?;
    notes.extend(state.notes.iter().cloned());
    let incarnation = state.incarnation + 1;
    journal.append(&[Entry::Incarnation(incarnation)]).context("cannot write the journal")?;

    let first = first_generation(incarnation)?;
    let arena = Arena::new(ArenaConfig {
        capacity_bytes: config.host.capacity.0,
        extent_bytes: config.host.extent.0,
        page_kind: config.page_kind()?,
        first_generation: first,
    })?;
    let devices = device::open(&config, first, opener).await?;
    let core = Core::new(config.core_config()?, Box::new(ArenaPool(arena.clone())), slot_bytes);
    let mut core = core.with_devices(devices.pools());
    let former = Former::of(&mut state, &mut core);
    // Before the tiers: what they bring in is kept from the start.
    let now = Instant::from_nanos(u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX));
    let ended: Vec<Entry> = claims::recover(&mut core, now, state.claims).into_iter().map(Entry::ClaimEnded).collect();
    for batch in batches(&ended) {
        journal.append(batch).context("cannot write the journal")?;
    }
    let (rules, in_force) = RulesFile::open(&config)?;
    core.set_rules(in_force);
    let (marked, found) = marks::Marked::new(state.marks.keys().copied());
    let marked_up_to = state.marks.values().map(|m| m.up_to_sequence).max().unwrap_or(0);
    marks::recover(&mut core, origin, state.marks);
    core.sequence_floor(marked_up_to);
    let mut stores = Stores::default();
    let mut sieve =
        Sieve { tombstones: state.evicted, damaged: state.damaged, kept: Tombstones::new(), former, marked, found };
    core.sequence_floor(sieve.tombstones.values().copied().max().unwrap_or(0));
    open_disk(&config, &mut core, &mut stores, &mut sieve, &mut notes)?;
    let object = open_object(&config, &mut stores).await?;
    if object.is_none() && config.object.enabled {
        core.without(Tier::Object);
    }
    if object.as_ref().is_none_or(|(_, found)| !found.complete) {
        let last = !config.object.enabled && stores.disk.is_some();
        sieve.former.restore(&mut core, now);
        if last {
            sieve.former.compact(&journal);
        }
    }
    if !config.object.enabled {
        sieve.compact(&journal, &stores).context("cannot compact the journal")?;
    }
    for note in &notes {
        tracing::warn!("{note}");
    }
    let cluster = Cluster::open(&config).await?;
    let journal = Arc::new(journal);
    let tenancy = config.tenancy()?;
    let declared = state.graphs;
    let cluster = Some(cluster);
    let parts =
        Parts { config, arena, devices, stores, journal, core, incarnation, notes, rules, origin, cluster, tenancy };
    let node = Node::new(parts);
    node.graphs.restore(node.now(), declared);
    // What recovery decided to forget.
    node.with_core(|_, _| ());
    if let Some(object) = object {
        recover_object(&node, object, sieve);
    }
    Ok(node)
}

fn open_disk(
    config: &Config,
    core: &mut Core,
    stores: &mut Stores,
    sieve: &mut Sieve,
    notes: &mut Vec<String>,
) -> anyhow::Result<()> {
    if !config.disk.enabled {
        stores.absent.insert(Tier::Disk, "disabled in the configuration".into());
        return Ok(());
    }
    match DiskStore::open(&config.disk_config()?) {
        Ok((disk, recovered)) => {
            tracing::info!(io = disk.describe(), records = recovered.records.len(), "disk tier open");
            notes.extend(recovered.cut);
            if sieve.damaged {
                notes.push("the journal was damaged: stored blocks are dropped, evicted ones may be among them".into());
            }
            core.sequence_floor(recovered.next_sequence.saturating_sub(1));
            stores.disk = Some(Arc::new(disk));
            sieve.feed(core, stores, Tier::Disk, recovered.records);
        }
        Err(error) => {
            tracing::error!(%error, "no disk tier");
            core.without(Tier::Disk);
            stores.absent.insert(Tier::Disk, error.to_string());
        }
    }
    Ok(())
}

/// Keeps evicted records from coming back.
#[derive(Debug)]
struct Sieve {
    tombstones: Tombstones,
    /// The journal lost entries, so it cannot say what was evicted: better lose what is stored than bring it back.
    damaged: bool,
    /// Tombstones that still have a record to keep away.
    kept: Tombstones,
    /// Blocks that verbs had marked, and those of which a record was found.
    marked: BTreeSet<BlockKey>,
    found: marks::Marked,
    /// Who held what, and what was abandoned.
    former: Former,
}

impl Sieve {
    /// Feeds one tier's recovered records to the core, but for those that were evicted.
    fn feed(&mut self, core: &mut Core, stores: &Stores, tier: Tier, mut records: Vec<(RecordMeta, Location)>) {
        // Parents before their children, and of one key the oldest first.
        records.sort_by_key(|(meta, _)| (meta.depth_blocks, meta.sequence));
        for (meta, at) in records {
            let evicted = self.tombstones.get(&meta.key).filter(|up_to| meta.sequence <= **up_to);
            if let Some(up_to) = evicted {
                self.kept.insert(meta.key, *up_to);
            }
            if self.marked.contains(&meta.key.block) {
                self.found.found(&meta);
            }
            if evicted.is_some() || self.damaged {
                stores.forget(tier, at, meta.bytes);
            } else {
                core.recover(tier, &meta, at);
            }
        }
    }

    /// Drops tombstones without a record, unless a tier is away that may bring one back. Later evictions stay.
    fn compact(&self, journal: &Journal, stores: &Stores) -> Result<(), StorageError> {
        if stores.disk.is_none() {
            return Ok(());
        }
        let idle = |key: &ShardKey, up_to| self.tombstones.get(key) == Some(&up_to) && !self.kept.contains_key(key);
        journal.retain_evicted(|key, up_to| !idle(key, up_to))?;
        self.found.compact(&self.marked, journal)
    }
}

/// An open object tier and what it found, which is not all where the store did not answer yet.
type OpenObject = (Arc<ObjectStoreTier>, kvtier_storage::object::Recovered);

async fn open_object(config: &Config, stores: &mut Stores) -> anyhow::Result<Option<OpenObject>> {
    if !config.object.enabled {
        stores.absent.insert(Tier::Object, "disabled in the configuration".into());
        return Ok(None);
    }
    match ObjectStoreTier::open(config.object_config()?).await {
        Ok((object, found)) => {
            let object = Arc::new(object);
            stores.object = Some(Arc::clone(&object));
            Ok(Some((object, found)))
        }
        Err(error) => {
            tracing::error!(%error, "no object tier");
            stores.absent.insert(Tier::Object, error.to_string());
            Ok(None)
        }
    }
}

/// Brings the object store's records in: at once when it answered, else in the background once it does.
fn recover_object(node: &Arc<Node>, (object, found): OpenObject, sieve: Sieve) {
    if found.complete {
        feed_object(node, found, sieve);
        return;
    }
    found.notes.iter().for_each(|note| tracing::warn!("object tier: {note}"));
    let of_task = Arc::clone(node);
    node.set_recovering(true);
    node.tasks.spawn(async move {
        let found = tokio::select! {
            () = of_task.stopping.cancelled() => return,
            found = object.recover() => found,
        };
        match found {
            Ok(found) => feed_object(&of_task, found, sieve),
            Err(error) => tracing::error!(%error, "object tier: not recovered; what it holds is not served"),
        }
        of_task.set_recovering(false);
    });
}

fn feed_object(node: &Arc<Node>, found: kvtier_storage::object::Recovered, mut sieve: Sieve) {
    found.notes.iter().for_each(|note| tracing::warn!("object tier: {note}"));
    tracing::info!(records = found.records.len(), "object tier recovered");
    node.with_core(|core, now| {
        core.sequence_floor(found.next_sequence.saturating_sub(1));
        sieve.feed(core, &node.stores, Tier::Object, found.records);
        sieve.former.restore(core, now);
    });
    if node.stores.disk.is_some() || !node.config.disk.enabled {
        sieve.former.compact(&node.journal);
    }
    if let Err(error) = sieve.compact(&node.journal, &node.stores) {
        tracing::warn!(%error, "the journal was not compacted");
    }
}

/// A generation that no frame of an earlier start had: random, so that stale frames never match.
fn first_generation(incarnation: u64) -> anyhow::Result<u64> {
    let mut random = [0; 4];
    let filled = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    anyhow::ensure!(filled == random.len(), "the kernel gave too few random bytes");
    // The upper bit is that of devices' frames.
    let random = u64::from(u32::from_le_bytes(random) >> 1);
    Ok((random << 32) | (incarnation & 0xff) << 24 | 1)
}
