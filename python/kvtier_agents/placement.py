"""Which of several servers a request goes to.

A `Placer` is asked for each request when a transport knows several servers. `LocalPlacer` needs nobody: a program and its
branches stay where their context is, new ones go where least is under way. `DaemonPlacer` asks kvtierd, which knows where
the context lies and what it costs to have it elsewhere; whenever that fails it does as the first.

*Bounds*: 4,096 programs are remembered; a daemon is waited for no longer than `seconds`, and left alone for a second when
it failed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from kvtier_agents import signals, wire
from kvtier_agents.programs import Program

logger = logging.getLogger("kvtier_agents")

MAX_PROGRAMS = 4_096
# How long a server that could not be reached is left alone.
AWAY_SECONDS = 10.0
# How long a daemon that did not answer is left alone: requests must not wait for it one after the other.
_PAUSE_SECONDS = 1.0
# What of the time for an answer the daemon has: the rest is the way there and back.
_DAEMON_SHARE = 0.6
# Reasons are counted: there are few of them.
_REASONS = {
    "STAYS": "kvtierd: it stays",
    "STATE": "kvtierd: its context is nearest there",
    "QUEUE": "kvtierd: it waits least there",
    "UNKNOWN_STATE": "kvtierd: what lies where is not known",
}


@dataclass(frozen=True)
class Placement:
    """Where a request goes and why; `priority` is vLLM's, lower first, `None` to leave it. An explanation has the
    figures of this one placement."""

    server: str
    reason: str
    priority: int | None = None
    explanation: str = ""


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
        with self._lock:
            here = self._here(servers)
            root = program.root.id if program else None
            home = self._homes.get(root) if root else None
            if home in here:
                self._homes.move_to_end(root)
                return Placement(home, "its program's context is there")
            server = min(here, key=lambda s: (self._under_way[s], here.index(s)))
            self._remember(root, server)
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

    def _here(self, servers: Sequence[str]) -> list[str]:
        """Those that were reached, or were not tried for a while; all when none was."""
        now = time.monotonic()
        return [s for s in servers if self._away.get(s, 0.0) <= now] or list(servers)

    def _remember(self, root: str | None, server: str) -> None:
        if root:
            self._homes[root] = server
            self._homes.move_to_end(root)
            while len(self._homes) > MAX_PROGRAMS:
                self._homes.popitem(last=False)


class DaemonPlacer(LocalPlacer):
    """Asks `Programs.Place` of kvtierd; as `LocalPlacer` where it does not answer in time, or names no server here.

    `nodes` has the node of each server (`kvtier nodes` lists them); a server without one is never chosen by kvtierd. The
    daemon is asked at `address`, else where signals go. `queue_ms` says how long a request would wait at a server; without
    it each request under way here counts for `request_ms`. With `start`, kvtierd begins to bring what the step needs.
    """

    def __init__(
        self,
        nodes: Mapping[str, str],
        address: str | None = None,
        *,
        seconds: float = 0.05,
        queue_ms: Callable[[str], float] | None = None,
        request_ms: float = 100.0,
        start: bool = False,
    ) -> None:
        super().__init__()
        self._nodes = dict(nodes)
        self._address, self._seconds, self._start = address, seconds, start
        self._queue_ms = queue_ms or (lambda server: self._under_way[server] * request_ms)
        self._grpc: Any = None
        self._call: Callable[..., wire.Placed] | None = None
        self._paused_until = 0.0

    def place(self, program: Program | None, servers: Sequence[str]) -> Placement:
        if program is None:
            return super().place(program, servers)
        with self._lock:
            candidates = self._candidates(self._here(servers))
            home = self._homes.get(program.root.id)
            paused = self._paused_until > time.monotonic()
        if not candidates:
            return self._alone(program, servers, "serves none of these")
        if paused:
            return self._alone(program, servers, "did not answer lately")
        try:
            queues = {node: max(0, int(self._queue_ms(server))) for node, server in candidates.items()}
            current = self._nodes.get(home, "") if home else ""
            deadline_ms = max(1, int(self._seconds * _DAEMON_SHARE * 1000))
            answer = self._ask(wire.PlaceRequest(program.id, queues, current, deadline_ms, self._start))
            server = candidates[answer.node_id]
        except Exception as error:
            why = self._why(error)
            logger.debug("placement of %s: kvtierd %s: %s", program.id, why, error)
            with self._lock:
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
            return self._alone(program, servers, why)
        with self._lock:
            self._remember(program.root.id, server)
        reason = _REASONS.get(answer.reason, "kvtierd: it does not say why")
        return Placement(server, reason, explanation=answer.explanation)

    def _candidates(self, servers: Sequence[str]) -> dict[str, str]:
        """Of each node the server with the least under way."""
        candidates: dict[str, str] = {}
        for server in sorted(servers, key=lambda s: self._under_way[s]):
            node = self._nodes.get(server)
            if node:
                candidates.setdefault(node, server)
        return candidates

    def _ask(self, step: wire.PlaceRequest) -> wire.Placed:
        if self._call is None:
            address = self._address or signals.address_of()
            if address is None:
                raise LookupError("no daemon's address is known: give one, or set KVTIER_ADDRESS")
            self._grpc = signals.grpc_module()
            channel = signals.channel(address)
            self._call = channel.unary_unary(
                "/kvtier.v1.Programs/Place",
                request_serializer=wire.place_request,
                response_deserializer=wire.place_reply,
            )
        return self._call(step, timeout=self._seconds)

    def _why(self, error: Exception) -> str:
        """What kept kvtierd from choosing, in one of a few ways."""
        if isinstance(error, ImportError):
            return "cannot be asked without grpcio"
        if isinstance(error, KeyError):
            return "chose a node without a server here"
        if isinstance(error, LookupError):
            return "has no address"
        code = error.code().name if self._grpc and isinstance(error, self._grpc.RpcError) else ""
        known = {"DEADLINE_EXCEEDED": "was late", "UNAVAILABLE": "is away", "UNIMPLEMENTED": "is too old to place"}
        return known.get(code, "could not choose")

    def _alone(self, program: Program, servers: Sequence[str], why: str) -> Placement:
        placement = super().place(program, servers)
        return replace(placement, reason=f"{placement.reason} (kvtierd {why})")
