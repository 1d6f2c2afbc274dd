//! What engines are asked: a family of prompts that share beginnings.

use kvtier_policy::{AttachSpec, Role};
use kvtier_types::{BlockKey, GroupKind, GroupSpec, HashAlgorithm, Layout, LayoutId, Namespace, ShardKey};

use crate::memory::BLOCK;
use crate::rng::{Rng, mix};

/// Tokens of a block.
pub(crate) const TOKENS: u32 = 16;
/// Prompts of the family.
const PROMPTS: u64 = 14;
/// Blocks of the longest prompt.
const LENGTH: u64 = 8;

/// The prompts, and the layout all engines have.
#[derive(Debug)]
pub(crate) struct Prompts {
    salt: u64,
    layout: Layout,
    pub(crate) layout_id: LayoutId,
}

impl Prompts {
    pub(crate) fn new(rng: &mut Rng) -> Self {
        let shards = if rng.chance(250) { 2 } else { 1 };
        let groups = vec![GroupSpec { kind: GroupKind::Full, block_tokens: TOKENS, layers: vec!["l".into()] }];
        let layout = Layout {
            attention_backend: "CPU".into(),
            isa: String::new(),
            layout: "L".into(),
            tensor_parallel: shards,
            pipeline_parallel: 1,
            prefill_context_parallel: 1,
            decode_context_parallel: 1,
            shards,
            groups,
            block_bytes: vec![BLOCK],
        };
        let layout_id = layout.id();
        Self { salt: rng.next(), layout, layout_id }
    }

    pub(crate) const fn shards(&self) -> u16 {
        self.layout.shards
    }

    /// Keys of the first blocks of some prompt. Two blocks are everybody's, two more are of one in three.
    pub(crate) fn pick(&self, rng: &mut Rng) -> Vec<BlockKey> {
        let prompt = rng.below(PROMPTS);
        let length = rng.between(2, LENGTH);
        (0..length).map(|block| self.key(prompt, block)).collect()
    }

    /// Every key of the family.
    pub(crate) fn all(&self) -> Vec<BlockKey> {
        let mut all: Vec<BlockKey> =
            (0..PROMPTS).flat_map(|prompt| (0..LENGTH).map(move |block| self.key(prompt, block))).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    fn key(&self, prompt: u64, block: u64) -> BlockKey {
        let branch = match block {
            0 | 1 => 0,
            2 | 3 => 1 + prompt % 3,
            _ => 10 + prompt,
        };
        let mut bytes = [0; 32];
        for (at, part) in (0u64..).zip(bytes.chunks_exact_mut(8)) {
            part.copy_from_slice(&mix(self.salt ^ (branch << 32 | block << 8 | at)).to_le_bytes());
        }
        BlockKey::new(bytes)
    }

    pub(crate) const fn shard_key(&self, block: BlockKey, shard: u16) -> ShardKey {
        ShardKey { block, layout: self.layout_id, shard }
    }

    /// What an engine's process says when it attaches.
    pub(crate) fn spec(&self, engine: String) -> AttachSpec {
        let namespace = Namespace {
            model: "m".into(),
            weights_digest: "w".into(),
            kv_dtype: "bf16".into(),
            quantization: String::new(),
            adapter_digest: String::new(),
            hash_algorithm: HashAlgorithm::Sha256Cbor,
            hash_seed: "0".into(),
            hash_block_tokens: TOKENS,
            revision: String::new(),
        };
        AttachSpec {
            engine,
            role: Role::Scheduler,
            rank: 0,
            shard: 0,
            devices: Vec::new(),
            pid: 1,
            namespace,
            layout: self.layout.clone(),
        }
    }
}
