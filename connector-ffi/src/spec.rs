//! The JSON text a session is opened with, checked once: behind this module nothing sees an unchecked value.

use std::path::PathBuf;
use std::time::Duration;

use kvtier_types::{GroupKind, GroupSpec, Layout, Namespace};
use serde::Deserialize;

use crate::device::DeviceSpec;
use crate::error::Error;

/// Longest spec accepted: a layout of 64 groups with thousands of layer names fits.
pub const MAX_SPEC_BYTES: usize = 4 << 20;
/// Longest text of an identity field; the daemon refuses longer ones.
const MAX_TEXT_BYTES: usize = 1024;
/// Most layer names of a group; the daemon refuses more.
const MAX_LAYERS: usize = 4096;
/// Most copy threads: more than the memory bus of one socket can feed.
const MAX_COPY_THREADS: u32 = 64;
/// Most lookups, tickets or jobs a session may be asked to keep at once.
const MAX_INFLIGHT: u32 = 65_536;
/// Longest wait for one call that a spec may ask for.
const MAX_CALL_TIMEOUT_MS: u32 = 60_000;

/// Which part of an engine a session serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Looks up and reserves.
    Scheduler,
    /// Copies.
    Worker,
}

/// A checked spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// The daemon's gRPC socket, an absolute path.
    pub socket: PathBuf,
    /// The same for every process of one engine; another for every start.
    pub engine_id: String,
    /// Which part of the engine this is.
    pub role: Role,
    /// Rank of the process.
    pub rank: u32,
    /// The shard of every block that this process reads and writes.
    pub shard: u16,
    /// Logical identity of the engine's KV.
    pub namespace: Namespace,
    /// Physical identity of the engine's KV.
    pub layout: Layout,
    /// Longest wait for one call of the daemon.
    pub call_timeout: Duration,
    /// Threads that copy.
    pub copy_threads: usize,
    /// Most lookups, tickets and jobs, each, at one time.
    pub max_inflight: usize,
    /// The device that the engine's memory lies in; none for host memory.
    pub device: Option<DeviceSpec>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Json {
    socket: PathBuf,
    engine_id: String,
    role: Role,
    #[serde(default)]
    rank: u32,
    #[serde(default)]
    shard: u16,
    namespace: JsonNamespace,
    layout: JsonLayout,
    #[serde(default = "default_call_timeout_ms")]
    call_timeout_ms: u32,
    #[serde(default = "default_copy_threads")]
    copy_threads: u32,
    #[serde(default = "default_max_inflight")]
    max_inflight: u32,
    #[serde(default)]
    device: Option<JsonDevice>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonDevice {
    backend: String,
    #[serde(default)]
    ordinal: u32,
    /// Zero for no cap.
    #[serde(default)]
    bandwidth_bytes_per_second: u64,
}

const fn default_call_timeout_ms() -> u32 {
    2000
}

const fn default_copy_threads() -> u32 {
    1
}

const fn default_max_inflight() -> u32 {
    256
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonNamespace {
    model: String,
    weights_digest: String,
    kv_dtype: String,
    quantization: String,
    adapter_digest: String,
    hash_algorithm: String,
    hash_seed: String,
    hash_block_tokens: u32,
    revision: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonLayout {
    attention_backend: String,
    isa: String,
    layout: String,
    tensor_parallel: u16,
    pipeline_parallel: u16,
    prefill_context_parallel: u16,
    decode_context_parallel: u16,
    shards: u16,
    groups: Vec<JsonGroup>,
    block_bytes: Vec<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonGroup {
    kind: String,
    #[serde(default)]
    window_tokens: u32,
    block_tokens: u32,
    layers: Vec<String>,
}

impl Spec {
    /// Reads and checks the JSON text.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] that names the field.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if text.len() > MAX_SPEC_BYTES {
            return Err(Error::invalid(format!("the spec has more than {MAX_SPEC_BYTES} bytes")));
        }
        let json: Json = serde_json::from_str(text).map_err(|e| Error::invalid(format!("spec: {e}")))?;
        let namespace = namespace(json.namespace)?;
        let layout = layout(json.layout, namespace.hash_block_tokens)?;
        if !json.socket.is_absolute() {
            return Err(Error::invalid("socket must be an absolute path"));
        }
        bounded("engine_id", &json.engine_id)?;
        if json.engine_id.is_empty() {
            return Err(Error::invalid("engine_id is empty"));
        }
        if json.shard >= layout.shards {
            return Err(Error::invalid(format!("shard is {}, the layout has {}", json.shard, layout.shards)));
        }
        in_range("call_timeout_ms", json.call_timeout_ms, MAX_CALL_TIMEOUT_MS)?;
        in_range("copy_threads", json.copy_threads, MAX_COPY_THREADS)?;
        in_range("max_inflight", json.max_inflight, MAX_INFLIGHT)?;
        Ok(Self {
            socket: json.socket,
            engine_id: json.engine_id,
            role: json.role,
            rank: json.rank,
            shard: json.shard,
            namespace,
            layout,
            call_timeout: Duration::from_millis(json.call_timeout_ms.into()),
            copy_threads: json.copy_threads as usize,
            max_inflight: json.max_inflight as usize,
            device: json.device.map(device).transpose()?,
        })
    }
}

fn device(json: JsonDevice) -> Result<DeviceSpec, Error> {
    let backend = json.backend.parse().map_err(|e| Error::invalid(format!("device.backend: {e}")))?;
    let bandwidth = Some(json.bandwidth_bytes_per_second).filter(|rate| *rate > 0);
    Ok(DeviceSpec { backend, ordinal: json.ordinal, bandwidth })
}

/// Checks the length of an identity text.
///
/// # Errors
/// [`Error::InvalidArgument`] when it is longer than the daemon accepts.
pub fn bounded(field: &str, text: &str) -> Result<(), Error> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(Error::invalid(format!("{field} has {} bytes, at most {MAX_TEXT_BYTES} are allowed", text.len())));
    }
    Ok(())
}

