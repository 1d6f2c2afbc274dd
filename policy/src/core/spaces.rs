//! Namespaces and layouts that engines are attached with, or were lately: with them token ids become block keys.
//!
//! *Bounds*: [`MAX_KNOWN_SPACES`] pairs; the one that was attached longest ago makes room.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use kvtier_types::chain::{ExtraKey, HashChain};
use kvtier_types::{BlockKey, EngineHash, GroupDigest, Layout, LayoutId, Namespace, NamespaceId};

use super::Core;
use crate::limits::MAX_KNOWN_SPACES;

/// A namespace with a layout in which its blocks were written.
#[derive(Debug, Clone)]
pub struct KnownSpace {
    /// The namespace's digest.
    pub id: NamespaceId,
    /// The namespace.
    pub namespace: Namespace,
    /// The layout's digest.
    pub layout_id: LayoutId,
    /// The layout.
    pub layout: Arc<Layout>,
}

/// Those known, the latest attached first.
#[derive(Debug, Default)]
pub(super) struct KnownSpaces(VecDeque<KnownSpace>);

impl KnownSpaces {
    /// An engine was attached with these, or switched to them.
    pub(super) fn note(&mut self, namespace: &Namespace, layout: &Arc<Layout>) {
        let (id, layout_id) = (namespace.id(), layout.id());
        self.0.retain(|known| (known.id, known.layout_id) != (id, layout_id));
        self.0.truncate(MAX_KNOWN_SPACES - 1);
        self.0.push_front(KnownSpace { id, namespace: namespace.clone(), layout_id, layout: Arc::clone(layout) });
    }
}

impl KnownSpaces {
    /// A layout, or the one that was attached last.
    pub(super) fn layout(&self, id: Option<&LayoutId>) -> Option<(LayoutId, Arc<Layout>)> {
        let known = self.0.iter().find(|known| id.is_none_or(|id| known.layout_id == *id))?;
        Some((known.layout_id, Arc::clone(&known.layout)))
    }
}

impl Core {
    /// The layouts of a namespace: the one named, else that of `model` which was attached last. Empty when no engine was
    /// attached with it lately.
    #[must_use]
    pub fn known_spaces(&self, model: &str, namespace: Option<&NamespaceId>) -> Vec<KnownSpace> {
        let latest = || self.spaces.0.iter().find(|known| known.namespace.model == model).map(|known| known.id);
        let Some(id) = namespace.copied().or_else(latest) else { return Vec::new() };
        self.spaces.0.iter().filter(|known| known.id == id).cloned().collect()
    }
}

/// Keys of a prompt's full blocks, for every group of the layouts of one namespace whose hash algorithm is `sha256_cbor`:
/// group by group, each in prefix order.
#[must_use]
pub fn prompt_keys(spaces: &[KnownSpace], tokens: &[u32], salt: &str) -> Vec<BlockKey> {
    let Some(first) = spaces.first() else { return Vec::new() };
    let (hashes, hash_tokens) = prompt_hashes(&first.namespace, tokens, salt);
    let mut groups: BTreeSet<(GroupDigest, u32)> = BTreeSet::new();
    for space in spaces {
        groups.extend(space.layout.groups.iter().map(|group| (group.digest(), group.block_tokens)));
    }
    let mut keys = Vec::new();
    for (digest, block_tokens) in groups {
        let per_block = (block_tokens as usize / hash_tokens).max(1);
        let ends = hashes.chunks_exact(per_block).filter_map(<[EngineHash]>::last);
        keys.extend(ends.map(|hash| BlockKey::derive(&first.id, hash, &digest)));
    }
    keys
}

/// A prompt's full blocks in one layout: the index of the group, that of the block, and its key; group by group, each in
/// prefix order. For the same namespaces as [`prompt_keys`].
#[must_use]
pub fn prompt_blocks(space: &KnownSpace, tokens: &[u32], salt: &str) -> Vec<(u16, u32, BlockKey)> {
    let (hashes, hash_tokens) = prompt_hashes(&space.namespace, tokens, salt);
    let mut blocks = Vec::new();
    for (index, group) in (0..).zip(&space.layout.groups) {
        let per_block = (group.block_tokens as usize / hash_tokens).max(1);
        let digest = group.digest();
        let ends = (0..).zip(hashes.chunks_exact(per_block).filter_map(<[EngineHash]>::last));
        blocks.extend(ends.map(|(block, hash)| (index, block, BlockKey::derive(&space.id, hash, &digest))));
    }
    blocks
}

