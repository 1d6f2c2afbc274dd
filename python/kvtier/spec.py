"""The identity of an engine's KV, from vLLM's configuration and the tensors it registered.

Two engines read each other's blocks only when everything here agrees. Whatever changes the bytes must be in it; what
cannot be told makes the namespace private or turns the connector off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from typing import Any

from kvtier import _native as native
from kvtier.config import Config

logger = logging.getLogger("vllm.kvtier")

DEFAULT_SEED = "vllm-none-hash"
_RANDOMLY_SEEDED = ("xxhash", "xxhash_cbor")
_DETERMINISTIC = ("sha256", "sha256_cbor")
# Exact classes: a subclass may keep its blocks differently.
_KINDS = {
    "FullAttentionSpec": "full",
    "MLAAttentionSpec": "mla",
    "SlidingWindowSpec": "sliding_window",
    "MambaSpec": "state",
}
# How these scale positions depends on the longest length the engine was started with.
_LENGTH_DEPENDENT_ROPE = ("longrope", "su", "dynamic")


class UnsupportedError(Exception):
    """This engine's KV cannot be cached; the message says why."""


def check_hash(vllm_config: Any) -> tuple[str, str]:
    """The prefix hash and its seed; raises ValueError when hashes differ from process to process."""
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    seed = os.environ.get("PYTHONHASHSEED")
    if algorithm in _RANDOMLY_SEEDED and seed is None:
        raise ValueError(
            f"kvtier cannot share blocks hashed by {algorithm} with a random seed: set PYTHONHASHSEED to one value on "
            "all engines, or use --prefix-caching-hash-algo sha256_cbor"
        )
    if algorithm not in _RANDOMLY_SEEDED + _DETERMINISTIC:
        raise ValueError(
            f"kvtier does not know the prefix hash {algorithm!r}: use --prefix-caching-hash-algo sha256_cbor"
        )
    return algorithm, DEFAULT_SEED if seed is None else seed


def build(vllm_config: Any, kv_cache_config: Any, kv_caches: dict[str, Any], ranks: dict, config: Config):
    """The session's spec and the regions of this rank.

    `ranks`: rank, tp_rank. Raises UnsupportedError.
    """
    groups, regions, block_bytes = _groups(vllm_config, kv_cache_config, kv_caches)
    parallel = vllm_config.parallel_config
    replicas = max(kv_cache_config.kv_tp_replicas, 1)
    namespace, private = _namespace(vllm_config, kv_cache_config, config)
    engine_id = f"{vllm_config.kv_transfer_config.engine_id}-{vllm_config.instance_id}"
    if private:
        namespace["revision"] = f"private {engine_id}"
    names = [name for group in groups for name in group["layers"]]
    spec = {
        "socket": config.socket,
        "engine_id": engine_id,
        "role": "worker",
        "rank": ranks["rank"],
        "shard": ranks["tp_rank"] // replicas,
        "namespace": namespace,
        "layout": {
            "attention_backend": _backends(vllm_config, names),
            "isa": _isa(vllm_config, names, kv_caches),
            "layout": str(kv_cache_config.kv_cache_layout or ""),
            "tensor_parallel": parallel.tensor_parallel_size,
            "pipeline_parallel": parallel.pipeline_parallel_size,
            "prefill_context_parallel": getattr(parallel, "prefill_context_parallel_size", 1),
            "decode_context_parallel": getattr(parallel, "decode_context_parallel_size", 1),
            "shards": parallel.tensor_parallel_size // replicas,
            "groups": groups,
            "block_bytes": block_bytes,
        },
        "call_timeout_ms": config.call_timeout_ms,
        "copy_threads": config.copy_threads,
        "max_inflight": config.max_inflight,
    }
    if (place := device(kv_caches, config)) is not None:
        spec["device"] = place
    return spec, regions, {"writer": ranks["tp_rank"] % replicas == 0, "private": private}


def _groups(vllm_config: Any, kv_cache_config: Any, kv_caches: dict[str, Any]) -> tuple[list, list, list]:
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise UnsupportedError("pipeline and prefill context parallelism are not supported")
    if not kv_cache_config.kv_cache_groups:
        raise UnsupportedError("the model has no KV cache")
    dcp = getattr(parallel, "decode_context_parallel_size", 1)
    groups, regions, block_bytes = [], [], []
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        first = getattr(spec, "first_spec", spec)
        kind = _KINDS.get(type(first).__name__)
        if kind is None or kind == "state" or not group.enable_kv_transfer or group.host_resident:
            # A recurrent state lies in a block only at the boundaries vLLM chooses to keep.
            raise UnsupportedError(f"KV of kind {type(first).__name__} is not supported")
        window = first.sliding_window + first.extra_retained_tokens if kind == "sliding_window" else 0
        tokens = first.block_size * (dcp if first.dcp_sharded else 1)
        groups.append(
            {"kind": kind, "window_tokens": window, "block_tokens": tokens, "layers": list(group.layer_names)}
        )
        layers = [_regions(index, name, kv_caches[name], kv_cache_config.num_blocks) for name in group.layer_names]
        rows = [row for layer in layers for row in layer]
        regions.extend(rows)
        block_bytes.append(sum(row[4] for row in rows))
    return groups, regions, block_bytes


