//! From what lies on disk to a core that serves it.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context;
use kvtier_memory::{Arena, ArenaConfig};
use kvtier_policy::Core;
use kvtier_storage::BlockStore;
use kvtier_storage::disk::DiskStore;
use kvtier_storage::journal::{Entry, Journal};
use kvtier_storage::object::ObjectStoreTier;
use kvtier_types::{Location, RecordMeta, ShardKey, Tier};

use crate::config::Config;
use crate::node::{Node, Parts, Stores};
use crate::pool::{ArenaPool, slot_bytes};

/// Keys evicted by verb, with the last sequence each eviction covers.
pub type Tombstones = BTreeMap<ShardKey, u64>;

/// Opens everything and recovers the catalog.
///
/// A tier that cannot be opened is absent, with the reason in the log and in status; the journal must open.
///
/// # Errors
/// When directories, the journal or memory cannot be had.
pub async fn open(config: Config) -> anyhow::Result<Arc<Node>> {
    std::fs::create_dir_all(&config.data_dir)
        .with_context(|| format!("cannot create data_dir {}", config.data_dir.display()))?;
    let mut notes = Vec::new();
    let (journal, state) = Journal::open(&config.data_dir.join("journal")).context("cannot open the journal")?;
    notes.extend(state.notes.iter().cloned());
    let incarnation = state.incarnation + 1;
    journal.append(&[Entry::Incarnation(incarnation)]).context("cannot write the journal")?;

    let arena = Arena::new(ArenaConfig {
        capacity_bytes: config.host.capacity.0,
        extent_bytes: config.host.extent.0,
        page_kind: config.page_kind()?,
        first_generation: first_generation(incarnation)?,
    })?;
    let mut core = Core::new(config.core_config()?, Box::new(ArenaPool(arena.clone())), slot_bytes);
    let mut stores = Stores::default();
    let tombstones: Tombstones = state.evicted.iter().map(|(key, sequence)| (*key, *sequence)).collect();
    core.sequence_floor(tombstones.values().copied().max().unwrap_or(0));
    let mut kept = Tombstones::new();
    if config.disk.enabled {
        match DiskStore::open(&config.disk_config()?) {
            Ok((disk, recovered)) => {
                tracing::info!(io = disk.describe(), records = recovered.records.len(), "disk tier open");
                notes.extend(recovered.cut.iter().cloned());
                core.sequence_floor(recovered.next_sequence.saturating_sub(1));
                // Without its entries the journal cannot say what was evicted: better lose the tier than bring it back.
                let records = if state.damaged { Vec::new() } else { recovered.records.clone() };
                if state.damaged {
                    recovered.records.iter().for_each(|(meta, at)| disk.forget(*at, meta.bytes));
                    notes.push(
                        "the journal was damaged: blocks on disk were dropped, evicted ones might have been among them"
                            .into(),
                    );
                }
                stores.disk = Some(Arc::new(disk));
                kept = Feed { core: &mut core, stores: &stores, tombstones: &tombstones }.take(Tier::Disk, records);
            }
            Err(error) => {
                tracing::error!(%error, "no disk tier");
                core.without(Tier::Disk);
                stores.absent.insert(Tier::Disk, error.to_string());
            }
        }
    } else {
        stores.absent.insert(Tier::Disk, "disabled in the configuration".into());
    }
    let later = open_object(&config, &mut stores).await?;
    if later.is_none() && config.object.enabled {
        core.without(Tier::Object);
    }
    // What an absent tier holds may come back with it.
    if !config.object.enabled && stores.disk.is_some() {
        journal.retain_evicted(|key, _| kept.contains_key(key)).context("cannot compact the journal")?;
    }
    for note in &notes {
        tracing::warn!("{note}");
    }
    let parts = Parts { config, arena, stores, journal: Arc::new(journal), core, incarnation, notes };
    let node = Node::new(parts);
    // What recovery decided to forget.
    node.with_core(|_, _| ());
    if let Some(object) = later {
        recover_object(&node, object, tombstones);
    }
    Ok(node)
}

/// Feeds one tier's recovered records to the core, but for those that were evicted.
struct Feed<'a> {
    core: &'a mut Core,
    stores: &'a Stores,
    tombstones: &'a Tombstones,
}

impl Feed<'_> {
    /// Returns the tombstones that still have a record to keep away.
    fn take(&mut self, tier: Tier, mut records: Vec<(RecordMeta, Location)>) -> Tombstones {
        // Parents before their children, and of one key the oldest first.
        records.sort_by_key(|(meta, _)| (meta.depth_blocks, meta.sequence));
        let mut kept = Tombstones::new();
        for (meta, at) in records {
            match self.tombstones.get(&meta.key) {
                Some(up_to) if meta.sequence <= *up_to => {
                    kept.insert(meta.key, *up_to);
                    self.stores.forget(tier, at, meta.bytes);
                }
                _ => self.core.recover(tier, &meta, at),
            }
        }
        kept
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
fn recover_object(node: &Arc<Node>, (object, found): OpenObject, tombstones: Tombstones) {
    if found.complete {
        feed_object(node, found, &tombstones);
        return;
    }
    found.notes.iter().for_each(|note| tracing::warn!("object tier: {note}"));
    let of_task = Arc::clone(node);
    node.tasks.spawn(async move {
        let found = tokio::select! {
            () = of_task.stopping.cancelled() => return,
            found = object.recover() => found,
        };
        match found {
            Ok(found) => feed_object(&of_task, found, &tombstones),
            Err(error) => tracing::error!(%error, "object tier: not recovered; what it holds is not served"),
        }
    });
}

fn feed_object(node: &Arc<Node>, found: kvtier_storage::object::Recovered, tombstones: &Tombstones) {
    found.notes.iter().for_each(|note| tracing::warn!("object tier: {note}"));
    tracing::info!(records = found.records.len(), "object tier recovered");
    node.with_core(|core, _| {
        core.sequence_floor(found.next_sequence.saturating_sub(1));
        Feed { core, stores: &node.stores, tombstones }.take(Tier::Object, found.records)
    });
}

/// A generation that no frame of an earlier start had: random, so that stale frames never match.
fn first_generation(incarnation: u64) -> anyhow::Result<u64> {
    let mut random = [0; 4];
    let filled = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    anyhow::ensure!(filled == random.len(), "the kernel gave too few random bytes");
    Ok((u64::from(u32::from_le_bytes(random)) << 32) | (incarnation & 0xff) << 24 | 1)
}
