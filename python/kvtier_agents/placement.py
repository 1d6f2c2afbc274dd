"""Which of several servers a request goes to.

A `Placer` is asked for each request when a transport knows several servers. Here is the one that needs nobody: a
program and its branches stay where their context is, new ones go where least is under way. Place and NextSteps of a
daemon fit behind the same three methods.

*Bounds*: 4,096 programs are remembered.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtier_agents.programs import Program

MAX_PROGRAMS = 4_096
# How long a server that could not be reached is left alone.
AWAY_SECONDS = 10.0


@dataclass(frozen=True)
class Placement:
    """Where a request goes and why; `priority` is vLLM's, lower first, `None` to leave it."""

    server: str
    reason: str
    priority: int | None = None


class Placer(Protocol):
    """Chooses servers. Called from any thread; must not block for long, and what it raises costs the choice only."""

    def place(self, program: Program | None, servers: Sequence[str]) -> Placement:
        """One of the servers, for a request of this program."""
        ...

    def began(self, server: str) -> None:
        """A request went there."""
        ...

    def ended(self, server: str, reached: bool) -> None:
        """It has its answer, or the server could not be reached."""
        ...


class LocalPlacer:
    """Sticky by program, else least under way."""

    def __init__(self) -> None:
        self._under_way: Counter[str] = Counter()
        self._homes: OrderedDict[str, str] = OrderedDict()
        self._away: dict[str, float] = {}
        self._lock = threading.Lock()

    def place(self, program: Program | None, servers: Sequence[str]) -> Placement:
        now = time.monotonic()
        with self._lock:
            here = [s for s in servers if self._away.get(s, 0.0) <= now] or list(servers)
            root = program.root.id if program else None
            home = self._homes.get(root) if root else None
            if home in here:
                self._homes.move_to_end(root)
                return Placement(home, "its program's context is there")
            server = min(here, key=lambda s: (self._under_way[s], here.index(s)))
            if root:
                self._homes[root] = server
                while len(self._homes) > MAX_PROGRAMS:
                    self._homes.popitem(last=False)
            return Placement(server, "least under way")

    def began(self, server: str) -> None:
        with self._lock:
            self._under_way[server] += 1

    def ended(self, server: str, reached: bool) -> None:
        with self._lock:
            self._under_way[server] -= 1
            if reached:
                self._away.pop(server, None)
            else:
                self._away[server] = time.monotonic() + AWAY_SECONDS
