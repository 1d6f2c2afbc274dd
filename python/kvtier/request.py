"""What the scheduler side keeps of one request."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from kvtier import hints as hint
from kvtier.shape import Group


# Where what a hit brings may lie.
TIERS = ("device", "host", "disk", "object", "peer")


@dataclass
class Lookup:
    """A submitted lookup; it is released exactly once."""

    # When this side gives up, whatever the library says.
    deadline: float
    # What the engine held itself when it last asked.
    local_tokens: int = 0
    # The usable prefix it was last told of, and the tiers of the part beyond its own.
    tokens: int = 0
    tiers: dict[str, int] = field(default_factory=dict)
    expired: bool = False


@dataclass
class Load:
    """A claimed hit that is being loaded."""

    local_tokens: int
    claimed_tokens: int
    sync: bool
    # Blocks (group, index) that are not there after all, and those of them that were there with other bytes.
    lost: list[tuple[int, int]] = field(default_factory=list)
    corrupt: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Ticket:
    """A reservation under way for `count` blocks of a group."""

    group: int
    first: int
    count: int
    ticket: int
    # Asked for a second time.
    again: bool = False


@dataclass
class Saves:
    """What became of the request's blocks on their way into the cache."""

    started: bool = False
    # Next block to reserve, by group.
    next: list[int] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    # (group, index) -> frames by shard.
    granted: dict[tuple[int, int], list[bytes]] = field(default_factory=dict)
    # Blocks that were busy and are asked for once more, and when.
    busy: list[tuple[int, int]] = field(default_factory=list)
    busy_until: float = 0.0
    # Batches that some rank still copies.
    batches: set[int] = field(default_factory=set)

    @property
    def idle(self) -> bool:
        """Nothing is reserved, asked for or under way."""
        return not (self.tickets or self.granted or self.batches)


@dataclass
class Draining:
    """A finished request whose blocks vLLM keeps until the workers report it sent."""

    block_ids: tuple[list[int], ...]
    complete_tokens: int
    deadline: float
    # The workers were told that nothing more will come.
    told: bool = False


@dataclass
class RequestState:
    """One request, from its arrival until nothing of it is under way."""

    request: Any
    hints: hint.Hints
    # Never looked up or saved: its hashes do not say all that its KV depends on.
    bypass: bool = False
    # A load failed: it is never looked up again.
    failed: bool = False
    lookups: int = 0
    # Preemptions noticed so far.
    preemptions: int = 0
    # Until when it may wait for frames before it is scheduled.
    frames_until: float = 0.0
    # When it first asked for a hit while a rank was not attached.
    asked_at: float = 0.0
    lookup: Lookup | None = None
    load: Load | None = None
    saves: Saves = field(default_factory=Saves)
    # Its KV was computed under another namespace revision: nothing of it is saved any more.
    stale: bool = False
    draining: Draining | None = None
    finished: bool = False

    @classmethod
    def new(cls, request: Any) -> RequestState:
        """The state of a request that just arrived."""
        # An adapter's name and path are in the hash, its weights are not.
        bypass = getattr(request, "lora_request", None) is not None
        return cls(request, hint.collect(request), bypass)

    @property
    def id(self) -> str:
        """vLLM's request id."""
        return self.request.request_id

    @property
    def computed_tokens(self) -> int:
        """Tokens that are known and computed: vLLM counts ahead of what it knows."""
        return min(self.request.num_computed_tokens, self.request.num_tokens)

    def hashed_blocks(self, group: Group) -> int:
        """Blocks of a group whose hash is known."""
        return len(self.request.block_hashes) // group.hashes_per_block

    def block_hash(self, group: Group, index: int) -> bytes:
        """The engine hash that names a block."""
        return bytes(self.request.block_hashes[(index + 1) * group.hashes_per_block - 1])


def now() -> float:
    """Seconds of a clock that does not jump."""
    return time.monotonic()
