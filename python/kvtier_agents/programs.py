"""Programs, branches, tools and segments, as context managers: what an agent does, said where it does it.

What is current is kept in a context variable, so that it reaches asyncio tasks, and threads of libraries that copy the
context (LangGraph and LlamaIndex do). `Program.bind` hands it to other threads.

*Bounds*: 1,024 branches and 1,024 marked texts a program; tool names whose durations are learnt: 1,024 a process.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from kvtier_agents import order, signals
from kvtier_agents.signals import Signal
from kvtier_agents.wire import TYPES

# The daemon takes no longer ids.
MAX_ID_BYTES = 128
# Bytes that a branch's own name may have; what is longer is cut and made one of a kind.
_MAX_NAME_BYTES = 48
_MAX_BRANCHES = 1_024
_MAX_MARKS = 1_024
_MAX_TOOLS = 1_024
# The daemon takes no longer waits.
_MAX_WAIT_SECONDS = 30 * 86_400
# Share of the newest duration in a tool's learnt one.
_NEWEST = 0.3


@dataclass(frozen=True)
class Meaning:
    """What some tokens mean and how long they are worth keeping; fields that say nothing are left out of requests."""

    type: str | None = None
    taints: tuple[str, ...] = ()
    ttl: float | str | None = None

    @classmethod
    def of(cls, type: str | None = None, taints: Any = (), ttl: float | str | None = None) -> Meaning:
        """Checks the type's name: a name that nobody knows would be refused far from where it was written."""
        name = type.upper() if type else None
        if name is not None and name not in TYPES:
            raise ValueError(f"type must be one of {', '.join(TYPES)}, got {type!r}")
        return cls(name, (taints,) if isinstance(taints, str) else tuple(taints), ttl)

    def fields(self) -> dict[str, Any]:
        """As a request says it."""
        said = {"type": self.type, "taints": list(self.taints), "ttl": self.ttl}
        return {key: value for key, value in said.items() if value not in (None, [])}


@dataclass(frozen=True)
class State:
    """What is current: a program, what the segments around say, and the state outside of it."""

    program: Program | None = None
    meaning: Meaning = Meaning()
    outer: State | None = None
    owner: Any = None


_NOTHING = State()
_state: ContextVar[State] = ContextVar("kvtier_agents", default=_NOTHING)


def state() -> State:
    """What is current in this context."""
    return _state.get()


def current() -> Program | None:
    """The program that requests made here belong to."""
    return _state.get().program


def _leave(owner: Any) -> None:
    # A library may leave a block in another context than it was entered in: then there is nothing to undo.
    now = _state.get()
    if now.owner is owner and now.outer is not None:
        _state.set(now.outer)


class _Block:
    """A context manager for `with` and `async with` alike."""

    def __enter__(self) -> Any:
        raise NotImplementedError

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Any:
        return self.__enter__()

    async def __aexit__(self, *raised: Any) -> None:
        self.__exit__(*raised)


class segment(_Block):
    """Requests made inside say this of all their tokens of which their messages do not say more themselves."""

    def __init__(self, type: str | None = None, taints: Any = (), ttl: float | str | None = None) -> None:
        self.meaning = Meaning.of(type, taints, ttl)

    def __enter__(self) -> segment:
        now, mine = _state.get(), self.meaning
        taints = tuple(dict.fromkeys(now.meaning.taints + mine.taints))
        ttl = now.meaning.ttl if mine.ttl is None else mine.ttl
        _state.set(State(now.program, Meaning(mine.type or now.meaning.type, taints, ttl), now, self))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        _leave(self)


