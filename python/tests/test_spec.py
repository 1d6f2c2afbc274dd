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


class UniformTypeKVCacheSpecs(Some):
    """Named as vLLM's."""


class Tensor:
    """Shape, strides and place of a KV tensor; of two-byte elements, unless its type is changed."""

    dtype = "torch.bfloat16"

    def __init__(self, shape, stride=None, at=4096, device="cpu", ordinal=None):
        self.shape, self._at, self.device = shape, at, Some(type=device, index=ordinal)
        dense = [1]
        for size in reversed(shape[1:]):
            dense.insert(0, dense[0] * size)
        self._stride = stride or tuple(dense)

    def stride(self, dim=None):
        return self._stride if dim is None else self._stride[dim]

    def element_size(self):
        return 1 if self.dtype == "torch.uint8" else 2

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


def build(groups, caches, rank=0, private=False, alter=None, **changes):
    vllm, kv = configs(groups, **changes)
    if alter is not None:
        alter(vllm)
    ranks = {"rank": rank, "tp_rank": rank}
    with mock.patch.object(spec.native, "weights_digest", return_value="w"), mock.patch.object(os.path, "isdir"):
        return spec.build(vllm, kv, caches, ranks, Config(socket="/s", private=private))


def mixed(layers, skipped, cache_dtype="fp8"):
    """One group of full attention with fp8 KV but in the skipped layers, and its tensors."""
    specs, caches = {}, {}
    for name in layers:
        plain = name in skipped
        mode = 0 if plain or cache_dtype != "fp8" else 1
        specs[name] = FullAttentionSpec(block_size=BLOCK, dcp_sharded=False, kv_quant_mode=mode)
        dtype = "bfloat16" if plain else {"fp8": "uint8"}.get(cache_dtype, cache_dtype)
        caches[name] = Tensor((8, 2, BLOCK, 4))
        caches[name].dtype = f"torch.{dtype}"
    spec_of_all = {"kv_cache_specs": specs, "first_spec": specs[layers[0]]}
    return [group(UniformTypeKVCacheSpecs, list(layers), **spec_of_all)], caches


def draft(model, **fields):
    """Makes a configuration speculate with a draft model."""
    values = {"model": model, "dtype": "torch.bfloat16", "quantization": None, "revision": None, "max_model_len": 99}
    config = Some(**{**values, "hf_config": Some(to_dict=lambda: {"layers": 1}), **fields})
    return lambda vllm: setattr(vllm, "speculative_config", Some(draft_model_config=config, draft_load_config=None))


