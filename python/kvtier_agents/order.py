"""What a program says it will do, and what kvtierd says should run first.

    from kvtier_agents import Order, OrderedPlacer, Step, openai_client, program

    with program("research") as run:
        run.declare(Step("plan"), Step("search", after=("plan",), tool_gap=4.0), Step("sum", after=("search",)))
        with run.step("plan"):
            ...

Declarations and progress travel as signals do: in the background, in order, dropped when nobody takes them. `Order`
asks `Programs.NextSteps` and waits for no longer than its deadline; whatever goes wrong, the answer is None.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from kvtier_agents import signals, wire

if TYPE_CHECKING:
    from kvtier_agents.placement import Placement, Placer
    from kvtier_agents.programs import Program

# Longest that an answer is waited for.
DEADLINE_SECONDS = 0.05
# How long a daemon that did not answer is not asked.
AWAY_SECONDS = 5.0
# The daemon takes no more.
MAX_STEPS = 4_096
_MAX_SECONDS = 7 * 86_400
_ASKED = 16


@dataclass(frozen=True)
class Step:
    """A step of a program: `after` are ids of steps before it, `expected` and `tool_gap` seconds, `program` the branch
    that runs it. Steps of one `kind` take alike: what they take is learnt. `shares` is the semantic type of what its
    context has in common with others', `shared` which tokens of whose context that is: (program, start, end), the
    declared program's where the program is empty, to the end where the end is zero."""

    id: str
    after: tuple[str, ...] = ()
    expected: float = 0.0
    tool_gap: float = 0.0
    tokens: int = 0
    kind: str = ""
    program: str = ""
    shares: str = ""
    shared: tuple[str, int, int] | None = None

    def encode(self) -> bytes:
        """`GraphStep`."""
        parts = [wire.text(1, self.id), wire.text(2, self.program), *(wire.text(3, step) for step in self.after)]
        parts += [wire.number(4, _ms(self.expected)), wire.number(5, _ms(self.tool_gap)), wire.number(6, self.tokens)]
        parts += [wire.text(7, self.kind), wire.number(8, wire.TYPES.index(self.shares) + 1 if self.shares else 0)]
        if self.shared is not None:
            program, start, end = self.shared
            parts.append(wire.message(9, wire.text(1, program) + wire.number(2, start) + wire.number(3, end)))
        return b"".join(parts)

    def json(self) -> dict[str, Any]:
        """As `kvtier graph declare` reads it."""
        said = {"step_id": self.id, "program_id": self.program, "after": list(self.after), "tokens": self.tokens}
        said |= {"expected_ms": _ms(self.expected), "tool_gap_ms": _ms(self.tool_gap), "kind": self.kind}
        said |= {"shares": self.shares}
        if self.shared is not None:
            named = zip(("program_id", "start_token", "end_token"), self.shared, strict=True)
            said["shared_context"] = {name: value for name, value in named if value}
        return {key: value for key, value in said.items() if value or key in ("step_id", "shared_context")}


@dataclass(frozen=True)
class Declaration:
    """The steps of a program; travels as a signal does."""

    program_id: str
    steps: tuple[Step, ...]
    kind = "DECLARE"
    method = "Declare"

    def encode(self) -> bytes:
        """`DeclareRequest`."""
        return wire.text(1, self.program_id) + b"".join(wire.message(3, step.encode()) for step in self.steps)

    def command(self) -> tuple[list[str], str]:
        """Words for the command `kvtier`, and its input."""
        text = json.dumps({"program_id": self.program_id, "steps": [step.json() for step in self.steps]})
        return ["graph", "declare", "-"], text


@dataclass(frozen=True)
class Progress:
    """Steps that began and ended; travels as a signal does."""

    program_id: str
    began: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()
    kind = "PROGRESS"
    method = "Progress"

    def encode(self) -> bytes:
        """`ProgressRequest`."""
        steps = [wire.text(3, step) for step in self.began] + [wire.text(4, step) for step in self.ended]
        return wire.text(1, self.program_id) + b"".join(steps)

    def command(self) -> tuple[list[str], str]:
        """Words for the command `kvtier`, and its input."""
        steps = [f"--began={step}" for step in self.began] + [f"--ended={step}" for step in self.ended]
        return ["graph", "progress", *steps, "--", self.program_id], ""


