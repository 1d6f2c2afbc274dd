"""Scheduler side of saves: frames reserved ahead, shipped with the step that completes their blocks.

Only blocks whose every token is known and computed by the end of the step are shipped, each once. A finished request
keeps its blocks until the workers have copied what was shipped, and for a short grace while reservations are answered.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

from kvtier._native import BUSY, FRAME_BYTES, GRANTED, LIMIT, PRESENT, NativeError
from kvtier.metadata import SaveTask, transfer
from kvtier.request import RequestState, Ticket, now
from kvtier.session import Session
from kvtier.shape import Group, Shape

logger = logging.getLogger("vllm.kvtier")

# Most blocks of one reservation; the daemon bounds it too.
_MAX_RESERVE = 512
# After how long blocks that were busy are asked for again.
_BUSY_S = 0.05
# Most reservations that are followed up after their request went away.
_MAX_ORPHANS = 4096


class SaveBook:
    """Reservations and saves of all requests of one engine."""

    def __init__(self, session: Session, shape: Shape, null_block: int = 0) -> None:
        self._session = session
        self._shape = shape
        self.groups = shape.groups
        self.null_block = null_block
        self._numbers = itertools.count(1)
        # Batch -> (request, ranks that still copy it).
        self._batches: dict[int, tuple[RequestState, int]] = {}
        # Reservations whose request went away before their answer came.
        self._orphans: list[Ticket] = []
        self.counters = {"reserved": 0, "granted": 0, "present": 0, "busy": 0, "saved": 0, "abandoned": 0}

    def start(self, state: RequestState, present_tokens: int) -> None:
        """The request begins to compute; what lies before `present_tokens` is in the cache already."""
        if not state.saves.started:
            state.saves.started = True
            state.saves.next = [present_tokens // group.block_tokens for group in self._shape.groups]

    def reserve(self, state: RequestState, block_ids: Sequence[list[int]], upto_tokens: int) -> None:
        """Asks for frames for the blocks up to there that have a hash and were not asked for."""
        if not state.saves.started or state.stale or state.bypass:
            return
        for group in self._shape.groups:
            if not self._reserve_again(state, group, block_ids[group.index]):
                return
            end = min(upto_tokens // group.block_tokens, state.hashed_blocks(group))
            while (first := state.saves.next[group.index]) < end:
                count = self._run(state, group, block_ids[group.index], first, end)
                if count and not self._submit(state, group, first, count):
                    return
                state.saves.next[group.index] = first + max(count, 1)

    def _reserve_again(self, state: RequestState, group: Group, ids: list[int]) -> bool:
        """Asks once more for blocks that were busy: the cache may have grown, or somebody else given up."""
        if not state.saves.busy or now() < state.saves.busy_until:
            return True
        mine = sorted(index for place, index in state.saves.busy if place == group.index)
        while mine:
            count = self._run(state, group, ids, mine[0], mine[0] + _adjacent(mine))
            if count and not self._submit(state, group, mine[0], count, again=True):
                return False
            count = max(count, 1)
            state.saves.busy = [p for p in state.saves.busy if p[0] != group.index or p[1] not in mine[:count]]
            mine = mine[count:]
        return True

    def _run(self, state: RequestState, group: Group, ids: list[int], first: int, end: int) -> int:
        """Blocks from `first` on that are in place; 0 when the first is out of its window already."""

        def gone(index: int) -> bool:
            return index < len(ids) and ids[index] == self.null_block

        if gone(first):
            return 0
        last = first + 1
        while last < min(end, first + _MAX_RESERVE) and not gone(last):
            last += 1
        return last - first

    def _submit(self, state: RequestState, group: Group, first: int, count: int, again: bool = False) -> bool:
        hashes = [state.block_hash(group, index) for index in range(first, first + count)]
        parent = state.block_hash(group, first - 1) if first else None
        try:
            ticket = self._session.reserve_submit(group.index, first, hashes, parent, state.hints)
        except NativeError as error:
            # Too many at once: asked for again next step. Anything else: these blocks are not saved.
            logger.debug("no reservation for %s: %s", state.id, error)
            self.counters["busy"] += count
            return error.status != LIMIT
        self.counters["reserved"] += count
        state.saves.tickets.append(Ticket(group.index, first, count, ticket, again))
        return True

    def unreserved(self, state: RequestState) -> bool:
        """Whether a block with a known hash was not asked for yet."""
        saves = state.saves
        if state.stale:
            return False
        again = bool(saves.busy) and now() >= saves.busy_until
        return again or any(saves.next[group.index] < state.hashed_blocks(group) for group in self.groups)

    def trim(self, state: RequestState, complete_tokens: int) -> None:
        """The request ends: gives up the frames of blocks that will never be complete."""
        late = [p for p in state.saves.granted if (p[1] + 1) * self.groups[p[0]].block_tokens > complete_tokens]
        self.abandon([frame for place in late for frame in state.saves.granted.pop(place)])

    def poll(self, state: RequestState) -> None:
        """Takes the answers that are there."""
        waiting = []
        for ticket in state.saves.tickets:
            answer = self._session.reserve_poll(ticket.ticket, ticket.count, self._shape.shards)
            if answer is None:
                waiting.append(ticket)
            else:
                self._take(state, ticket, *answer)
        state.saves.tickets = waiting

    def _take(self, state: RequestState, ticket: Ticket, states: bytes, frames: bytes) -> None:
        width = self._shape.shards * FRAME_BYTES
        for number, outcome in enumerate(states):
            if outcome == GRANTED:
                row = frames[number * width : (number + 1) * width]
                split = [row[at : at + FRAME_BYTES] for at in range(0, width, FRAME_BYTES)]
                state.saves.granted[ticket.group, ticket.first + number] = split
            elif outcome == BUSY and not ticket.again:
                state.saves.busy.append((ticket.group, ticket.first + number))
                state.saves.busy_until = now() + _BUSY_S
        self.counters["granted"] += states.count(GRANTED)
        self.counters["present"] += states.count(PRESENT)
        self.counters["busy"] += states.count(BUSY)

    def ship(self, state: RequestState, block_ids: Sequence[list[int]], complete_tokens: int) -> SaveTask | None:
        """The granted blocks that are complete by the end of this step, as a task."""
        durable: list[list[bytes]] = [[] for _ in range(self._shape.shards)]
        volatile: list[list[bytes]] = [[] for _ in range(self._shape.shards)]
        shipped, unused = [], []
        for place, frames in state.saves.granted.items():
            group, index = self._shape.groups[place[0]], place[1]
            if (index + 1) * group.block_tokens > complete_tokens:
                continue
            ids = block_ids[group.index]
            shipped.append(place)
            if index >= len(ids) or ids[index] == self.null_block:
                unused.extend(frames)
                continue
            for part, frame in zip(durable if group.durable else volatile, frames, strict=True):
                part.append(transfer(frame, ids[index]))
        for place in shipped:
            del state.saves.granted[place]
        self.abandon(unused)
        if not durable[0] and not volatile[0]:
            return None
        batch = next(self._numbers)
        self._batches[batch] = (state, self._shape.ranks)
        state.saves.batches.add(batch)
        self.counters["saved"] += len(durable[0]) + len(volatile[0])
        return SaveTask(batch, state.id, [b"".join(p) for p in durable], [b"".join(p) for p in volatile])

    def copied(self, batch: int, ranks: int) -> None:
        """So many ranks ended their copies of a batch."""
        state, left = self._batches.get(batch, (None, 0))
        if state is None:
            return
        if left > ranks:
            self._batches[batch] = (state, left - ranks)
        else:
            del self._batches[batch]
            state.saves.batches.discard(batch)

    def drop(self, state: RequestState) -> None:
        """Gives up what the request reserved and did not ship."""
        # The daemon reaps what is beyond the bound when it is not sealed in time.
        self._orphans = (self._orphans + state.saves.tickets)[:_MAX_ORPHANS]
        state.saves.tickets, state.saves.busy = [], []
        granted, state.saves.granted = state.saves.granted, {}
        self.abandon([frame for frames in granted.values() for frame in frames])

    def sweep(self) -> None:
        """Gives up the frames of answers nobody waits for any more."""
        waiting = []
        for ticket in self._orphans:
            answer = self._session.reserve_poll(ticket.ticket, ticket.count, self._shape.shards)
            if answer is None:
                waiting.append(ticket)
            else:
                width = self._shape.shards * FRAME_BYTES
                rows = [answer[1][n * width : (n + 1) * width] for n, kind in enumerate(answer[0]) if kind == GRANTED]
                self.abandon([row[at : at + FRAME_BYTES] for row in rows for at in range(0, width, FRAME_BYTES)])
        self._orphans = waiting

    def forget(self, state: RequestState) -> None:
        """The request is gone: nobody waits for its batches."""
        for batch in state.saves.batches:
            self._batches.pop(batch, None)
        state.saves.batches.clear()

    def abandon(self, frames: list[bytes]) -> None:
        """Gives granted frames up."""
        if not frames:
            return
        self.counters["abandoned"] += len(frames)
        try:
            self._session.reserve_abandon(frames)
        except NativeError as error:
            logger.debug("%d frames not given up: %s", len(frames), error)


def _adjacent(indices: list[int]) -> int:
    """How many of the sorted indices follow the first without a gap."""
    return next((n for n, index in enumerate(indices) if index != indices[0] + n), len(indices))