class Identity(unittest.TestCase):
    """What two engines must not share has different identities."""

    def layout(self, groups, caches, **changes):
        return build(groups, caches, **changes)[0]["layout"]

    def test_the_plain_layout_is_the_tensors_name(self):
        full = [group(FullAttentionSpec, ["a", "b"])]
        caches = {name: Tensor((8, 2, BLOCK, 4)) for name in "abc"}
        window = group(SlidingWindowSpec, ["c"], sliding_window=100, extra_retained_tokens=3)
        for groups in (full, [*full, window]):
            self.assertEqual(self.layout(groups, caches)["layout"], "LBHNC")
        self.assertEqual(self.layout(*mixed("abc", "abc"))["layout"], "LBHNC")

    def test_the_interleave_counts_where_ranks_share_out_tokens(self):
        full, caches = [group(FullAttentionSpec, ["a"])], {"a": Tensor((8, 2, BLOCK, 4))}

        def layout(ranks, interleave):
            def alter(vllm):
                vllm.parallel_config.decode_context_parallel_size = ranks
                vllm.parallel_config.cp_kv_cache_interleave_size = interleave

            return self.layout(full, caches, tp=2, alter=alter)

        self.assertNotEqual(layout(2, 1), layout(2, BLOCK))
        self.assertEqual(layout(1, 1), layout(1, BLOCK))
        self.assertEqual(layout(1, 1)["layout"], "LBHNC")

    def test_which_layers_are_not_quantized_counts(self):
        def layout(layers, skipped):
            def alter(vllm):
                vllm.cache_config.kv_cache_dtype_skip_layers = list(skipped)

            return self.layout(*mixed(layers, skipped), alter=alter)

        first, last = layout("abc", "a"), layout("abc", "c")
        self.assertEqual(first["block_bytes"], last["block_bytes"])
        self.assertNotEqual(first["layout"], last["layout"])
        self.assertEqual(first, layout("abc", "a"))

    def test_skipping_all_layers_differs_from_none_where_types_have_one_size(self):
        def layout(skipped):
            def alter(vllm):
                vllm.cache_config.kv_cache_dtype_skip_layers = list(skipped)

            return self.layout(*mixed("ab", skipped, "float16"), alter=alter)

        self.assertNotEqual(layout(""), layout("ab"))

    def test_types_of_one_size_are_told_apart_by_layer(self):
        def layout(dtypes):
            names = [str(at) for at in range(len(dtypes))]
            caches = {n: Tensor((8, 2, BLOCK, 4)) for n in names}

            def alter(vllm):
                context = vllm.compilation_config.static_forward_context
                for name, dtype in zip(names, dtypes, strict=True):
                    context[name] = Some(**vars(context[name]), kv_cache_dtype=dtype)

            return self.layout([group(FullAttentionSpec, names)], caches, alter=alter)

        self.assertNotEqual(layout(["fp8_e4m3", "fp8_e5m2"]), layout(["fp8_e5m2", "fp8_e4m3"]))
        self.assertEqual(layout(["fp8", "fp8"])["layout"], "LBHNC")

    def test_how_a_backend_cuts_blocks_counts(self):
        whole, cut = Tensor((8, 2, BLOCK, 4)), Tensor((16, 2, BLOCK // 2, 4))
        one, other = (self.layout([group(FullAttentionSpec, ["a"])], {"a": tensor}) for tensor in (whole, cut))
        self.assertEqual(one["block_bytes"], other["block_bytes"])
        self.assertEqual(one["layout"], "LBHNC")
        self.assertNotEqual(one["layout"], other["layout"])

    def test_a_draft_models_weights_count(self):
        groups, caches = [group(FullAttentionSpec, ["a"])], {"a": Tensor((8, 2, BLOCK, 4))}

        def digest(alter=None):
            vllm, kv = configs(groups)
            (alter or (lambda _: None))(vllm)
            ranks = {"rank": 0, "tp_rank": 0}
            isdir = mock.patch.object(os.path, "isdir", return_value=True)
            with mock.patch.object(spec.native, "weights_digest", side_effect=lambda path: f"of {path}"), isdir:
                found = spec.build(vllm, kv, caches, ranks, Config(socket="/s"))
            return found[0]["namespace"]["weights_digest"]

        plain = digest()
        drafts = [draft("/d"), draft("/e"), draft("/d", quantization="q")]
        self.assertEqual(len({plain, *map(digest, drafts)}), 4)
        self.assertTrue(digest(draft("/d")).startswith(plain))
        # Layers of the checkpoint itself are digested with it.
        self.assertEqual(digest(draft("/m")), plain)


class Unity(unittest.TestCase):
    """Whether ranks make one engine."""

    def ranks(self, *ranks):
        groups, caches = [group(FullAttentionSpec, ["a"])], {"a": Tensor((8, 2, BLOCK, 4))}
        return [build(groups, caches, rank=rank, tp=2)[0] for rank in ranks]

    def test_equal_ranks_of_one_node_are_one(self):
        self.assertEqual(spec.disunity(self.ranks(0, 1), [spec.node()] * 2), "")

    def test_the_field_in_which_a_rank_differs_is_named(self):
        one, other = self.ranks(0, 1)
        other["layout"]["groups"][0]["layers"] = ["b"]
        self.assertRegex(
            spec.disunity([one, other], [spec.node()] * 2),
            r"^rank 1 .* than rank 0, layout\.groups\[0\]\.layers\[0\]: 'a' -> 'b': start all",
        )
        one, other = self.ranks(0, 1)
        other["namespace"]["weights_digest"] = "x" * 999
        self.assertRegex(spec.disunity([one, other], [spec.node()] * 2), "namespace.weights_digest: 'w config:")
        self.assertLess(len(spec.disunity([one, other], [spec.node()] * 2)), 600)

    def test_a_rank_on_another_node_is_named(self):
        self.assertRegex(spec.disunity(self.ranks(0, 1), [spec.node(), "far"]), "^rank 1 runs on another node .* give")


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