def device(kv_caches: dict[str, Any], config: Config) -> dict | None:
    """The device that the engine's KV lies in; None for host memory. Raises UnsupportedError."""
    places = {(tensor.device.type, tensor.device.index or 0) for tensor in kv_caches.values()}
    kinds = {kind for kind, _ in places}
    if kinds <= {"cpu"}:
        return None
    if kinds != {"cuda"} or len(places) > 1:
        found = ", ".join(sorted(f"{kind}:{index}" for kind, index in places))
        raise UnsupportedError(f"KV on {found} is not supported: it must lie on one CUDA device, or in host memory")
    ((_, ordinal),) = places
    return {
        "backend": "cuda",
        "ordinal": ordinal,
        "bandwidth_bytes_per_second": config.device_bandwidth_mib_s << 20,
    }


def _regions(group: int, name: str, tensor: Any, num_blocks: int) -> list[tuple[int, ...]]:
    """(group, base, span, block stride, run, blocks) of one layer, all in bytes: one region where a block's keys and
    values lie together, one each where all keys lie before all values. Blocks must be dense."""
    shape, strides = list(tensor.shape), list(tensor.stride())
    element = tensor.element_size()
    parts, apart = 1, 0
    if shape[0] % num_blocks and len(shape) > 1 and shape[0] == 2 and shape[1] % num_blocks == 0:
        parts, apart, shape, strides = 2, strides[0] * element, shape[1:], strides[1:]
    kernel_blocks, *inner = shape
    ratio, odd = divmod(kernel_blocks, num_blocks)
    dense = 1 + sum((size - 1) * stride for size, stride in zip(inner, strides[1:], strict=True))
    count = 1
    for size in inner:
        count *= size
    if odd or dense != count or (ratio > 1 and strides[0] != count):
        raise UnsupportedError(f"the blocks of layer {name} are not contiguous")
    stride, run = strides[0] * element * ratio, count * element * ratio
    bases = [tensor.data_ptr() + part * apart for part in range(parts)]
    return [(group, base, (num_blocks - 1) * stride + run, stride, run, num_blocks) for base in bases]


def _layers(vllm_config: Any, names: list[str]) -> list[Any]:
    context = vllm_config.compilation_config.static_forward_context
    return [context[name] for name in names if name in context]


def _backends(vllm_config: Any, names: list[str]) -> str:
    found = {layer.get_attn_backend().get_name() for layer in _layers(vllm_config, names)}
    if not found:
        raise UnsupportedError("the attention backend is not known")
    return "+".join(sorted(found))


def _isa(vllm_config: Any, names: list[str], kv_caches: dict[str, Any]) -> str:
    """What the CPU backend packs blocks for: vLLM notes it on each layer when it builds the attention metadata. GPUs of
    all kinds have the same bytes."""
    if all(tensor.device.type == "cuda" for tensor in kv_caches.values()):
        return "cuda"
    found = {getattr(layer, "isa", None) for layer in _layers(vllm_config, names)}
    if None in found:
        raise UnsupportedError("the attention backend's instruction set is not known")
    return "+".join(sorted(found))


def _namespace(vllm_config: Any, kv_cache_config: Any, config: Config) -> tuple[dict, bool]:
    algorithm, seed = check_hash(vllm_config)
    model, cache = vllm_config.model_config, vllm_config.cache_config
    digest, why = _weights(vllm_config)
    if getattr(cache, "calculate_kv_scales", False):
        why = why or "KV scales are calculated at run time"
    if why and not config.private:
        logger.warning("kvtier: %s: this engine's blocks are not shared with others", why)
    dtype = str(model.dtype).removeprefix("torch.")
    namespace = {
        "model": str(getattr(model, "served_model_name", None) or model.model),
        "weights_digest": digest,
        "kv_dtype": dtype if cache.cache_dtype == "auto" else f"{cache.cache_dtype} of {dtype}",
        "quantization": str(model.quantization or ""),
        "adapter_digest": "",
        "hash_algorithm": algorithm,
        "hash_seed": seed,
        "hash_block_tokens": _hash_tokens(vllm_config, kv_cache_config),
        "revision": "",
    }
    return namespace, config.private or bool(why)


def _hash_tokens(vllm_config: Any, kv_cache_config: Any) -> int:
    if kv_cache_config.hash_block_size:
        return kv_cache_config.hash_block_size
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    return resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)[1]


def _weights(vllm_config: Any) -> tuple[str, str]:
    """Digest of the weights and of how the model was told to use them, and why it cannot be shared, if so."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if str(load.load_format).rpartition(".")[2] == "dummy":
        return "dummy", "the weights are random (load_format dummy)"
    try:
        digest = native.weights_digest(_checkpoint(model))
    except Exception as error:
        return "unknown", f"the weights of {model.model} could not be digested ({error})"
    return f"{digest} config:{_config_digest(model)}", ""


def _checkpoint(model: Any) -> str:
    """The directory the weights were loaded from."""
    path = getattr(model, "model_weights", None) or model.model
    if os.path.isdir(path):
        return path
    from huggingface_hub import snapshot_download

    return snapshot_download(path, revision=model.revision, local_files_only=True)


def _config_digest(model: Any) -> str:
    """Digest of the model's effective configuration, overrides included."""
    text = model.hf_config.to_dict()
    for name in ("_name_or_path", "transformers_version", "architectures"):
        text.pop(name, None)
    text["dtype"] = str(model.dtype)
    told = json.dumps(text, sort_keys=True, default=str)
    if any(f'"{kind}"' in told for kind in _LENGTH_DEPENDENT_ROPE):
        told += f" {model.max_model_len}"
    return hashlib.sha256(told.encode()).hexdigest()[:32]