class Program(_Block):
    """A program: an agent's run, a part of one, or a branch. Make one with `program` or `fork`.

    Entered, it is what requests belong to. A branch may be entered many times, in turn or at once; an error that leaves
    it abandons it.
    """

    def __init__(self, id: str, parent: Program | None = None, session: str | None = None, **more: Any) -> None:
        self.id, self.parent = id, parent
        self.session = session or (parent.session if parent else id)
        self.tolerations: tuple[str, ...] = tuple(more.get("tolerations") or (parent.tolerations if parent else ()))
        self.signals: signals.Signals | None = more.get("signals") or (parent.signals if parent else None)
        # What it is for: programs of one role take alike.
        self.role: str = more.get("role") or ""
        # Whether its parent waits for its end; `None` to say nothing.
        self.blocks_parent: bool | None = more.get("blocks_parent")
        self.is_branch: bool = more.get("is_branch", False)
        self.ended = False
        self.branches: dict[str, Program] = {}
        self._marks: OrderedDict[str, Meaning] = OrderedDict()
        self._lock = threading.Lock()
        self._waits = 0
        self._declared = False

    @property
    def root(self) -> Program:
        """The program that all began with."""
        return self.parent.root if self.parent else self

    def __enter__(self) -> Program:
        now = _state.get()
        meaning = Meaning("REASONING_BRANCH", now.meaning.taints, now.meaning.ttl) if self.is_branch else now.meaning
        _state.set(State(self, meaning, now, self))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        _leave(self)
        if self.is_branch:
            if kind is not None:
                self.abandon()
        elif kind is None or (issubclass(kind, Exception) and self.parent is None):
            # A failed run is tried again more often than not: its blocks go first, but they are not dropped.
            self.complete()
        else:
            self.abandon()

    def bind(self, work: Callable) -> Callable:
        """`work`, a function or coroutine function, done in this program wherever it is called: in a thread, say."""
        if inspect.iscoroutinefunction(work):

            @functools.wraps(work)
            async def inside(*args: Any, **kwargs: Any) -> Any:
                with active(self):
                    return await work(*args, **kwargs)
        else:

            @functools.wraps(work)
            def inside(*args: Any, **kwargs: Any) -> Any:
                with active(self):
                    return work(*args, **kwargs)

        return inside

    def fork(self, *names: str) -> Fork:
        """Splits it: each branch is a program of its own that starts with this one's context."""
        return Fork(self, names)

    def branch(self, name: str) -> Program:
        """The branch of this name, which `fork` made."""
        return self.branches[name]

    def join(self, *names: str) -> None:
        """Branches, all when none are named, came together: what only they hold is freed."""
        self._join([branch for name, branch in self.branches.items() if not names or name in names])

    def _join(self, branches: list[Program]) -> None:
        with self._lock:
            joined = [branch for branch in branches if not branch.ended]
            for branch in joined:
                branch.ended = True
            self.branches = {name: branch for name, branch in self.branches.items() if not branch.ended}
        if joined:
            self._tell("JOIN", children=tuple(branch.id for branch in joined))

    def abandon(self) -> None:
        """It is not gone on with: what only it and its children hold is freed now."""
        self._end("CANCELLATION")

    def complete(self) -> None:
        """It ended well: what only it and its children hold may go first."""
        self._end("COMPLETION")

    def compacted(self) -> None:
        """Its context was rewritten: what its next request does not use is worth little."""
        self._tell("COMPACTION")

    def tool(self, name: str, expected: float | None = None) -> Tool:
        """It waits for a tool inside the `with` block; `expected` seconds, else as long as the tool took before."""
        return Tool(self, name, expected)

    def declare(self, *steps: order.Step) -> None:
        """Says which steps it has, all of them: a later declaration replaces it and keeps how far steps of the same id
        are. ValueError for steps that cannot be."""
        declaration = order.Declaration(self.id, order.checked(steps))
        self._declared = True
        self._send(declaration)

    def step(self, id: str) -> StepRun:
        """A step that it or a program around it declared runs inside the block; one left by an error has not ended."""
        owner: Program | None = self
        while owner and not owner._declared:
            owner = owner.parent
        return StepRun(owner or self, id)

    def mark(self, text: Any, type: str | None = None, taints: Any = (), ttl: float | str | None = None) -> Any:
        """Says what a message with this text means, whatever its role; returns what it was given."""
        meaning = Meaning.of(type, taints, ttl)
        with self._lock:
            self._marks[_text(text)] = meaning
            while len(self._marks) > _MAX_MARKS:
                self._marks.popitem(last=False)
        return text

    def marked(self, text: str) -> Meaning | None:
        """What was said of a message with this text, here or in a parent."""
        with self._lock:
            found = self._marks.get(text)
        return found or (self.parent.marked(text) if self.parent else None)

    def _end(self, kind: str) -> None:
        with self._lock:
            again, self.ended = self.ended, True
        if not again:
            self._tell(kind)

    def _tell(self, kind: str, **more: Any) -> None:
        self._send(Signal(kind, self.id, self.parent.id if self.parent else "", **more))

    def _send(self, signal: Signal | signals.Message) -> None:
        try:
            (self.signals or signals.default()).send(signal)
        except Exception as error:
            # An agent does not fail for what nobody has to hear.
            signals.logger.warning("signal %s of %s: %s: %s", signal.kind, self.id, type(error).__name__, error)

    def _wait(self, change: int, expected: float | None) -> None:
        with self._lock:
            before, self._waits = self._waits, self._waits + change
        if before == 0 and change > 0:
            known = expected is not None and 0 < expected < _MAX_WAIT_SECONDS
            self._tell("TOOL_WAIT", expected_resume_ms=round(expected * 1000) if known else 0)
        elif before == 1 and change < 0:
            self._tell("CONTINUATION")

    def __repr__(self) -> str:
        return f"<program {self.id}>"


