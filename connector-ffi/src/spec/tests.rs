use serde_json::{Value, json};

use super::{Role, Spec};
use crate::error::Error;

/// A valid spec with one full-attention group of 16-token blocks under 16-token hashes.
pub(crate) fn sample() -> Value {
    json!({
        "socket": "/nonexistent/kvtierd.sock",
        "engine_id": "engine-1",
        "role": "scheduler",
        "rank": 0,
        "shard": 0,
        "namespace": {
            "model": "tiny", "weights_digest": "blake3:00", "kv_dtype": "bfloat16", "quantization": "",
            "adapter_digest": "", "hash_algorithm": "sha256_cbor", "hash_seed": "0", "hash_block_tokens": 16,
            "revision": ""
        },
        "layout": {
            "attention_backend": "CPU_ATTN", "isa": "vec16", "layout": "LBHNC", "tensor_parallel": 1,
            "pipeline_parallel": 1, "prefill_context_parallel": 1, "decode_context_parallel": 1, "shards": 1,
            "groups": [{"kind": "full", "window_tokens": 0, "block_tokens": 16, "layers": ["a", "b"]}],
            "block_bytes": [8192]
        },
        "call_timeout_ms": 500, "copy_threads": 2, "max_inflight": 8
    })
}

/// The sample with the value at a JSON pointer replaced.
pub(crate) fn sample_with(pointer: &str, value: Value) -> String {
    let mut spec = sample();
    *spec.pointer_mut(pointer).expect("the pointer names a field of the sample") = value;
    spec.to_string()
}

#[test]
fn a_valid_spec_is_read() {
    let spec = Spec::parse(&sample().to_string()).unwrap();
    assert_eq!(spec.role, Role::Scheduler);
    assert_eq!(spec.layout.groups[0].layers, ["a", "b"]);
    assert_eq!((spec.copy_threads, spec.max_inflight), (2, 8));
}

#[test]
fn bounds_have_defaults() {
    let mut spec = sample();
    for key in ["call_timeout_ms", "copy_threads", "max_inflight", "rank", "shard"] {
        spec.as_object_mut().unwrap().remove(key);
    }
    let spec = Spec::parse(&spec.to_string()).unwrap();
    assert_eq!((spec.call_timeout.as_millis(), spec.copy_threads, spec.max_inflight), (2000, 1, 256));
}

#[test]
fn unknown_fields_are_refused_at_every_level() {
    for pointer in ["", "/namespace", "/layout", "/layout/groups/0"] {
        let mut spec = sample();
        spec.pointer_mut(pointer).unwrap().as_object_mut().unwrap().insert("surprise".into(), json!(1));
        let error = Spec::parse(&spec.to_string()).unwrap_err();
        assert!(error.to_string().contains("surprise"), "{pointer}: {error}");
    }
}

#[test]
fn out_of_range_values_are_refused() {
    let cases = [
        ("/socket", json!("relative.sock")),
        ("/engine_id", json!("")),
        ("/engine_id", json!("x".repeat(2000))),
        ("/role", json!("router")),
        ("/shard", json!(1)),
        ("/shard", json!(-1)),
        ("/copy_threads", json!(0)),
        ("/max_inflight", json!(1_000_000)),
        ("/call_timeout_ms", json!(0)),
        ("/namespace/hash_algorithm", json!("md5")),
        ("/namespace/hash_block_tokens", json!(0)),
        ("/namespace/hash_block_tokens", json!(5)),
        ("/namespace/revision", json!("r".repeat(2000))),
        ("/layout/shards", json!(0)),
        ("/layout/block_bytes", json!([])),
        ("/layout/groups/0/kind", json!("half")),
        ("/layout/groups/0/kind", json!("sliding_window")),
        ("/layout/groups/0/window_tokens", json!(5)),
        ("/layout/groups/0/block_tokens", json!(0)),
    ];
    for (pointer, value) in cases {
        let result = Spec::parse(&sample_with(pointer, value.clone()));
        assert!(matches!(result, Err(Error::InvalidArgument(_))), "{pointer} = {value}");
    }
    assert!(Spec::parse("{").is_err());
    assert!(Spec::parse("").is_err());
}
