"""Requests, scheduler outputs and specs as vLLM would hand them to the connector, without vLLM."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fake import FakeSession  # noqa: E402

from kvtier import weights  # noqa: E402
from kvtier.config import Config  # noqa: E402
from kvtier.scheduler import SchedulerSide  # noqa: E402

BLOCK = 16


def spec(windows: tuple[int, ...] = (0,), shards: int = 1) -> dict:
    """A spec with one group a window; 0 is full attention."""
    kinds = ["sliding_window" if window else "full" for window in windows]
    groups = [
        {"kind": kind, "window_tokens": window, "block_tokens": BLOCK, "layers": ["a"]}
        for kind, window in zip(kinds, windows, strict=True)
    ]
    return {
        "namespace": {"hash_block_tokens": BLOCK, "revision": ""},
        "layout": {"groups": groups, "block_bytes": [64] * len(groups), "shards": shards},
    }


def request(name: str, tokens: int, **fields: object) -> SimpleNamespace:
    """A new request whose blocks have hashes of their own, by name of its prefix."""
    prefix = fields.pop("prefix", "p")
    hashes = [hashlib.sha256(f"{prefix}{n}".encode()).digest() for n in range(tokens // BLOCK)]
    values = {
        "request_id": name,
        "num_tokens": tokens,
        "num_computed_tokens": 0,
        "block_hashes": hashes,
        "num_preemptions": 0,
        "skip_reading_prefix_cache": False,
        "kv_transfer_params": None,
        "lora_request": None,
        "cache_salt": None,
        "status": SimpleNamespace(name="FINISHED_STOPPED"),
    }
    return SimpleNamespace(**{**values, **fields})


class Bench:
    """A scheduler side over a fake session, and the steps of an engine."""

    def __init__(
        self, windows: tuple[int, ...] = (0,), shards: int = 1, ranks: int = 1, options=None, **settings
    ) -> None:
        faults = {key: settings.pop(key) for key in list(settings) if key in ("lookup_polls", "reserve_polls", "lose")}
        folder = tempfile.TemporaryDirectory()
        weakref.finalize(self, folder.cleanup)
        self.config = Config(**settings)
        self.spec = spec(windows, shards)
        self.session = FakeSession(self.spec, store=folder.name, **faults)
        options = {"ranks": ranks, "load": True, "save": True, "lookahead_tokens": 64, **(options or {})}
        self.side = SchedulerSide(self.session, self.spec, self.config, options)
        self.blocks: dict[str, tuple[list[int], ...]] = {}
        self.next_block = 1
        weights._epoch = 0

    def store(self, req: SimpleNamespace, blocks: range, groups: range | None = None) -> None:
        """Puts blocks of a request into the store."""
        for group in groups or range(len(self.spec["layout"]["groups"])):
            for index in blocks:
                key = self.session._key(group, req.block_hashes[index])
                for shard in range(self.spec["layout"]["shards"]):
                    self.session._path(key, shard).write_bytes(bytes(64))

    def allocate(self, req: SimpleNamespace, tokens: int, external: int = 0) -> tuple[list[int], ...]:
        """Gives a request new blocks for so many tokens and tells the side."""
        count = -(-tokens // BLOCK)
        groups = len(self.spec["layout"]["groups"])
        ids = []
        for _ in range(groups):
            ids.append(list(range(self.next_block, self.next_block + count)))
            self.next_block += count
        self.blocks[req.request_id] = tuple(ids)
        self.side.allocated(req, tuple(ids), external)
        return tuple(ids)

    def step(self, scheduled: dict[str, int], requests: list[SimpleNamespace] = (), preempted: set[str] = frozenset()):
        """Builds one step's metadata; requests then count what was scheduled."""
        state = SimpleNamespace(get_block_ids=lambda request_id: self.blocks.get(request_id))
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled, preempted_req_ids=set(preempted), kv_connector_block_state=state
        )
        meta = self.side.build_meta(output)
        for req in requests:
            req.num_computed_tokens += scheduled.get(req.request_id, 0)
        return meta