class active(_Block):
    """A program that is current inside, and does not end with the block unless a branch fails."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __enter__(self) -> Program:
        return self.program.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        _leave(self.program)
        if kind is not None and self.program.is_branch:
            self.program.abandon()


class Fork(_Block):
    """Branches of a program. As a context manager it joins what was not abandoned, or abandons all after an error."""

    def __init__(self, parent: Program, names: tuple[str, ...]) -> None:
        if not 0 < len(names) <= _MAX_BRANCHES:
            raise ValueError(f"a fork has 1 to {_MAX_BRANCHES} branches, got {len(names)}")
        self.parent = parent
        self.branches = {name: Program(_under(parent.id, name), parent, is_branch=True) for name in names}
        with parent._lock:
            parent.branches.update(self.branches)
        parent._tell("FORK", children=tuple(branch.id for branch in self.branches.values()))

    def __getitem__(self, name: str) -> Program:
        return self.branches[name]

    def __iter__(self) -> Iterator[Program]:
        return iter(self.branches.values())

    def join(self) -> None:
        """What was not abandoned comes together in the parent."""
        self.parent._join(list(self))

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.join()
        else:
            for branch in self:
                branch.abandon()


class StepRun(_Block):
    """A declared step that runs."""

    def __init__(self, program: Program, id: str) -> None:
        self.program, self.id = program, id

    def __enter__(self) -> StepRun:
        self.program._send(order.Progress(self.program.id, began=(self.id,)))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.program._send(order.Progress(self.program.id, ended=(self.id,)))


class Tool(_Block):
    """A tool call: the program waits, and goes on afterwards. Calls at the same time are one wait."""

    _learnt: OrderedDict[str, float] = OrderedDict()
    _guard = threading.Lock()

    def __init__(self, program: Program, name: str, expected: float | None = None) -> None:
        self.program, self.name, self.expected = program, name, expected
        self._since = 0.0

    def __enter__(self) -> Tool:
        with self._guard:
            learnt = self._learnt.get(self.name)
        self.program._wait(1, learnt if self.expected is None else self.expected)
        self._since = time.monotonic()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        took = time.monotonic() - self._since
        with self._guard:
            before = self._learnt.pop(self.name, took)
            self._learnt[self.name] = before + _NEWEST * (took - before)
            while len(self._learnt) > _MAX_TOOLS:
                self._learnt.popitem(last=False)
        self.program._wait(-1, None)


class _Nothing(_Block):
    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        pass


def program(name: str, *, id: str | None = None, session: str | None = None, **more: Any) -> Program:
    """A program: the current one's child, if there is one. Its end is a COMPLETION.

    `id` is its name and a random tail unless given; `session` the conversation's, the outermost program's id unless
    given; `tolerations` and `signals` (a `Signals` of its own) are handed on to children. `role` says what it is for:
    how long programs of one role take is learnt together; `blocks_parent` whether the current program waits for its
    end.
    """
    parent = current()
    if id is None:
        tail = f"{_cut(name)}-{uuid.uuid4().hex[:8]}"
        id = _under(parent.id, tail) if parent else tail
    for what, name in (("program", id), ("session", session), ("role", more.get("role"))):
        if name is not None and (not 0 < len(name.encode()) <= MAX_ID_BYTES or "\0" in name):
            raise ValueError(f"a {what}'s name has 1 to {MAX_ID_BYTES} bytes and no NUL, got {name!r}")
    return Program(id, parent, session, **more)


def fork(*names: str) -> Fork:
    """Splits the current program. Raises RuntimeError when there is none."""
    return _needed().fork(*names)


def tool(name: str, expected: float | None = None) -> Tool | _Nothing:
    """The current program waits for a tool; nothing when there is none."""
    now = current()
    return now.tool(name, expected) if now else _Nothing()


def bind(work: Callable) -> Callable:
    """`work` done in the program that is current now, in whatever thread it is called."""
    now = current()
    return now.bind(work) if now else work


def mark(text: Any, type: str | None = None, taints: Any = (), ttl: float | str | None = None) -> Any:
    """Says what a message with this text means in the current program; returns what it was given."""
    now = current()
    return now.mark(text, type, taints, ttl) if now else text


def _needed() -> Program:
    now = current()
    if now is None:
        raise RuntimeError("no program is current: open one with kvtier_agents.program(..)")
    return now


def _text(message: Any) -> str:
    if isinstance(message, dict):
        message = message.get("content")
    elif not isinstance(message, str):
        message = getattr(message, "content", message)
    return message if isinstance(message, str) else ""


def _cut(name: str) -> str:
    short = name.encode()[:_MAX_NAME_BYTES].decode(errors="ignore").replace("\0", "")
    return short or "program"


def _under(parent: str, name: str) -> str:
    """A child's id: below its parent's, or a short one of its own where that would be too long."""
    id = f"{parent}/{_cut(name)}"
    return id if len(id.encode()) <= MAX_ID_BYTES else f"{_cut(name)}-{uuid.uuid4().hex}"
