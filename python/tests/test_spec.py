"""The engine's identity from stand-ins of vLLM's configuration."""

from __future__ import annotations

import os
import unittest
from types import SimpleNamespace as Some
from unittest import mock

from support import BLOCK

from kvtier import spec
from kvtier.config import Config


class FullAttentionSpec(Some):
    """Named as vLLM's."""


class SlidingWindowSpec(Some):
    """Named as vLLM's."""


class MambaSpec(Some):
    """Named as vLLM's."""


class Tensor:
    """Shape, strides and place of a KV tensor of two-byte elements."""

    def __init__(self, shape, stride=None, at=4096, device="cpu", ordinal=None):
        self.shape, self._at, self.device = shape, at, Some(type=device, index=ordinal)
        dense = [1]
        for size in reversed(shape[1:]):
            dense.insert(0, dense[0] * size)
        self._stride = stride or tuple(dense)

    def stride(self, dim=None):
        return self._stride if dim is None else self._stride[dim]

    def element_size(self):
        return 2

    def data_ptr(self):
        return self._at


def group(kind, layers, **fields):
    values = {"block_size": BLOCK, "dcp_sharded": False, **fields}
    return Some(kv_cache_spec=kind(**values), layer_names=layers, enable_kv_transfer=True, host_resident=False)


def configs(groups, tp=1, replicas=1, algorithm="sha256_cbor", load_format="auto"):
    layer = Some(isa="vec", get_attn_backend=lambda: Some(get_name=lambda: "CPU_ATTN"))
    names = [name for g in groups for name in g.layer_names]
    model = Some(
        model="/m",
        served_model_name="m",
        dtype="torch.bfloat16",
        quantization=None,
        revision=None,
        max_model_len=99,
        hf_config=Some(to_dict=lambda: {"layers": 2}),
    )
    vllm = Some(
        cache_config=Some(prefix_caching_hash_algo=algorithm, cache_dtype="auto"),
        parallel_config=Some(tensor_parallel_size=tp, pipeline_parallel_size=1),
        kv_transfer_config=Some(engine_id="e"),
        instance_id="i",
        model_config=model,
        load_config=Some(load_format=load_format),
        compilation_config=Some(static_forward_context=dict.fromkeys(names, layer)),
    )
    kv = Some(
        kv_cache_groups=groups, num_blocks=8, kv_tp_replicas=replicas, kv_cache_layout="LBHNC", hash_block_size=BLOCK
    )
    return vllm, kv


def build(groups, caches, rank=0, private=False, **changes):
    vllm, kv = configs(groups, **changes)
    ranks = {"rank": rank, "tp_rank": rank}
    with mock.patch.object(spec.native, "weights_digest", return_value="w"), mock.patch.object(os.path, "isdir"):
        return spec.build(vllm, kv, caches, ranks, Config(socket="/s", private=private))


class Spec(unittest.TestCase):
    def test_groups_and_regions(self):
        groups = [
            group(FullAttentionSpec, ["a", "b"]),
            group(SlidingWindowSpec, ["c"], sliding_window=100, extra_retained_tokens=3),
        ]
        caches = {name: Tensor((8, 2, BLOCK, 4), at=1000 + n) for n, name in enumerate("abc")}
        found, regions, options = build(groups, caches)
        self.assertEqual([g["kind"] for g in found["layout"]["groups"]], ["full", "sliding_window"])
        self.assertEqual([g["window_tokens"] for g in found["layout"]["groups"]], [0, 103])
        self.assertEqual(found["layout"]["block_bytes"], [512, 256])
        self.assertEqual(regions[2], (1, 1002, 8 * 256, 256, 256, 8))
        self.assertEqual(options, {"writer": True, "private": False})
        self.assertTrue(found["namespace"]["weights_digest"].startswith("w config:"))

    def test_kernel_blocks_are_joined(self):
        _, regions, _ = build([group(FullAttentionSpec, ["a"])], {"a": Tensor((16, 2, BLOCK // 2, 4))})
        self.assertEqual(regions[0][3:], (256, 256, 8))

    def test_keys_and_values_apart_are_two_regions_of_a_layer(self):
        _, regions, _ = build([group(FullAttentionSpec, ["a"])], {"a": Tensor((2, 8, BLOCK, 4))})
        self.assertEqual(regions, [(0, 4096, 8 * 128, 128, 128, 8), (0, 4096 + 8 * 128, 8 * 128, 128, 128, 8)])

    def test_kv_on_a_gpu_names_the_gpu(self):
        full = [group(FullAttentionSpec, ["a", "b"])]
        gpu = {name: Tensor((8, 2, BLOCK, 4), device="cuda", ordinal=1) for name in "ab"}
        found, _, _ = build(full, gpu)
        self.assertEqual(found["device"], {"backend": "cuda", "ordinal": 1, "bandwidth_bytes_per_second": 0})
        self.assertEqual(found["layout"]["isa"], "cuda")
        self.assertNotIn("device", build(full, {name: Tensor((8, 2, BLOCK, 4)) for name in "ab"})[0])
        with self.assertRaisesRegex(spec.UnsupportedError, "cpu:0, cuda:1"):
            build(full, {**gpu, "b": Tensor((8, 2, BLOCK, 4))})

    def test_equal_ranks_share_a_shard_and_one_writes(self):
        caches = {"a": Tensor((8, 2, BLOCK, 4))}
        places = [build([group(FullAttentionSpec, ["a"])], caches, rank=r, tp=4, replicas=2) for r in range(4)]
        self.assertEqual(
            [(s["shard"], o["writer"]) for s, _, o in places], [(0, True), (0, False), (1, True), (1, False)]
        )
        self.assertEqual({s["layout"]["shards"] for s, _, _ in places}, {2})

    def test_what_is_not_supported_says_why(self):
        full, strided = [group(FullAttentionSpec, ["a"])], Tensor((8, 2, BLOCK, 4), stride=(64, 512, 4, 1))
        cases = [
            ([group(MambaSpec, ["a"])], Tensor((8, 2, BLOCK, 4)), "MambaSpec is not supported"),
            (full, strided, "not contiguous"),
            (full, Tensor((8, 2, BLOCK, 4), device="xpu"), "KV on xpu:0 is not supported"),
            (full, Tensor((3, 8, BLOCK, 4)), "not contiguous"),
        ]
        for groups, tensor, message in cases:
            with self.assertRaisesRegex(spec.UnsupportedError, message):
                build(groups, {"a": tensor})

    def test_random_weights_are_private(self):
        caches = {"a": Tensor((8, 2, BLOCK, 4))}
        with self.assertLogs("vllm.kvtier", "WARNING"):
            found, _, options = build([group(FullAttentionSpec, ["a"])], caches, load_format="dummy")
        self.assertTrue(options["private"])
        self.assertNotEqual(found["namespace"]["revision"], "")

    def test_hashes_must_not_depend_on_the_process(self):
        with mock.patch.dict(os.environ):
            os.environ.pop("PYTHONHASHSEED", None)
            vllm, _ = configs([], algorithm="xxhash")
            with self.assertRaisesRegex(ValueError, "set PYTHONHASHSEED"):
                spec.check_hash(vllm)
            os.environ["PYTHONHASHSEED"] = "7"
            self.assertEqual(spec.check_hash(vllm), ("xxhash", "7"))
            vllm, _ = configs([], algorithm="md5")
            with self.assertRaisesRegex(ValueError, "does not know"):
                spec.check_hash(vllm)


if __name__ == "__main__":
    unittest.main()