@dataclass(frozen=True)
class NextStep:
    """A step that may run; `priority` is vLLM's, lower first. `step_id` is empty for what declared nothing."""

    program_id: str = ""
    step_id: str = ""
    graph: str = ""
    tenant: str = ""
    kind: str = ""
    rank_ms: int = 0
    remaining_ms: int = 0
    attained_ms: int = 0
    waited_ms: int = 0
    due_in_ms: int = 0
    priority: int = 0
    reason: str = ""
    running: bool = False

    @classmethod
    def decode(cls, data: bytes) -> NextStep:
        """From `NextStep`, whose fields have the order of this class's."""
        names, said = [f.name for f in fields(cls)], {}
        for number, value in wire.read(data):
            if number <= len(names):
                said[names[number - 1]] = value
        for name, value in said.items():
            wanted = type(getattr(cls, name))
            said[name] = value.decode(errors="replace") if isinstance(value, bytes) else wanted(value)
            if not isinstance(said[name], wanted):
                raise ValueError(f"{name} is no {wanted.__name__}")
        if (priority := said.get("priority", 0)) >= 1 << 63:
            said["priority"] = priority - (1 << 64)
        return cls(**said)


@dataclass
class Order:
    """Asks the daemon at `address`, or where `signals.connect` would, what should run first."""

    address: str | None = None
    seconds: float = DEADLINE_SECONDS
    counts: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._call: Any = None
        self._away = 0.0

    def next(self, programs: Sequence[str] = (), limit: int = 0, running: bool = False) -> list[NextStep] | None:
        """Steps that may run, the first first: of these programs and branches, else of all. None for no answer."""
        with self._lock:
            if time.monotonic() < self._away:
                self.counts["away"] += 1
                return None
        try:
            asked = b"".join(wire.text(1, program) for program in programs)
            reply = self._asked()(asked + wire.number(3, limit) + wire.number(4, running), timeout=self.seconds)
            steps = [NextStep.decode(value) for number, value in wire.read(reply) if number == 1]
        except Exception as error:
            with self._lock:
                self._away = time.monotonic() + AWAY_SECONDS
                self.counts["failed"] += 1
            signals.logger.debug("what is next: %s: %s", type(error).__name__, error)
            return None
        with self._lock:
            self.counts["answered"] += 1
        return steps

    def priority(self, program: Program | str) -> int | None:
        """vLLM's `priority` for a request of this program: its most urgent step's. None to leave it."""
        id = program if isinstance(program, str) else program.id
        steps = self.next([id], _ASKED, running=True) or []
        return min((step.priority for step in steps if step.program_id == id), default=None)

    def _asked(self) -> Any:
        with self._lock:
            if self._call is None:
                address = signals.address_of(self.address)
                if address is None:
                    raise RuntimeError("no daemon's address is known: set KVTIER_ADDRESS")
                # Bytes go out and come in as they are.
                self._call = signals.channel(address).unary_unary("/kvtier.v1.Programs/NextSteps")
            return self._call


class OrderedPlacer:
    """A placer whose placements have the priority that an `Order` gives their program."""

    def __init__(self, placer: Placer, order: Order | None = None) -> None:
        self._placer, self._order = placer, order or Order()

    def place(self, program: Program | None, servers: Sequence[str]) -> Placement:
        placement = self._placer.place(program, servers)
        priority = self._order.priority(program) if program and placement.priority is None else None
        return placement if priority is None else replace(placement, priority=priority)

    def began(self, server: str) -> None:
        self._placer.began(server)

    def ended(self, server: str, reached: bool) -> None:
        self._placer.ended(server, reached)


def checked(steps: Sequence[Step] | Iterator[Step]) -> tuple[Step, ...]:
    """The steps, if a daemon would take them by their number and names; ValueError says what is wrong."""
    all = tuple(steps)
    if not 0 < len(all) <= MAX_STEPS:
        raise ValueError(f"a program declares 1 to {MAX_STEPS} steps, got {len(all)}")
    ids = {step.id for step in all}
    if len(ids) < len(all):
        raise ValueError("two steps have one id")
    for step in all:
        if missing := [id for id in step.after if id not in ids]:
            raise ValueError(f"step {step.id!r} waits for {missing[0]!r}, which is not declared")
        if step.shares and step.shares not in wire.TYPES:
            raise ValueError(f"step {step.id!r} shares {step.shares!r}, which is no semantic type")
    return all


def _ms(seconds: float) -> int:
    return round(min(max(seconds, 0.0), _MAX_SECONDS) * 1000)