/// The engine's hashes of a prompt, and how many tokens are under each.
fn prompt_hashes(namespace: &Namespace, tokens: &[u32], salt: &str) -> (Vec<EngineHash>, usize) {
    let hash_tokens = namespace.hash_block_tokens.max(1) as usize;
    let mut chain = HashChain::new(&namespace.hash_seed);
    let mut extra: Vec<ExtraKey> = Vec::new();
    if !salt.is_empty() {
        extra.push(ExtraKey::CacheSalt(salt.to_owned()));
    }
    let mut hashes: Vec<EngineHash> = Vec::with_capacity(tokens.len() / hash_tokens);
    for block in tokens.chunks_exact(hash_tokens) {
        hashes.push(chain.push(block, &extra));
        // The salt is part of the first block's hash only; the others follow from it.
        extra.clear();
    }
    (hashes, hash_tokens)
}

#[cfg(test)]
mod tests {
    use kvtier_types::{GroupKind, GroupSpec, HashAlgorithm};

    use super::*;

    fn namespace(revision: u32) -> Namespace {
        Namespace {
            model: "m".into(),
            weights_digest: "w".into(),
            kv_dtype: "bf16".into(),
            quantization: String::new(),
            adapter_digest: String::new(),
            hash_algorithm: HashAlgorithm::Sha256Cbor,
            hash_seed: "0".into(),
            hash_block_tokens: 4,
            revision: revision.to_string(),
        }
    }

    fn layout(block_tokens: &[u32]) -> Arc<Layout> {
        let group = |tokens: &u32| GroupSpec {
            kind: GroupKind::Full,
            block_tokens: *tokens,
            layers: vec![format!("l{tokens}")],
        };
        Arc::new(Layout {
            attention_backend: "CPU".into(),
            isa: String::new(),
            layout: "L".into(),
            tensor_parallel: 1,
            pipeline_parallel: 1,
            prefill_context_parallel: 1,
            decode_context_parallel: 1,
            shards: 1,
            block_bytes: vec![4096; block_tokens.len()],
            groups: block_tokens.iter().map(group).collect(),
        })
    }

    fn space(revision: u32, block_tokens: &[u32]) -> KnownSpace {
        let mut known = KnownSpaces::default();
        known.note(&namespace(revision), &layout(block_tokens));
        known.0.pop_front().unwrap()
    }

    #[test]
    fn keys_are_those_that_an_engine_derives() {
        let space = space(0, &[4, 8]);
        let tokens: Vec<u32> = (0..18).collect();
        let keys = prompt_keys(std::slice::from_ref(&space), &tokens, "");
        let mut chain = HashChain::new("0");
        let hashes: Vec<EngineHash> = tokens.chunks_exact(4).map(|block| chain.push(block, &[])).collect();
        let key =
            |at: usize, group: usize| BlockKey::derive(&space.id, &hashes[at], &space.layout.groups[group].digest());
        let want: BTreeSet<BlockKey> = [key(0, 0), key(1, 0), key(2, 0), key(3, 0), key(1, 1), key(3, 1)].into();
        assert_eq!(
            keys.iter().copied().collect::<BTreeSet<_>>(),
            want,
            "two blocks of eight, four of four, no half block"
        );
        assert_eq!(keys.len(), want.len());
        let placed = prompt_blocks(&space, &tokens, "");
        let longer = placed.iter().filter(|(group, ..)| *group == 1).map(|(_, block, key)| (*block, *key));
        assert_eq!(longer.collect::<Vec<_>>(), [(0, key(1, 1)), (1, key(3, 1))]);
        assert_eq!(placed.iter().map(|(.., key)| *key).collect::<BTreeSet<_>>(), want);
        let salted = prompt_keys(&[space], &tokens, "pepper");
        assert!(salted.iter().all(|key| !want.contains(key)), "the salt is in every hash");
    }

    #[test]
    fn the_latest_are_remembered_within_the_bound() {
        let mut known = KnownSpaces::default();
        for revision in 0..400 {
            known.note(&namespace(revision), &layout(&[4]));
            known.note(&namespace(0), &layout(&[4]));
        }
        assert_eq!(known.0.len(), MAX_KNOWN_SPACES);
        assert_eq!(known.0[0].id, namespace(0).id(), "what is used stays");
        assert!(known.0.iter().all(|k| k.id != namespace(1).id()));
    }
}
