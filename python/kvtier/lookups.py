"""Scheduler side of loads: lookups submitted ahead, polled locally, claimed once, released exactly once.

A request whose load failed is never looked up again, and the blocks that failed are left out of other requests' hits
for a while: without both, vLLM would retry a failed first block for ever.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

from kvtier._native import FRAME_BYTES, KEY_BYTES, NativeError
from kvtier.metadata import ZERO_KEY, LoadTask, transfer
from kvtier.request import TIERS, Load, Lookup, RequestState, now
from kvtier.session import Session
from kvtier.shape import Shape

logger = logging.getLogger("vllm.kvtier")

# How much longer than the library this side waits for an answer.
_GRACE_S = 0.1
# A preempted request may be looked up again, but not for ever.
_MAX_LOOKUPS = 8
# Bounds of the memory of failed blocks. What was corrupt stays so until the daemon has dropped it; what was lost, or
# came too late, may be there again at once: the pause keeps requests of one prefix from failing one after another.
_CORRUPT_TTL_S = 30.0
_LOST_TTL_S = 5.0
_MAX_FAILED = 4096


class Lookups:
    """Lookups and loads of all requests of one engine."""

    def __init__(self, session: Session, shape: Shape, sync: bool, timeout_ms: int) -> None:
        self._session = session
        self._shape = shape
        self.sync = sync
        self._timeout_ms = timeout_ms
        # (group, engine hash) -> when it may be believed again; the first to fail first.
        self._failed: OrderedDict[tuple[int, bytes], float] = OrderedDict()
        self.counters = {"lookups": 0, "hit_tokens": 0, "failed_loads": 0, "lost_tokens": 0, "expired_lookups": 0}

    def submit(self, state: RequestState) -> None:
        """Asks for a request's prefix, unless it may not be asked for."""
        barred = state.bypass or state.failed or state.lookup is not None or state.lookups >= _MAX_LOOKUPS
        if barred or state.request.skip_reading_prefix_cache:
            return
        # No further than a hit may go: of a window, the cache leases only what the longest prefix needs.
        hashes = state.request.block_hashes[: self._limit(state) // self._shape.hash_tokens]
        if not hashes:
            return
        state.lookups += 1
        try:
            self._session.lookup_submit(state.id, [bytes(h) for h in hashes], self._timeout_ms, state.hints)
        except NativeError as error:
            logger.debug("lookup of %s not submitted: %s", state.id, error)
            return
        state.lookup = Lookup(now() + self._timeout_ms / 1000 + _GRACE_S)
        self.counters["lookups"] += 1

    def matched(self, state: RequestState, computed: int) -> int | None:
        """Tokens beyond `computed` that can be loaded; None while the answer is awaited."""
        self.submit(state)
        lookup = state.lookup
        if lookup is None or lookup.expired or state.load is not None:
            return 0
        lookup.local_tokens = computed
        limit = self._limit(state)
        hit = self._session.lookup_poll(state.id, computed, limit)
        if hit is None:
            if now() < lookup.deadline:
                return None
            lookup.expired = True
            self.counters["expired_lookups"] += 1
            return 0
        tokens = min(hit.tokens, limit) // self._shape.step * self._shape.step
        lookup.tokens, lookup.tiers = tokens, {name: getattr(hit, name) for name in TIERS}
        return max(tokens - computed, 0)

    def _limit(self, state: RequestState) -> int:
        """The longest prefix a hit may have."""
        tokens = state.request.num_tokens
        limit = tokens if self._shape.whole_prompt and not self.sync else tokens - 1
        self._forget_failed()
        if self._failed:
            for group in self._shape.groups:
                for index in range(min(limit // group.block_tokens, state.hashed_blocks(group))):
                    if self._failed.get((group.index, state.block_hash(group, index)), 0.0) > now():
                        limit = index * group.block_tokens
                        break
        return limit // self._shape.step * self._shape.step

    def claim(self, state: RequestState, block_ids: Sequence[list[int]], tokens: int, null_block: int) -> LoadTask:
        """Plans the load of the `tokens` vLLM took; it always answers a task, if need be one that fails at once."""
        local = state.lookup.local_tokens if state.lookup else 0
        state.load = Load(local, tokens, self.sync)
        self.counters["hit_tokens"] += tokens
        task = LoadTask(state.id, self.sync, transfers=[b""] * self._shape.shards)
        parts: list[list[bytes]] = [[] for _ in range(self._shape.shards)]
        for group in self._shape.groups:
            first, end = local // group.block_tokens, (local + tokens) // group.block_tokens
            frames = self._frames(state, group.index, first, end - first)
            ids = block_ids[group.index]
            for index in range(first, min(end, len(ids))):
                if ids[index] == null_block:
                    continue
                block, at = (group.index, index, ids[index]), (index - first) * FRAME_BYTES
                found = [shard[at : at + FRAME_BYTES] for shard in frames]
                if len(found) == self._shape.shards and all(f[:KEY_BYTES] != ZERO_KEY and f for f in found):
                    task.blocks.append(block)
                    for part, frame in zip(parts, found, strict=True):
                        part.append(transfer(frame, ids[index]))
                else:
                    task.missing.append(block)
        task.transfers = [b"".join(part) for part in parts]
        return task

    def _frames(self, state: RequestState, group: int, first: int, count: int) -> list[bytes]:
        if count <= 0:
            return []
        try:
            shards = range(self._shape.shards)
            return [self._session.lookup_frames(state.id, group, shard, first, count) for shard in shards]
        except NativeError as error:
            logger.warning("the frames of a hit of %s are gone: %s", state.id, error)
            return []

    def finish(self, state: RequestState) -> int:
        """The load ended on all ranks: answers up to where the request's prefix is valid, in tokens."""
        load, state.load = state.load, None
        if load is None:
            return 0
        end = valid = load.local_tokens + load.claimed_tokens
        if load.lost:
            state.failed = True
            self._remember_failed(state, load)
            starts = [index * self._shape.groups[group].block_tokens for group, index in load.lost]
            single = len(self._shape.groups) == 1
            valid = max(min(starts), load.local_tokens) if single else load.local_tokens
            self.counters["failed_loads"] += 1
            self.counters["lost_tokens"] += end - valid
        self.release(state, load.claimed_tokens, end - valid)
        return valid

    def release(self, state: RequestState, claimed: int = 0, lost: int = 0) -> None:
        """Ends the request's lookup, if it has one."""
        lookup, state.lookup = state.lookup, None
        if lookup is None:
            return
        try:
            self._session.release(state.id, lookup.local_tokens, claimed, lost)
        except NativeError as error:
            logger.debug("lookup of %s not released: %s", state.id, error)

    def _remember_failed(self, state: RequestState, load: Load) -> None:
        corrupt = set(load.corrupt)
        for group, index in load.lost[:_MAX_FAILED]:
            view = self._shape.groups[group]
            if index < state.hashed_blocks(view):
                key = (group, state.block_hash(view, index))
                self._failed.pop(key, None)
                self._failed[key] = now() + (_CORRUPT_TTL_S if (group, index) in corrupt else _LOST_TTL_S)
        while len(self._failed) > _MAX_FAILED:
            self._failed.popitem(last=False)

    def _forget_failed(self) -> None:
        while self._failed:
            key = next(iter(self._failed))
            if self._failed[key] > now():
                return
            del self._failed[key]
