//! From what lies on disk to a core that serves it.
//!
//! *Bounds*: the core's lock is held for `RECORDS_AT_ONCE` records at a time once others may want it.

mod sieve;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use kvtier_memory::{Arena, ArenaConfig};
use kvtier_policy::Core;
use kvtier_storage::disk::DiskStore;
use kvtier_storage::journal::{Entry, Journal, batches};
use kvtier_storage::object::{Burial, ObjectStoreTier};
use kvtier_types::{Instant, Tier};
use tokio::time::{sleep, timeout};

use crate::claims::unix_ms;
use crate::cluster::Cluster;
use crate::config::Config;
use crate::device;
use crate::journaling::append_or_warn;
use crate::node::{Node, Parts, Stores};
use crate::pool::{ArenaPool, slot_bytes};
use crate::programs::Former;
use crate::rules::RulesFile;
use crate::{claims, marks};
use sieve::{Sieve, in_order};

/// Longest that a start waits to learn what is dead; then that goes on while the node serves all else.
const LEARN_LIMIT: Duration = Duration::from_secs(10);
/// Longest that the object tier waits for it.
const LEARN_PATIENCE: Duration = Duration::from_secs(600);
/// Pause before it is tried again.
const LEARN_AGAIN: Duration = Duration::from_secs(1);
/// Records fed to the core in one call while others wait for it.
const RECORDS_AT_ONCE: usize = 1_024;

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
    let (journal, mut state) = Journal::open(&config.data_dir.join("journal")).context("cannot open the journal")?;
    let mut notes = std::mem::take(&mut state.notes);
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
    let mut sieve = Sieve::of(&mut state, former);
    // Above all that was given out in earlier lives, whatever is left of what they wrote: nobody writes a million records a
    // second, and where the clock was set back what is found raises it.
    core.sequence_floor(state.last_sequence.max(unix_ms().saturating_mul(1000)));
    // Before the tiers: what they bring in is kept from the start.
    let now = Instant::from_nanos(u64::try_from(origin.elapsed().as_nanos()).unwrap_or(u64::MAX));
    let ended: Vec<Entry> = claims::recover(&mut core, now, state.claims).into_iter().map(Entry::ClaimEnded).collect();
    for batch in batches(&ended) {
        journal.append(batch).context("cannot write the journal")?;
    }
    let (rules, in_force) = RulesFile::open(&config)?;
    core.set_rules(in_force);
    marks::recover(&mut core, origin, state.marks);
    let mut stores = Stores::default();
    notes.extend(open_disk((&config, &journal), &mut core, &mut stores, &mut sieve)?);
    let object = open_object((&config, &journal), &mut stores, &mut sieve).await?;
    if object.is_none() && config.object.enabled {
        core.without(Tier::Object);
    }
    if object.as_ref().is_none_or(|(_, found)| !found.complete) {
        sieve.former.restore(&mut core, now);
    }
    if object.is_none() {
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
        recover_object(&node, object, sieve).await;
    }
    Ok(node)
}

/// Opens the disk tier and feeds what it holds to the core. Answers with what is to be told.
fn open_disk(
    (config, journal): (&Config, &Journal),
    core: &mut Core,
    stores: &mut Stores,
    sieve: &mut Sieve,
) -> anyhow::Result<Vec<String>> {
    if !config.disk.enabled {
        stores.absent.insert(Tier::Disk, "disabled in the configuration".into());
        return Ok(Vec::new());
    }
    let (disk, recovered) = match DiskStore::open(&config.disk_config()?) {
        Ok(opened) => opened,
        Err(error) => {
            tracing::error!(%error, "no disk tier");
            core.without(Tier::Disk);
            stores.absent.insert(Tier::Disk, error.to_string());
            return Ok(Vec::new());
        }
    };
    tracing::info!(io = disk.describe(), records = recovered.records.len(), "disk tier open");
    let mut notes = recovered.cut;
    sieve.uses(Tier::Disk, journal)?;
    if let Some(wiped) = sieve.wipe_found(recovered.next_sequence) {
        journal.append(&[wiped]).context("cannot write the journal")?;
    }
    core.sequence_floor(recovered.next_sequence.saturating_sub(1));
    stores.disk = Some(Arc::new(disk));
    let wiped = sieve.feed(core, stores, Tier::Disk, in_order(recovered.records));
    match sieve.tell(Tier::Disk, wiped) {
        Some(what) if sieve.is_first() => notes.push(what),
        // They are found again until their segments are reused.
        Some(what) => tracing::info!("{what}"),
        None => {}
    }
    Ok(notes)
}

/// An open object tier and what it found, which is not all where the store did not answer yet.
type OpenObject = (Arc<ObjectStoreTier>, kvtier_storage::object::Recovered);