fn in_range(field: &str, value: u32, max: u32) -> Result<(), Error> {
    if value == 0 || value > max {
        return Err(Error::invalid(format!("{field} is {value}, expected 1 to {max}")));
    }
    Ok(())
}

fn namespace(json: JsonNamespace) -> Result<Namespace, Error> {
    let texts = [
        ("namespace.model", &json.model),
        ("namespace.weights_digest", &json.weights_digest),
        ("namespace.kv_dtype", &json.kv_dtype),
        ("namespace.quantization", &json.quantization),
        ("namespace.adapter_digest", &json.adapter_digest),
        ("namespace.hash_seed", &json.hash_seed),
        ("namespace.revision", &json.revision),
    ];
    for (field, text) in texts {
        bounded(field, text)?;
    }
    let hash_algorithm =
        json.hash_algorithm.parse().map_err(|e| Error::invalid(format!("namespace.hash_algorithm: {e}")))?;
    Ok(Namespace {
        model: json.model,
        weights_digest: json.weights_digest,
        kv_dtype: json.kv_dtype,
        quantization: json.quantization,
        adapter_digest: json.adapter_digest,
        hash_algorithm,
        hash_seed: json.hash_seed,
        hash_block_tokens: json.hash_block_tokens,
        revision: json.revision,
    })
}

fn layout(json: JsonLayout, hash_block_tokens: u32) -> Result<Layout, Error> {
    for (field, text) in [
        ("layout.attention_backend", &json.attention_backend),
        ("layout.isa", &json.isa),
        ("layout.layout", &json.layout),
    ] {
        bounded(field, text)?;
    }
    let layout = Layout {
        attention_backend: json.attention_backend,
        isa: json.isa,
        layout: json.layout,
        tensor_parallel: json.tensor_parallel,
        pipeline_parallel: json.pipeline_parallel,
        prefill_context_parallel: json.prefill_context_parallel,
        decode_context_parallel: json.decode_context_parallel,
        shards: json.shards,
        groups: json.groups.into_iter().map(group).collect::<Result<_, _>>()?,
        block_bytes: json.block_bytes,
    };
    layout.validate(hash_block_tokens).map_err(|e| Error::invalid(format!("layout: {e}")))?;
    Ok(layout)
}

fn group(json: JsonGroup) -> Result<GroupSpec, Error> {
    let kind = match (json.kind.as_str(), json.window_tokens) {
        ("full", 0) => GroupKind::Full,
        ("mla", 0) => GroupKind::Mla,
        ("state", 0) => GroupKind::State,
        ("sliding_window", window_tokens @ 1..) => GroupKind::SlidingWindow { window_tokens },
        ("full" | "mla" | "state" | "sliding_window", window) => {
            return Err(Error::invalid(format!("a group of kind {} cannot have window_tokens {window}", json.kind)));
        }
        (kind, _) => {
            return Err(Error::invalid(format!(
                "unknown group kind {kind:?}: expected full, sliding_window, mla or state"
            )));
        }
    };
    if json.layers.len() > MAX_LAYERS {
        return Err(Error::invalid(format!(
            "a group has {} layers, at most {MAX_LAYERS} are allowed",
            json.layers.len()
        )));
    }
    json.layers.iter().try_for_each(|layer| bounded("layout.groups.layers", layer))?;
    Ok(GroupSpec { kind, block_tokens: json.block_tokens, layers: json.layers })
}

#[cfg(test)]
pub(crate) mod tests;
