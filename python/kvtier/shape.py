"""The groups, shards and ranks of an engine as the scheduler side needs them: a view of the session's spec."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """One KV cache group."""

    index: int
    kind: str
    block_tokens: int
    # Engine hashes under one block; the last one names it.
    hashes_per_block: int

    @property
    def durable(self) -> bool:
        """Whether a block stays in place for as long as its request holds it."""
        return self.kind in ("full", "mla")


@dataclass(frozen=True)
class Shape:
    """All groups, and who holds which part of a block."""

    groups: tuple[Group, ...]
    shards: int
    # Processes that report each batch of saves.
    ranks: int
    hash_tokens: int
    # Tokens between two possible ends of a hit.
    step: int

    @classmethod
    def of(cls, spec: dict, ranks: int) -> Shape:
        """The shape a spec describes."""
        layout, hash_tokens = spec["layout"], spec["namespace"]["hash_block_tokens"]
        groups = tuple(
            Group(index, group["kind"], group["block_tokens"], group["block_tokens"] // hash_tokens)
            for index, group in enumerate(layout["groups"])
        )
        return cls(groups, layout["shards"], ranks, hash_tokens, math.lcm(*(g.block_tokens for g in groups)))

    @property
    def whole_prompt(self) -> bool:
        """Whether a hit may cover the last token too. vLLM then computes that token again, with one more token of the
        past in its window than the hit's end needs: only groups that keep everything can serve it."""
        return all(group.durable for group in self.groups)
