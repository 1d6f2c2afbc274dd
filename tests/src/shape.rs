//! What engines are made of, what prompts are, and which bytes belong under which block.

use kvtier::keys::KeySpace;
use kvtier::spec::Spec;
use kvtier_types::{BlockKey, EngineHash, FieldHasher};
use serde_json::{Value, json};

/// Tokens under one hash of the engine's chain.
pub const HASH_TOKENS: u32 = 16;

/// One group of layers.
#[derive(Debug, Clone)]
pub struct Group {
    /// `full`, `sliding_window`, `mla` or `state`.
    pub kind: &'static str,
    /// Width of a sliding window, else zero.
    pub window_tokens: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Layers; a block has one run of equal length in each.
    pub layers: u32,
    /// Bytes of a block's shard.
    pub block_bytes: u64,
}

/// What an engine looks like to the daemon.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Groups of layers.
    pub groups: Vec<Group>,
    /// Shards of every block, one worker each.
    pub shards: u16,
    /// Model of the namespace.
    pub model: String,
    /// Blocks of each group that a worker's memory holds.
    pub slots: u32,
    /// Longest wait of a session for one call.
    pub call_timeout_ms: u32,
    /// Whether workers' memory lies on the twin of a device.
    pub on_device: bool,
}

impl Default for Shape {
    /// One full-attention group of 64 KiB blocks in four layers, one shard.
    fn default() -> Self {
        let full = Group { kind: "full", window_tokens: 0, block_tokens: 16, layers: 4, block_bytes: 64 << 10 };
        Self { groups: vec![full], shards: 1, model: "tiny".into(), slots: 64, call_timeout_ms: 2000, on_device: false }
    }
}

impl Shape {
    /// As the default, with a sliding-window group beside the full one, of another block size.
    #[must_use]
    pub fn hybrid() -> Self {
        let mut this = Self::default();
        let window =
            Group { kind: "sliding_window", window_tokens: 64, block_tokens: 32, layers: 2, block_bytes: 24 << 10 };
        this.groups.push(window);
        this
    }

    /// As the default, with memory on the twin of a device.
    #[must_use]
    pub fn on_device() -> Self {
        Self { on_device: true, ..Self::default() }
    }

    /// As the default, with as many shards.
    #[must_use]
    pub fn sharded(shards: u16) -> Self {
        Self { shards, ..Self::default() }
    }

    /// As the default, with blocks of `bytes`.
    #[must_use]
    pub fn with_block_bytes(bytes: u64) -> Self {
        let mut this = Self::default();
        this.groups[0].block_bytes = bytes;
        this
    }

    /// The JSON text a session is opened with, as `role` for `shard`.
    #[must_use]
    pub fn spec_json(&self, socket: &str, engine_id: &str, role: &str, shard: u16) -> Value {
        let group = |g: &Group| {
            let layers: Vec<String> = (0..g.layers).map(|l| format!("{}.{l}", g.kind)).collect();
            json!({"kind": g.kind, "window_tokens": g.window_tokens, "block_tokens": g.block_tokens, "layers": layers})
        };
        let bytes: Vec<u64> = self.groups.iter().map(|g| g.block_bytes).collect();
        let mut spec = json!({
            "socket": socket, "engine_id": engine_id, "role": role, "rank": shard, "shard": shard,
            "namespace": {
                "model": self.model, "weights_digest": "test:00", "kv_dtype": "bfloat16", "quantization": "",
                "adapter_digest": "", "hash_algorithm": "sha256_cbor", "hash_seed": "0",
                "hash_block_tokens": HASH_TOKENS, "revision": ""
            },
            "layout": {
                "attention_backend": "CPU_ATTN", "isa": "vec16", "layout": "LBHNC", "tensor_parallel": self.shards,
                "pipeline_parallel": 1, "prefill_context_parallel": 1, "decode_context_parallel": 1,
                "shards": self.shards, "groups": self.groups.iter().map(group).collect::<Vec<_>>(),
                "block_bytes": bytes
            },
            "call_timeout_ms": self.call_timeout_ms, "copy_threads": 2, "max_inflight": 64
        });
        if self.on_device && role == "worker" {
            spec["device"] = json!({"backend": "twin"});
        }
        spec
    }

    /// The checked spec.
    ///
    /// # Panics
    /// For a shape that no engine can have.
    #[must_use]
    pub fn spec(&self, socket: &str, engine_id: &str, role: &str, shard: u16) -> Spec {
        Spec::parse(&self.spec_json(socket, engine_id, role, shard).to_string()).expect("the harness makes valid specs")
    }

    /// Keys of a prompt's blocks in one group.
    #[must_use]
    pub fn keys(&self, group: usize, prompt: &Prompt) -> Vec<BlockKey> {
        let spec = self.spec("/nowhere", "keys", "scheduler", 0);
        KeySpace::new(spec.namespace, &spec.layout.groups).keys_of(group, 0, &prompt.hashes())
    }
}

/// A prompt: a name, from which its hashes and its bytes follow, and a length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Prompts of one name are prefixes of each other.
    pub name: String,
    /// Hash blocks of 16 tokens.
    pub hash_blocks: u32,
    /// What it begins with, where that is another prompt.
    pub stem: Option<Box<Self>>,
}

impl Prompt {
    /// A prompt of `hash_blocks` times 16 tokens.
    #[must_use]
    pub fn new(name: impl Into<String>, hash_blocks: u32) -> Self {
        Self { name: name.into(), hash_blocks, stem: None }
    }

    /// A prompt that begins with this one and goes on for `hash_blocks` of its own.
    #[must_use]
    pub fn branch(&self, name: impl Into<String>, hash_blocks: u32) -> Self {
        let stem = Some(Box::new(self.clone()));
        Self { name: name.into(), hash_blocks: self.hash_blocks + hash_blocks, stem }
    }

    /// Its length.
    #[must_use]
    pub const fn tokens(&self) -> u32 {
        self.hash_blocks * HASH_TOKENS
    }

    /// Its chained hashes, one a hash block.
    ///
    /// # Panics
    /// Never: digests have a length that engine hashes may have.
    #[must_use]
    pub fn hashes(&self) -> Vec<EngineHash> {
        let hash = |index: u32| {
            let digest = FieldHasher::new("kvtier test hash").text(&self.name).number(index.into()).finish();
            EngineHash::new(&digest).expect("32 bytes make an engine hash")
        };
        let mut hashes = self.stem.as_ref().map(|stem| stem.hashes()).unwrap_or_default();
        hashes.extend((0..self.hash_blocks).map(hash).skip(hashes.len()));
        hashes
    }

    /// The hashes that name its blocks of `block_tokens`.
    #[must_use]
    pub fn block_hashes(&self, block_tokens: u32) -> Vec<EngineHash> {
        let per_block = (block_tokens / HASH_TOKENS) as usize;
        self.hashes().chunks_exact(per_block).filter_map(|chunk| chunk.last().copied()).collect()
    }
}

/// The bytes that belong under one shard of the block that `hash` names, and under no other.
#[must_use]
pub fn content(hash: &EngineHash, group: u32, shard: u16, bytes: u64) -> Vec<u8> {
    let mut seed = FieldHasher::new("kvtier test bytes");
    seed.bytes(hash.as_bytes()).number(group.into()).number(shard.into());
    let digest = seed.finish();
    let mut state = digest[..8].iter().fold(0_u64, |sum, byte| (sum << 8) | u64::from(*byte));
    let words = (0..bytes.div_ceil(8)).flat_map(|_| {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)).to_le_bytes()
    });
    words.collect()
}
