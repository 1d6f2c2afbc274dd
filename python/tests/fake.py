"""A twin of `kvtier.session.Session` in plain Python, for tests without the library and the daemon.

Blocks are files in a folder, so that one process reads what another wrote. Faults are set by attribute, or by the JSON
in KVTIER_FAKE: {"store": folder, "lookup_polls": n, "reserve_polls": n, "job_polls": n, "lose": [block indices]}.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from pathlib import Path

from kvtier import _native as native


class FakeSession:
    """Same methods as Session; every call is noted in `calls`."""

    def __init__(self, spec: dict, **faults: object) -> None:
        faults = {**json.loads(os.environ.get("KVTIER_FAKE", "{}")), **faults}
        self.spec = json.loads(json.dumps(spec))
        self.store = Path(faults.get("store") or "/nonexistent")
        self.lookup_polls = faults.get("lookup_polls", 0)
        self.reserve_polls = faults.get("reserve_polls", 0)
        self.job_polls = faults.get("job_polls", 0)
        self.lose = set(faults.get("lose", []))
        self.calls: list[tuple] = []
        self.lookups: dict[str, dict] = {}
        self.released: list[tuple] = []
        self.abandoned: list[bytes] = []
        self.tickets: dict[int, dict] = {}
        self.jobs: dict[int, dict] = {}
        self.regions: list[tuple] = []
        self.memory: dict[bytes, bytes] = {}
        self.hinted: list[tuple] = []
        # Request -> outcomes, as the daemon would tell them.
        self.outcomes: dict[str, list] = {}
        self.closed = False
        self.number = 0
        layout = spec["layout"]
        self.groups = layout["groups"]
        self.block_bytes = layout["block_bytes"]
        self.shards = layout["shards"]
        self.hash_tokens = spec["namespace"]["hash_block_tokens"]

    def _next(self) -> int:
        self.number += 1
        return self.number

    def _key(self, group: int, engine_hash: bytes) -> bytes:
        identity = json.dumps([self.spec["namespace"], self.spec["layout"]], sort_keys=True).encode()
        return hashlib.sha256(identity + bytes([group]) + engine_hash).digest()

    def _path(self, key: bytes, shard: int) -> Path:
        return self.store / f"{key.hex()}.{shard}"

    def _stored(self, key: bytes) -> bool:
        return all(self._path(key, shard).exists() for shard in range(self.shards))

    def _frame(self, key: bytes, group: int, shard: int, index: int) -> bytes:
        frame = native.Frame(group=group, shard=shard, source=2, offset=index, bytes=self.block_bytes[group])
        frame.key[:] = key
        return bytes(frame)

    def state(self):
        return "attached", ""

    def counters(self):
        return {"fake": True}

    def close(self, deadline_ms):
        self.closed = True

    def switch_namespace(self, revision):
        self.calls.append(("switch", revision))
        self.spec["namespace"]["revision"] = revision
        self.lookups.clear()

    # Scheduler side.

    def lookup_submit(self, request_id, hashes, deadline_ms, hints):
        self.calls.append(("lookup", request_id, hints.text))
        self.lookups[request_id] = {"hashes": hashes, "polls": self.lookup_polls}

    def _available(self, hashes, group, index):
        per = self.groups[group]["block_tokens"] // self.hash_tokens
        at = (index + 1) * per - 1
        return at < len(hashes) and self._stored(self._key(group, hashes[at]))

    def lookup_poll(self, request_id, computed_tokens, max_tokens):
        lookup = self.lookups.get(request_id)
        if lookup is None:
            return native.Hit()
        if lookup["polls"] > 0:
            lookup["polls"] -= 1
            return None
        step = max(g["block_tokens"] for g in self.groups)
        end = min(max_tokens, len(lookup["hashes"]) * self.hash_tokens) // step * step
        while end > computed_tokens and not self._usable(lookup["hashes"], computed_tokens, end):
            end -= step
        tokens = end if end > computed_tokens else 0
        return native.Hit(tokens=tokens, host=max(tokens - computed_tokens, 0))

    def _usable(self, hashes, computed, end):
        for group, spec in enumerate(self.groups):
            size = spec["block_tokens"]
            first = max(end - (spec["window_tokens"] - 1), 0) if spec["window_tokens"] else 0
            needed = range(max(first, computed) // size, end // size)
            if not all(self._available(hashes, group, index) for index in needed):
                return False
        return True

    def lookup_frames(self, request_id, group, shard, first, count):
        hashes = self.lookups[request_id]["hashes"]
        per = self.groups[group]["block_tokens"] // self.hash_tokens
        rows = []
        for index in range(first, first + count):
            if self._available(hashes, group, index):
                rows.append(self._frame(self._key(group, hashes[(index + 1) * per - 1]), group, shard, index))
            else:
                rows.append(bytes(native.FRAME_BYTES))
        return b"".join(rows)

    def release(self, request_id, local_tokens, claimed_tokens, lost_tokens):
        self.released.append((request_id, local_tokens, claimed_tokens, lost_tokens))
        self.lookups.pop(request_id, None)

    def hints_submit(self, request_id, hints):
        self.hinted.append((request_id, hints))

    def hints_outcomes(self, request_id):
        return self.outcomes.pop(request_id, None)

    def reserve_submit(self, group, first, hashes, parent, hints):
        ticket = self._next()
        self.calls.append(("reserve", group, first, len(hashes), hints.text))
        self.tickets[ticket] = {"group": group, "first": first, "hashes": hashes, "polls": self.reserve_polls}
        return ticket

    def reserve_poll(self, ticket, count, shards):
        entry = self.tickets[ticket]
        if entry["polls"] > 0:
            entry["polls"] -= 1
            return None
        del self.tickets[ticket]
        states, frames = [], []
        for number, engine_hash in enumerate(entry["hashes"]):
            key = self._key(entry["group"], engine_hash)
            granted = not self._stored(key)
            states.append(native.GRANTED if granted else native.PRESENT)
            for shard in range(shards):
                frame = self._frame(key, entry["group"], shard, entry["first"] + number)
                frames.append(frame if granted else bytes(native.FRAME_BYTES))
        return bytes(states), b"".join(frames)

    def reserve_abandon(self, frames):
        self.abandoned.extend(frames)

    # Worker side.

    def register_regions(self, regions):
        self.regions = regions

    def _runs(self, group, block_id):
        return [(base + block_id * stride, run) for g, base, _span, stride, run, _n in self.regions if g == group]

    def _job(self, transfers, copy):
        job = self._next()
        rows = [transfers[at : at + native.TRANSFER_BYTES] for at in range(0, len(transfers), native.TRANSFER_BYTES)]
        self.jobs[job] = {"rows": rows, "copy": copy, "polls": self.job_polls, "cancelled": False}
        return job

    def load_submit(self, request_id, transfers, deadline_ms, stream=0):
        self.calls.append(("load", request_id, len(transfers) // native.TRANSFER_BYTES))
        return self._job(transfers, self._load)

    def save_submit(self, transfers, deadline_ms, stream=0):
        self.calls.append(("save", len(transfers) // native.TRANSFER_BYTES))
        return self._job(transfers, self._save)

    def _load(self, transfer):
        frame = transfer.frame
        if frame.offset in self.lose:
            return native.LOST
        at, data = 0, self._path(bytes(frame.key), frame.shard).read_bytes()
        for address, run in self._runs(frame.group, transfer.block_id):
            ctypes.memmove(address, data[at : at + run], run)
            at += run
        return native.DONE

    def _save(self, transfer):
        frame = transfer.frame
        data = b"".join(ctypes.string_at(a, run) for a, run in self._runs(frame.group, transfer.block_id))
        path = self._path(bytes(frame.key), frame.shard)
        partial = path.with_suffix(f".part{os.getpid()}")
        partial.write_bytes(data)
        partial.rename(path)
        return native.DONE

    def job_wait(self, job, count, timeout_ms=0):
        entry = self.jobs[job]
        if entry["polls"] > 0 and not timeout_ms and not entry["cancelled"]:
            entry["polls"] -= 1
            return None
        del self.jobs[job]
        if entry["cancelled"]:
            return bytes([native.LOST]) * count
        return bytes(entry["copy"](native.Transfer.from_buffer_copy(row)) for row in entry["rows"])

    def job_cancel(self, job):
        self.calls.append(("cancel", job))
        self.jobs[job]["cancelled"] = True
