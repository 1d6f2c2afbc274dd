//! The engine that the benchmarks play: its identity, its hashes, its prompts.

use std::path::Path;

use kvtier::Spec;
use serde_json::json;

/// What its KV looks like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Runs of a block.
    pub(crate) layers: u64,
    /// Bytes of a block, all layers.
    pub(crate) block_bytes: u64,
}

impl Shape {
    pub(crate) const fn run_bytes(&self) -> u64 {
        self.block_bytes / self.layers
    }
}

/// Tokens of a block.
pub(crate) const BLOCK_TOKENS: u32 = 16;

/// The text a session is opened with.
pub(crate) fn spec_text(shape: &Shape, role: &str, socket: &Path) -> String {
    let layers: Vec<String> = (0..shape.layers).map(|n| format!("model.layers.{n}")).collect();
    let spec = json!({
        "socket": socket, "engine_id": "bench", "role": role, "rank": 0, "shard": 0,
        "namespace": {
            "model": "bench", "weights_digest": "blake3:00", "kv_dtype": "bfloat16", "quantization": "",
            "adapter_digest": "", "hash_algorithm": "sha256_cbor", "hash_seed": "0",
            "hash_block_tokens": BLOCK_TOKENS, "revision": ""
        },
        "layout": {
            "attention_backend": "CPU_ATTN", "isa": "", "layout": "LBHNC", "tensor_parallel": 1, "pipeline_parallel": 1,
            "prefill_context_parallel": 1, "decode_context_parallel": 1, "shards": 1,
            "groups": [{"kind": "full", "window_tokens": 0, "block_tokens": BLOCK_TOKENS, "layers": layers}],
            "block_bytes": [shape.block_bytes]
        },
        "call_timeout_ms": 10_000, "copy_threads": 1, "max_inflight": 256
    });
    spec.to_string()
}

/// The same, read as the connector reads it.
///
/// # Errors
/// The connector's.
pub(crate) fn spec(shape: &Shape, role: &str, socket: &Path) -> Result<Spec, kvtier::Error> {
    Spec::parse(&spec_text(shape, role, socket))
}

/// A digest that no other pair has.
pub(crate) fn digest(prompt: u64, block: u64) -> [u8; 32] {
    let mut state = prompt.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ block.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mut out = [0; 32];
    for word in out.chunks_exact_mut(8) {
        word.copy_from_slice(&splitmix(&mut state).to_le_bytes());
    }
    out[..8].copy_from_slice(&(prompt << 32 | block).wrapping_mul(0x94d0_49bb_1331_11eb).to_le_bytes());
    out
}

/// Next number of a fixed sequence.
pub(crate) const fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills a buffer with bytes that no device can compress.
pub(crate) fn fill(buffer: &mut [u8], seed: u64) {
    let mut state = seed;
    for word in buffer.chunks_exact_mut(8) {
        word.copy_from_slice(&splitmix(&mut state).to_le_bytes());
    }
}

/// Hashes of a prompt of `blocks` blocks.
pub(crate) fn prompt(number: u64, blocks: u64) -> Vec<[u8; 32]> {
    (0..blocks).map(|block| digest(number, block)).collect()
}
