//! What declared steps share: it stays in host memory until the steps that are about to run have begun, and is copied to other
//! nodes as for a fork of as many branches.
//!
//! *Bounds*: [`MAX_SHARED`] parts of contexts, those of most steps first, each held for [`STEM_PATIENCE`] at most and as far as
//! there is room for stems.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kvtier_policy::programs::graphs::{GraphName, SHARED_SOON, SharedPart, Sharing};
use kvtier_policy::{Core, HolderName, Holdings};
use kvtier_types::{BlockKey, Instant};

use super::forks::{STEM_PATIENCE, release};
use crate::claims::settle;
use crate::node::Node;
use crate::services::{KEYS_PER_CORE_CALL, gather};

/// How often it is looked what is shared.
const EVERY: Duration = Duration::from_secs(1);
/// Parts of contexts that are followed at once.
const MAX_SHARED: usize = 256;
/// Of one tenant.
const MAX_OF_TENANT: usize = MAX_SHARED / 4;
/// How long a part of which nothing was found is left alone: its blocks are yet to be written.
const LEFT_ALONE: Duration = Duration::from_secs(5);
/// Blocks up to one that a step names: of longer prefixes the last so many are held.
const LONGEST: usize = 4096;

/// A part of a context that steps are about to read.
struct Part {
    /// What is held of it, in prefix order.
    stem: Vec<BlockKey>,
    /// Its last block, once it is known.
    last: Option<BlockKey>,
    until: Instant,
    /// When it is looked for again, while nothing of it was found.
    again: Instant,
    steps: u32,
}

/// All that is shared now.
#[derive(Default)]
pub(super) struct Parts {
    parts: BTreeMap<Sharing, Part>,
    next: Option<Instant>,
}

impl Parts {
    /// The last block of each part, and how many steps are to read it.
    pub(super) fn fan_outs(&self) -> impl Iterator<Item = (BlockKey, u32)> {
        self.parts.values().filter_map(|part| Some((part.last?, part.steps)))
    }
}

/// Looks what is shared, once it is time.
pub(super) async fn look(node: &Arc<Node>, now: Instant) {
    {
        let parts = &mut node.ahead.inner.lock().shared;
        if parts.next.is_some_and(|next| next > now) {
            return;
        }
        parts.next = Some(now + EVERY);
    }
    let wanted = about_to_run(node, now).await;
    let (gone, news) = {
        let parts = &mut node.ahead.inner.lock().shared.parts;
        let mut gone: Vec<BlockKey> = Vec::new();
        parts.retain(|sharing, part| {
            let stays = wanted.contains_key(sharing);
            if !stays || part.until <= now {
                gone.append(&mut part.stem);
            }
            stays
        });
        let mut news = Vec::new();
        for (sharing, steps) in wanted {
            let new = Part { stem: Vec::new(), last: None, until: now + STEM_PATIENCE, again: now, steps };
            let part = parts.entry(sharing.clone()).or_insert(new);
            part.steps = steps;
            if part.last.is_none() && part.until > now && part.again <= now {
                part.again = now + LEFT_ALONE;
                news.push(sharing);
            }
        }
        (gone, news)
    };
    release(node, &gone).await;
    let mut holds = false;
    for sharing in news {
        let keys = keys_of(node, &sharing).await;
        holds |= hold(node, &sharing, keys);
    }
    if holds {
        settle(node).await;
    }
}

/// What steps share that are about to run, and how many do: that of most first, at most [`MAX_SHARED`].
async fn about_to_run(node: &Arc<Node>, now: Instant) -> BTreeMap<Sharing, u32> {
    let (mut counts, mut after) = (BTreeMap::<Sharing, u32>::new(), None::<GraphName>);
    loop {
        let (some, next) = node.graphs.with(|graphs| graphs.sharing_some(now + SHARED_SOON, after.as_ref()));
        for sharing in some {
            *counts.entry(sharing).or_default() += 1;
        }
        if next.is_none() {
            break;
        }
        after = next;
        tokio::task::yield_now().await;
    }
    let mut most: Vec<(Sharing, u32)> = counts.into_iter().collect();
    most.sort_by_key(|(_, steps)| std::cmp::Reverse(*steps));
    let mut of_tenants = BTreeMap::new();
    most.retain(|(sharing, _)| {
        let count: &mut usize = of_tenants.entry(sharing.tenant.clone()).or_default();
        *count += 1;
        *count <= MAX_OF_TENANT
    });
    most.truncate(MAX_SHARED);
    most.into_iter().collect()
}

/// The blocks of a part of a context, in prefix order; none while this node does not know them.
async fn keys_of(node: &Arc<Node>, sharing: &Sharing) -> Vec<BlockKey> {
    let context = |range| {
        let name = HolderName::program(&sharing.tenant, &sharing.program);
        gather(node, Holdings::of_session(&name, range)).unwrap_or_default()
    };
    let mut keys = match &sharing.part {
        SharedPart::Tokens(start, end) => context((*start, *end)),
        SharedPart::Type(_) => context((0, 0)),
        SharedPart::Blocks(last) => {
            let mut keys = Vec::new();
            for key in last {
                keys.extend(up_to(node, *key));
                tokio::task::yield_now().await;
            }
            keys
        }
    };
    // What is another tenant's is nobody's to hold, and what follows it is not reached without it.
    let (mut own, mut end) = (keys.len(), 0);
    for (page, at) in keys.chunks(KEYS_PER_CORE_CALL).zip((0..).step_by(KEYS_PER_CORE_CALL)) {
        node.read_core(|core| {
            for (key, at) in page.iter().zip(at..) {
                let Some((semantic, is_own)) = core.meaning_of(key, &sharing.tenant) else { continue };
                if !is_own {
                    own = own.min(at);
                }
                if sharing.part == SharedPart::Type(semantic) {
                    end = at + 1;
                }
            }
        });
    }
    if let SharedPart::Type(_) = sharing.part {
        own = own.min(end);
    }
    keys.truncate(own);
    keys
}

/// A block and those before it, as far as they are here, in prefix order.
fn up_to(node: &Arc<Node>, last: BlockKey) -> Vec<BlockKey> {
    let (mut next, mut keys) = (Some(last), Vec::new());
    let walk = |core: &Core| {
        for _ in 0..KEYS_PER_CORE_CALL {
            let Some(key) = next.filter(|_| keys.len() < LONGEST) else { return Ok::<_, ()>(false) };
            let Some((before, _)) = core.step_up(&key) else { return Ok(false) };
            keys.push(key);
            next = before;
        }
        Ok(true)
    };
    if node.read_core_in_steps(walk).is_err() {
        return Vec::new();
    }
    keys.reverse();
    keys
}

/// Holds blocks as far as there is room. Answers whether it held any.
fn hold(node: &Arc<Node>, sharing: &Sharing, mut keys: Vec<BlockKey>) -> bool {
    let Some(last) = keys.last().copied() else { return false };
    let mut held = 0;
    for page in keys.chunks(KEYS_PER_CORE_CALL) {
        let count = node.with_core(|core, _| core.hold_stem(page));
        held += count;
        if count < page.len() {
            break;
        }
    }
    keys.truncate(held);
    if let Some(part) = node.ahead.inner.lock().shared.parts.get_mut(sharing) {
        (part.stem, part.last) = (keys, Some(last));
    }
    held > 0
}
