"""Runs one offline vLLM engine on given prompts and writes its tokens and the connector's counters as JSON.

usage: engine.py --model DIR (--socket PATH | --off) --prompts FILE.json --out FILE.json [options]
PROMPTS is a list of prompts, each a string, a list of token ids, or {"prompt": either, "salt": str, "params": {..}}
with `kv_transfer_params` in params, and vLLM's envelope in kv_hints. OUT is
{"outputs": [{"tokens": [..], "cached": n, "kv_transfer_params": {..}}], "metrics": {..},
"counters": [{"role": "scheduler" | "worker", "side": {..}, "session": {..}}], "seconds": {..}}.
"""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

PYTHON = Path(__file__).resolve().parents[2] / "python"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", help="the daemon's Unix socket")
    where.add_argument("--off", action="store_true", help="run without the connector")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--async-load", choices=("true", "false"), default="true")
    parser.add_argument("--async-save", choices=("true", "false"), default="true")
    parser.add_argument("--extra", default="{}", help="more of kv_connector_extra_config, as JSON")
    parser.add_argument("--engine", default="{}", help="more engine arguments, as JSON")
    parser.add_argument("--policy", default="recompute")
    parser.add_argument("--mp", action="store_true", help="scheduler and workers in processes of their own")
    parser.add_argument(
        "--together", action="store_true", help="all prompts in one batch instead of one after the other"
    )
    parser.add_argument("--hold", type=float, default=0.0, help="seconds to wait before shutting down")
    return parser.parse_args()


def environment(args: argparse.Namespace, counters: str) -> None:
    """Everything vLLM reads from the environment, before it is imported; workers inherit it."""
    if platform.machine() == "x86_64":
        allow_tiles()
    if args.tp > 1:
        args.mp = True
    if not args.mp:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["KVTIER_COUNTERS_DIR"] = counters
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PYTHON), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(PYTHON))
    if not (PYTHON / "kvtier" / "libkvtier.so").exists():
        target = Path(os.environ.get("CARGO_TARGET_DIR", PYTHON.parent / "target"))
        built = [p for p in (target / k / "libkvtier.so" for k in ("debug", "release")) if p.exists()]
        if built:
            os.environ.setdefault("KVTIER_LIBRARY", str(max(built, key=lambda p: p.stat().st_mtime)))


def allow_tiles() -> None:
    """Asks the kernel for AMX's tile registers, where the processor has them.

    vLLM's attention uses them but leaves it to the first large matrix product to ask: an engine whose first prompt is short,
    or mostly loaded, dies of SIGILL.
    """
    with contextlib.suppress(OSError, AttributeError):
        # arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA); elsewhere it fails and changes nothing.
        ctypes.CDLL(None).syscall(158, 0x1023, 18)


def engine_arguments(args: argparse.Namespace) -> dict:
    """Arguments of `vllm.LLM`."""
    arguments = {
        "model": args.model,
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 4096,
        "enforce_eager": True,
        "tensor_parallel_size": args.tp,
        "prefix_caching_hash_algo": "sha256_cbor",
        "disable_log_stats": False,
    }
    if not args.mp:
        arguments["distributed_executor_backend"] = "uni"
    if not args.off:
        extra = {
            "socket": args.socket,
            "async_load": args.async_load == "true",
            "async_save": args.async_save == "true",
        }
        arguments["kv_transfer_config"] = {
            "kv_connector": "KvTierConnector",
            "kv_connector_module_path": os.environ.get("KVTIER_CONNECTOR_MODULE", "kvtier.connector"),
            "kv_role": "kv_both",
            "kv_load_failure_policy": args.policy,
            "kv_connector_extra_config": {**extra, **json.loads(args.extra)},
        }
    return {**arguments, **json.loads(args.engine)}


def attach_hints(llm, entries: list) -> None:
    """Lets requests carry their envelopes, in order; `LLM` has no argument for them."""
    from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

    add, left = llm.llm_engine.add_request, list(entries)

    def envelope(fields: dict) -> KvHintsEnvelope:
        actions = [KvHintAction(**action) for action in fields["actions"]]
        return KvHintsEnvelope(fields["protocol_version"], fields["message_id"], actions)

    def add_hinted(*args, **kwargs):
        fields = left.pop(0)
        return add(*args, **kwargs, kv_hints=envelope(fields) if fields else None)

    llm.llm_engine.add_request = add_hinted


def run(args: argparse.Namespace) -> dict:
    """Generates, greedily."""
    from vllm import LLM, SamplingParams

    started = time.monotonic()
    llm = LLM(**engine_arguments(args))
    ready = time.monotonic()
    prompts, params, envelopes = [], [], []
    for entry in json.loads(Path(args.prompts).read_text()):
        entry = entry if isinstance(entry, dict) else {"prompt": entry}
        text = entry["prompt"]
        prompt = {"prompt": text} if isinstance(text, str) else {"prompt_token_ids": text}
        prompts.append({**prompt, **({"cache_salt": entry["salt"]} if entry.get("salt") else {})})
        extra = {"extra_args": {"kv_transfer_params": entry["params"]}} if entry.get("params") else {}
        params.append(SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True, **extra))
        envelopes.append(entry.get("kv_hints"))
    if any(envelopes):
        attach_hints(llm, envelopes)
    outputs, seconds = [], []
    batches = [(prompts, params)] if args.together else [([p], [s]) for p, s in zip(prompts, params, strict=True)]
    for batch, settings in batches:
        at = time.monotonic()
        outputs.extend(llm.generate(batch, settings, use_tqdm=False))
        seconds.append(round(time.monotonic() - at, 4))
    time.sleep(args.hold)
    metrics = {m.name: m.value for m in llm.get_metrics() if "prefix_cache" in m.name and hasattr(m, "value")}
    llm.llm_engine.engine_core.shutdown()
    rows = [
        {
            "tokens": list(o.outputs[0].token_ids),
            "cached": o.num_cached_tokens,
            "kv_transfer_params": o.kv_transfer_params,
        }
        for o in outputs
    ]
    return {"outputs": rows, "metrics": metrics, "seconds": {"start": round(ready - started, 2), "generate": seconds}}


def main() -> None:
    """Runs and writes."""
    args = parse()
    folder = tempfile.mkdtemp(prefix="kvtier-counters-")
    try:
        environment(args, folder)
        result = run(args)
        files = sorted(Path(folder).glob("*.json"))
        result["counters"] = [{"role": f.name.split("-")[0], **json.loads(f.read_text())} for f in files]
        Path(args.out).write_text(json.dumps(result, indent=1))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
