//! Block keys of the engine's current namespace.

use kvtier_types::{BlockKey, EngineHash, GroupDigest, GroupSpec, Namespace, NamespaceId};

/// A namespace with what deriving keys in it needs. Immutable: a switch of the revision makes another one.
#[derive(Debug, Clone)]
pub struct KeySpace {
    namespace: Namespace,
    id: NamespaceId,
    groups: Vec<GroupDigest>,
    /// Hashes under a block of each group.
    hashes_per_block: Vec<usize>,
}

impl KeySpace {
    /// The key space of a checked namespace and groups.
    #[must_use]
    pub fn new(namespace: Namespace, groups: &[GroupSpec]) -> Self {
        let id = namespace.id();
        let hash_tokens = namespace.hash_block_tokens.max(1);
        Self {
            namespace,
            id,
            groups: groups.iter().map(GroupSpec::digest).collect(),
            hashes_per_block: groups.iter().map(|g| (g.block_tokens / hash_tokens) as usize).collect(),
        }
    }

    /// The same identity under another revision.
    #[must_use]
    pub fn with_revision(&self, revision: &str) -> Self {
        let namespace = Namespace { revision: revision.to_owned(), ..self.namespace.clone() };
        let id = namespace.id();
        Self { namespace, id, ..self.clone() }
    }

    /// The namespace.
    #[must_use]
    pub const fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its digest.
    #[must_use]
    pub const fn id(&self) -> &NamespaceId {
        &self.id
    }

    /// The key of the block of `group` that ends where `hash` does; `None` for an unknown group.
    #[must_use]
    pub fn key(&self, group: usize, hash: &EngineHash) -> Option<BlockKey> {
        Some(BlockKey::derive(&self.id, hash, self.groups.get(group)?))
    }

    /// Keys of `group` from `first_block` on, given a request's hashes at hash-block granularity. A block's hash is
    /// that of its last hash block, which covers all before it.
    #[must_use]
    pub fn keys_of(&self, group: usize, first_block: usize, hashes: &[EngineHash]) -> Vec<BlockKey> {
        let (Some(digest), Some(&per_block)) = (self.groups.get(group), self.hashes_per_block.get(group)) else {
            return Vec::new();
        };
        let ends = hashes.chunks_exact(per_block.max(1)).skip(first_block).filter_map(<[EngineHash]>::last);
        ends.map(|hash| BlockKey::derive(&self.id, hash, digest)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::KeySpace;
    use crate::spec::Spec;
    use crate::spec::tests::{sample, sample_with};
    use kvtier_types::EngineHash;
    use serde_json::json;

    fn space(spec: &str) -> KeySpace {
        let spec = Spec::parse(spec).unwrap();
        KeySpace::new(spec.namespace, &spec.layout.groups)
    }

    fn hashes(n: u8) -> Vec<EngineHash> {
        (0..n).map(|i| EngineHash::new(&[i; 32]).unwrap()).collect()
    }

    #[test]
    fn a_block_is_named_by_its_last_hash() {
        let space = space(&sample_with("/layout/groups/0/block_tokens", json!(32)));
        let keys = space.keys_of(0, 1, &hashes(7));
        assert_eq!(keys.len(), 2, "seven hashes are three blocks of two, of which the first is skipped");
        assert_eq!(keys[0], space.key(0, &hashes(7)[3]).unwrap());
        assert_eq!(keys[1], space.key(0, &hashes(7)[5]).unwrap());
        assert!(space.keys_of(1, 0, &hashes(7)).is_empty());
    }

    #[test]
    fn a_revision_changes_every_key_and_going_back_restores_them() {
        let space = space(&sample().to_string());
        let other = space.with_revision("weights-2");
        assert_ne!(space.keys_of(0, 0, &hashes(3)), other.keys_of(0, 0, &hashes(3)));
        assert_ne!(space.id(), other.id());
        assert_eq!(space.keys_of(0, 0, &hashes(3)), other.with_revision("").keys_of(0, 0, &hashes(3)));
    }
}
