"""An engine without vLLM: KV tensors in vLLM's layouts, filled and compared bit by bit, over the C library.

    engine.py write  --socket S --seed N [--layout apart|together]     fills blocks, saves them, ends
    engine.py read   --socket S --seed N --expect device|host|disk     another process reads them back elsewhere
    engine.py churn  --socket S --seed N                               saves and loads until it is killed; says when it began
    engine.py outlive --socket S --seed N --pid P                      loads while kvtierd is killed with -9
    engine.py matmul --socket S --seed N                               a matrix product alone, and beside loads and saves

On a GPU the tensors are CUDA's and copies follow the current stream; over the twin they are host memory that stands for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time

import torch
from kvtier import _native as native
from kvtier import spec as specs
from kvtier.hints import Hints
from kvtier.session import Session

LAYERS, BLOCK_TOKENS, HEADS, HEAD_DIM = 32, 16, 8, 128
PATIENCE_S = 60
DEADLINE_MS = 30_000


class Failed(Exception):
    """What was promised did not happen."""


def until(what: str, condition) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {PATIENCE_S} s")
        time.sleep(0.01)


class Engine:
    """One engine's memory and its two sessions."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.count = args, args.blocks
        self.place = torch.device("cuda", 0) if args.backend == "cuda" else torch.device("cpu")
        shape = (2, 2 * self.count) if args.layout == "apart" else (2 * self.count, 2)
        shape += (BLOCK_TOKENS, HEADS, HEAD_DIM)
        self.kv = [torch.zeros(shape, dtype=torch.bfloat16, device=self.place) for _ in range(args.layers)]
        regions = [row for n, t in enumerate(self.kv) for row in specs._regions(0, f"l{n}", t, 2 * self.count)]
        self.spec = self._spec(sum(row[4] for row in regions))
        worker = {**self.spec, "role": "worker", "device": {"backend": args.backend, "ordinal": 0}}
        self.worker, self.scheduler = Session(worker), Session(self.spec)
        self.worker.register_regions(regions)
        for session in (self.worker, self.scheduler):
            until("the daemon attaches the engine", lambda s=session: s.state()[0] == "attached")

    def _spec(self, block_bytes: int) -> dict:
        args = self.args
        return {
            "socket": args.socket,
            "engine_id": f"gpu-check-{os.getpid()}",
            "role": "scheduler",
            "namespace": {
                "model": f"gpu-check-{args.layout}",
                "weights_digest": "none",
                "kv_dtype": "bfloat16",
                "quantization": "",
                "adapter_digest": "",
                "hash_algorithm": "sha256_cbor",
                "hash_seed": "0",
                "hash_block_tokens": BLOCK_TOKENS,
                "revision": "",
            },
            "layout": {
                "attention_backend": "FLASH_ATTN",
                "isa": "cuda",
                "layout": args.layout,
                "tensor_parallel": 1,
                "pipeline_parallel": 1,
                "prefill_context_parallel": 1,
                "decode_context_parallel": 1,
                "shards": 1,
                "groups": [
                    {"kind": "full", "block_tokens": BLOCK_TOKENS, "layers": [f"l{n}" for n in range(args.layers)]}
                ],
                "block_bytes": [block_bytes],
            },
        }

    def stream(self) -> int:
        return torch.cuda.current_stream(self.place).cuda_stream if self.args.backend == "cuda" else 0

    def hashes(self, seed: int) -> list[bytes]:
        return [hashlib.sha256(f"{seed} {block}".encode()).digest() for block in range(self.count)]

    def bits(self, layer: torch.Tensor, block: int) -> torch.Tensor:
        """A block's part of a layer, as whole numbers: NaNs compare equal to themselves."""
        whole = layer.view(torch.int16)
        return whole[:, block] if self.args.layout == "apart" else whole[block]

    def content(self, seed: int, block: int, layer: int) -> torch.Tensor:
        """What a block's part of a layer holds: made on the CPU, so that every process and device makes the same."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block * 1009 + layer)
        shape = (2, BLOCK_TOKENS, HEADS, HEAD_DIM)
        return torch.randint(-32768, 32768, shape, dtype=torch.int16, generator=generator)

    def fill(self, seed: int) -> None:
        for block in range(self.count):
            for number, layer in enumerate(self.kv):
                self.bits(layer, block).copy_(self.content(seed, block, number), non_blocking=True)

    def differing(self, seed: int, where: list[int]) -> list[int]:
        same = lambda block, at, number, layer: torch.equal(
            self.bits(layer, at).cpu(), self.content(seed, block, number)
        )
        return [
            block
            for block, at in enumerate(where)
            if not all(same(block, at, number, layer) for number, layer in enumerate(self.kv))
        ]

    def save(self, seed: int) -> bytes:
        """Saves those of the first blocks that are not stored already; answers a result each."""
        hashes, batch, results = self.hashes(seed), 16, b""
        for first in range(0, self.count, batch):
            part = hashes[first : first + batch]
            ticket = self.scheduler.reserve_submit(0, first, part, hashes[first - 1] if first else None, Hints())
            answer = []
            until("the reservation is answered", lambda t=ticket, n=len(part): self._poll(t, n, answer))
            states, frames = answer[0]
            blocks = [n for n, state in enumerate(states) if state == native.GRANTED]
            transfers = b"".join(self.transfer(frames, n, first + n) for n in blocks)
            if not transfers:
                continue
            job = self.worker.save_submit(transfers, DEADLINE_MS, self.stream())
            results += self.worker.job_wait(job, len(blocks), DEADLINE_MS + 10_000) or bytes(len(blocks))
        return results

    def _poll(self, ticket: int, count: int, answer: list) -> bool:
        found = self.scheduler.reserve_poll(ticket, count, 1)
        if found is not None:
            answer.append(found)
        return found is not None

    @staticmethod
    def transfer(frames: bytes, index: int, block: int) -> bytes:
        frame = frames[index * native.FRAME_BYTES : (index + 1) * native.FRAME_BYTES]
        return frame + block.to_bytes(4, "little") + bytes(4)

    def lookup(self, seed: int, request: str) -> native.Hit:
        self.scheduler.lookup_submit(request, self.hashes(seed), DEADLINE_MS, Hints())
        found = []

        def answered() -> bool:
            hit = self.scheduler.lookup_poll(request, 0, self.count * BLOCK_TOKENS)
            if hit is not None:
                found.append(hit)
            return hit is not None

        until("the lookup is answered", answered)
        return found[0]

    def load(self, seed: int, request: str, where: list[int], tokens: int) -> bytes:
        count = tokens // BLOCK_TOKENS
        frames = self.scheduler.lookup_frames(request, 0, 0, 0, count) if count else b""
        transfers = b"".join(self.transfer(frames, n, where[n]) for n in range(count))
        job = self.worker.load_submit(request, transfers, DEADLINE_MS, self.stream())
        results = self.worker.job_wait(job, count, DEADLINE_MS + 10_000) or bytes(count)
        self.scheduler.release(request, 0, tokens, 0)
        return results

    def elsewhere(self, seed: int) -> list[int]:
        """Blocks to load into, none of them where it was saved from."""
        where = list(range(self.count, 2 * self.count))
        random.Random(seed).shuffle(where)
        return where

    def close(self) -> None:
        self.worker.close(5000)
        self.scheduler.close(5000)


def write(engine: Engine, seed: int) -> dict:
    engine.fill(seed)
    # Not waited for: the save comes after what the stream was given.
    results = engine.save(seed)
    if results.count(native.DONE) != len(results):
        raise Failed(f"of {len(results)} blocks {results.count(native.DONE)} were saved")
    until("the daemon has all blocks", lambda: engine.worker.counters()["seals_applied"] >= len(results))
    return {"saved": len(results)}


def read(engine: Engine, seed: int, expect: str) -> dict:
    hit = engine.lookup(seed, "read")
    tokens = engine.count * BLOCK_TOKENS
    came = {name: getattr(hit, name) for name in ("device", "host", "disk")}
    if came[expect] != tokens:
        raise Failed(f"{tokens} tokens should come from {expect}, there came {came}")
    where = engine.elsewhere(seed)
    results = engine.load(seed, "read", where, hit.tokens)
    if results.count(native.DONE) != engine.count:
        raise Failed(f"of {engine.count} blocks {results.count(native.DONE)} were loaded")
    if wrong := engine.differing(seed, where):
        raise Failed(f"blocks {wrong} differ from what was written")
    pinned = engine.worker.counters()["extents_pinned"]
    return {"loaded": engine.count, "from": expect, "extents_pinned": pinned}


def churn(engine: Engine, seed: int) -> dict:
    """Goes on until it is killed in the middle of something."""
    for round_ in range(1_000_000):
        engine.fill(seed + round_ % 4)
        engine.save(seed + round_ % 4)
        if round_ == 1:
            print("churning", flush=True)
        hit = engine.lookup(seed, f"churn-{round_}")
        if hit.tokens:
            engine.load(seed, f"churn-{round_}", engine.elsewhere(seed), hit.tokens)
    return {}


def outlive(engine: Engine, seed: int, pid: int) -> dict:
    """Loads again and again; the daemon dies between two loads and in one. Nothing wrong, nothing that hangs."""
    where, outcomes = engine.elsewhere(seed), []
    for round_ in range(40):
        hit = engine.lookup(seed, f"outlive-{round_}")
        if hit.tokens == 0:
            outcomes.append("miss")
            if len(outcomes) > 3 and outcomes[-3:] == ["miss"] * 3:
                break
            continue
        if round_ == 3:
            os.kill(pid, signal.SIGKILL)
        results = engine.load(seed, f"outlive-{round_}", where, hit.tokens)
        done = [n for n, result in enumerate(results) if result == native.DONE]
        wrong = [n for n in engine.differing(seed, where) if n in done]
        if wrong:
            raise Failed(f"blocks {wrong} were told loaded and differ")
        outcomes.append(f"{len(done)} loaded")
    if engine.args.backend == "cuda":
        # The GPU still works for the engine.
        total = torch.ones(1024, device=engine.place).sum().item()
        if total != 1024:
            raise Failed("the GPU computes nonsense after the daemon died")
    return {"outcomes": outcomes}


def matmul(engine: Engine, seed: int) -> dict:
    """How much slower a matrix product is while blocks move."""
    if engine.args.backend != "cuda":
        return {"skipped": "no GPU"}
    size = 8192
    a = torch.randn(size, size, device=engine.place, dtype=torch.bfloat16)

    def rate(seconds: float, moving) -> float:
        torch.cuda.synchronize()
        begin, products = time.monotonic(), 0
        while time.monotonic() - begin < seconds:
            for _ in range(10):
                torch.mm(a, a)
            products += 10
            moving()
            torch.cuda.synchronize()
        return products * 2 * size**3 / (time.monotonic() - begin) / 1e12

    write(engine, seed)
    rate(1, lambda: None)
    alone = rate(3, lambda: None)
    state = {"round": 0, "bytes": 0}

    def moving() -> None:
        # On a stream of its own: the product does not wait for what it does not need.
        with torch.cuda.stream(side):
            request = f"matmul-{state['round']}"
            hit = engine.lookup(seed, request)
            engine.load(seed, request, engine.elsewhere(seed), hit.tokens)
            state["round"] += 1
            state["bytes"] += engine.spec["layout"]["block_bytes"][0] * engine.count

    side = torch.cuda.Stream()
    begin = time.monotonic()
    beside = rate(3, moving)
    moved = state["bytes"] / (time.monotonic() - begin) / 1e9
    return {"tflops_alone": alone, "tflops_beside_loads": beside, "loads_gb_s": moved, "ratio": beside / alone}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=["write", "read", "churn", "outlive", "matmul"])
    parser.add_argument("--socket", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--backend", choices=["cuda", "twin"], default="cuda")
    parser.add_argument("--layout", choices=["apart", "together"], default="apart")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--expect", choices=["device", "host", "disk"], default="host")
    parser.add_argument("--pid", type=int, default=0)
    args = parser.parse_args()
    engine = Engine(args)
    try:
        roles = {
            "write": lambda: write(engine, args.seed),
            "read": lambda: read(engine, args.seed, args.expect),
            "churn": lambda: churn(engine, args.seed),
            "outlive": lambda: outlive(engine, args.seed, args.pid),
            "matmul": lambda: matmul(engine, args.seed),
        }
        print(json.dumps(roles[args.role]()), flush=True)
    except Failed as failure:
        print(f"FAILED: {failure}", flush=True)
        return 1
    finally:
        engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