async fn open_object(
    (config, journal): (&Config, &Journal),
    stores: &mut Stores,
    sieve: &mut Sieve,
) -> anyhow::Result<Option<OpenObject>> {
    if !config.object.enabled {
        stores.absent.insert(Tier::Object, "disabled in the configuration".into());
        return Ok(None);
    }
    match ObjectStoreTier::open(config.object_config()?).await {
        Ok((object, found)) => {
            sieve.uses(Tier::Object, journal)?;
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
async fn recover_object(node: &Arc<Node>, (object, found): OpenObject, sieve: Sieve) {
    node.with_core(|core, _| core.sequence_floor(found.next_sequence.saturating_sub(1)));
    if found.complete && timeout(LEARN_LIMIT, learn_dead(node)).await.unwrap_or(false) {
        feed_object(node, found, sieve).await;
        return;
    }
    let of_task = Arc::clone(node);
    node.set_recovering(true);
    node.tasks.spawn(async move {
        let recovering = async {
            let found = if found.complete {
                Ok(found)
            } else {
                found.notes.iter().for_each(|note| tracing::warn!("object tier: {note}"));
                object.recover().await
            };
            let learning = async {
                while found.is_ok() && !learn_dead(&of_task).await {
                    sleep(LEARN_AGAIN).await;
                }
            };
            if timeout(LEARN_PATIENCE, learning).await.is_err() {
                tracing::error!("object tier: served without knowing what was evicted from its packs by other nodes");
            }
            found
        };
        let found = tokio::select! {
            () = of_task.stopping.cancelled() => return,
            found = recovering => found,
        };
        match found {
            Ok(found) => feed_object(&of_task, found, sieve).await,
            Err(error) => tracing::error!(%error, "object tier: not recovered; what it holds is not served"),
        }
        of_task.set_recovering(false);
    });
}

/// Learns what was evicted from packs, this node's among them, by whichever node. Returns whether that is known.
async fn learn_dead(node: &Node) -> bool {
    let Some(floor) = node.cluster.as_ref().and_then(|cluster| cluster.floor.as_ref()) else { return true };
    match floor.learn_dead().await {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(%error, "object tier: it is not served until it is known what was evicted from packs");
            false
        }
    }
}

/// Feeds what the object tier holds to the core, in steps: others have their turn between them, but for verbs that a
/// record to come would undo, see [`Node::is_recovering`].
async fn feed_object(node: &Arc<Node>, found: kvtier_storage::object::Recovered, mut sieve: Sieve) {
    found.notes.iter().for_each(|note| tracing::warn!("object tier: {note}"));
    tracing::info!(records = found.records.len(), "object tier recovered");
    if let Some(wiped) = sieve.wipe_found(found.next_sequence) {
        append_or_warn(node, vec![wiped], "that what the object tier held is dead").await;
    }
    let floor = node.cluster.as_ref().and_then(|cluster| Some((&cluster.id, cluster.floor.as_ref()?)));
    // What was said to be dead must not cover what is written from now on.
    let dead = floor.map_or(0, |(_, floor)| floor.own_sequence());
    node.with_core(|core, _| core.sequence_floor(found.next_sequence.saturating_sub(1).max(dead)));
    let (records, evicted): (Vec<_>, Vec<_>) =
        found.records.into_iter().partition(|(meta, _)| floor.is_none_or(|(id, floor)| !floor.is_buried(id, meta)));
    evicted.iter().for_each(|(meta, at)| node.stores.forget(Tier::Object, *at, meta.bytes));
    let mut records = in_order(records).into_iter();
    let mut wiped = 0;
    while !records.as_slice().is_empty() {
        let step = records.by_ref().take(RECORDS_AT_ONCE);
        wiped += node.with_core(|core, _| sieve.feed(core, &node.stores, Tier::Object, step));
        tokio::task::yield_now().await;
    }
    if let Some(what) = sieve.tell(Tier::Object, wiped) {
        tracing::warn!("{what}");
    }
    node.with_core(|core, now| sieve.former.restore(core, now));
    if let Some((id, floor)) = floor {
        let burial = |(block, up_to_sequence)| Burial { writer: id.clone(), block, up_to_sequence };
        let burials: Vec<Burial> = sieve.evicted_in_packs().map(burial).collect();
        let floor = Arc::clone(floor);
        node.tasks.spawn(async move {
            if let Err(error) = floor.bury(&burials).await {
                tracing::warn!(%error, "other nodes may read what was evicted from packs until the object store answers");
            }
        });
    }
    // What was evicted of packs that could not be read stays in the journal until they are.
    if !found.passed_over
        && let Err(error) = sieve.compact(&node.journal, &node.stores)
    {
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
