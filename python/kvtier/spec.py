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
# What all ranks of an engine must agree on.
_COMMON = ("namespace", "layout", "engine_id")
# Longest value shown where ranks differ.
_SHOWN = 100


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
    groups, regions, block_bytes, packings = _groups(vllm_config, kv_cache_config, kv_caches)
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
            "layout": _layout_text(vllm_config, kv_cache_config, packings),
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


def _groups(vllm_config: Any, kv_cache_config: Any, kv_caches: dict[str, Any]) -> tuple[list, list, list, list]:
    """By group: what it is, its regions (all in one list), the bytes of its blocks, the packings of its layers."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise UnsupportedError("pipeline and prefill context parallelism are not supported")
    if not kv_cache_config.kv_cache_groups:
        raise UnsupportedError("the model has no KV cache")
    dcp = getattr(parallel, "decode_context_parallel_size", 1)
    groups, regions, block_bytes, packings = [], [], [], []
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
        packings.append(
            [
                _packing(vllm_config, spec, name, kv_caches[name], layer)
                for name, layer in zip(group.layer_names, layers, strict=True)
            ]
        )
    return groups, regions, block_bytes, packings


def _packing(vllm_config: Any, spec: Any, name: str, tensor: Any, rows: list[tuple[int, ...]]) -> dict[str, Any]:
    """What a layer's bytes are and how they lie in a block; `rows`: its regions."""
    own = getattr(spec, "kv_cache_specs", {}).get(name, spec)
    layer = vllm_config.compilation_config.static_forward_context.get(name)
    return {
        "layer": name,
        "runs": [row[4] for row in rows],
        "dtype": str(tensor.dtype),
        "quantization": int(getattr(own, "kv_quant_mode", 0)),
        # Tells apart what has the same type and mode: the two kinds of fp8, say.
        "kv_cache_dtype": str(getattr(layer, "kv_cache_dtype", "")),
        "backend": layer.get_attn_backend().get_name() if layer is not None else "",
        # A block that the backend cuts has each piece's heads by themselves. How far it cuts depends on the GPU.
        "pieces": tensor.shape[len(rows) - 1] // rows[0][5],
    }


def _layout_text(vllm_config: Any, kv_cache_config: Any, packings: list[list[dict]]) -> str:
    """vLLM's name of the tensor layout, and all that decides where bytes lie and is told by nothing else in the layout:
    which rank has which tokens, and each layer's packing where layers are not all alike. Where they are, the blocks'
    bytes, the backend and the namespace tell it, and the name stands alone."""
    parallel = vllm_config.parallel_config
    text = str(kv_cache_config.kv_cache_layout or "")
    if getattr(parallel, "decode_context_parallel_size", 1) > 1:
        text += f"|cp{parallel.cp_kv_cache_interleave_size}"
    apart = ("layer", "runs")
    kinds = [{key: value for key, value in p.items() if key not in apart} for group in packings for p in group]
    alike = all(kind == kinds[0] for kind in kinds) and kinds[0]["pieces"] == 1
    even = all(packing["runs"] == group[0]["runs"] for group in packings for packing in group)
    # With skipped layers, alike may mean that none or that all of them were.
    if alike and even and not getattr(vllm_config.cache_config, "kv_cache_dtype_skip_layers", None):
        return text
    return f"{text}|{_digest(json.dumps(packings, sort_keys=True))}"


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
    """Digest of the weights that make KV and of how they are used, and why it cannot be shared, if so."""
    digest, why = _weights_of(vllm_config.model_config, vllm_config.load_config)
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    # The layers of a draft model lie in the same groups. One out of the model's own checkpoint is digested with it.
    if draft is None or _origin(draft) == _origin(vllm_config.model_config):
        return digest, why
    load = getattr(speculative, "draft_load_config", None) or vllm_config.load_config
    drafts, why_draft = _weights_of(draft, load)
    return f"{digest} draft:{drafts} quantization:{draft.quantization or ''}", why or why_draft


def _origin(model: Any) -> tuple:
    """What decides which weights a model has."""
    return getattr(model, "model_weights", None) or model.model, model.revision, model.quantization


def _weights_of(model: Any, load: Any) -> tuple[str, str]:
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
    return _digest(told)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def node() -> str:
    """Names the running machine, to all its containers alike: a daemon serves the processes of one."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def disunity(specs: list[dict], nodes: list[str]) -> str:
    """Why the ranks of these specs, on these nodes, are not one engine that can be cached, and what to do about it;
    empty when they are. Asked on the scheduler's node."""
    here = node()
    far = [str(spec["rank"]) for spec, place in zip(specs, nodes, strict=True) if place != here]
    if far:
        return (
            f"rank {', '.join(far)} runs on another node than the scheduler, and so beside another daemon: "
            "give each engine no more tensor-parallel ranks than one node has devices"
        )
    for spec in specs[1:]:
        for field in _COMMON:
            if found := _difference(field, specs[0][field], spec[field]):
                return (
                    f"rank {spec['rank']} describes its KV otherwise than rank {specs[0]['rank']}, {found}: start "
                    "all ranks with one configuration, checkpoint, version of vLLM and of kvtier, on equal devices"
                )
    return ""


def _difference(path: str, one: Any, other: Any) -> str:
    """The first difference of two values, as `path: one -> other`; empty when they are equal."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return next(filter(None, (_difference(f"{path}.{key}", one[key], other[key]) for key in one)), "")
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return next(filter(None, (_difference(f"{path}[{at}]", *pair) for at, pair in pairs)), "")
    return "" if one == other else f"{path}: {repr(one)[:_SHOWN]} -> {repr(other)[:_SHOWN]}"
