"""Signals to kvtierd from a thread of its own: nothing that an agent does waits for them.

A signal that finds the queue full, or is not taken before its deadline, is dropped and counted. Signals of one process
are sent in order. What carries them is chosen once: gRPC where grpcio is installed and a daemon's address is known,
else the command `kvtier`, else the hints of requests to come.

*Bounds*: 1,024 signals in the queue, 64 that wait for a request.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import shutil
import subprocess
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvtier_agents import wire

logger = logging.getLogger("kvtier_agents")

DEFAULT_SOCKET = "/run/kvtier/kvtierd.sock"
MAX_QUEUED = 1_024
MAX_CARRIED = 64
# How long a signal is worth sending.
DEADLINE_SECONDS = 10.0
# Longest one attempt.
_CALL_SECONDS = 3.0
_PAUSE_SECONDS = 0.2
_EXIT_SECONDS = 2.0


@dataclass(frozen=True)
class Signal:
    """What a program does; `docs/PROGRAMS.md` says what each kind means."""

    kind: str
    program_id: str
    parent_program_id: str = ""
    children: tuple[str, ...] = ()
    expected_resume_ms: int = 0

    def fields(self) -> dict[str, Any]:
        """As a request's hints say it."""
        said = {"kind": self.kind, "program_id": self.program_id, "parent_program_id": self.parent_program_id}
        said |= {"children": list(self.children), "expected_resume_ms": self.expected_resume_ms}
        return {key: value for key, value in said.items() if value}


class Unavailable(Exception):
    """Nobody took the signal; it may be tried again."""


class Message(Protocol):
    """What travels as signals do, beside them: declarations and progress of `kvtier_agents.order`."""

    kind: str
    program_id: str
    method: str

    def encode(self) -> bytes:
        """The request of the method of `Programs`; its reply begins as a signal's."""
        ...

    def command(self) -> tuple[list[str], str]:
        """Words for the command `kvtier`, and its input."""
        ...


class Carrier(Protocol):
    """Brings a signal to kvtierd."""

    def send(self, signal: Signal, seconds: float) -> str:
        """The outcome; `Unavailable` when nobody answered in time, anything else when it is no use to try again."""
        ...


class GrpcCarrier:
    """Calls `Programs.Signal`. Raises ImportError without grpcio."""

    def __init__(self, address: str) -> None:
        self._grpc = grpc_module()
        self._channel = channel(address)
        self._call = self._channel.unary_unary(
            "/kvtier.v1.Programs/Signal",
            request_serializer=wire.signal_request,
            response_deserializer=wire.signal_reply,
        )

    def send(self, signal: Signal | Message, seconds: float) -> str:
        call = self._call if isinstance(signal, Signal) else self._other(signal.method)
        try:
            outcome, reason = call(signal, timeout=seconds)
        except self._grpc.RpcError as error:
            code = error.code()
            if code in (self._grpc.StatusCode.UNAVAILABLE, self._grpc.StatusCode.DEADLINE_EXCEEDED):
                raise Unavailable(error.details()) from None
            raise RuntimeError(f"{code.name}: {error.details()}") from None
        if reason and outcome == "REJECTED":
            logger.info("signal %s of %s: %s", signal.kind, signal.program_id, reason)
        return outcome

    def _other(self, method: str) -> Any:
        return self._channel.unary_unary(
            f"/kvtier.v1.Programs/{method}",
            request_serializer=lambda message: message.encode(),
            response_deserializer=wire.signal_reply,
        )


class CommandCarrier:
    """Runs `kvtier signal`, or what another message asks for."""

    def __init__(self, command: str, address: str | None = None) -> None:
        self._words = [command, *(["--address", address] if address else [])]

    def send(self, signal: Signal | Message, seconds: float) -> str:
        words = [*self._words, "--json", "--timeout", f"{int(seconds * 1000)}ms"]
        more, text = (self._of(signal), "") if isinstance(signal, Signal) else signal.command()
        try:
            done = subprocess.run(
                [*words, *more], input=text.encode(), capture_output=True, timeout=seconds + 1, check=False
            )
        except subprocess.TimeoutExpired:
            raise Unavailable("the command did not end") from None
        if done.returncode == 3:
            raise Unavailable(done.stderr.decode(errors="replace")[:200])
        if done.returncode == 2:
            raise RuntimeError(done.stderr.decode(errors="replace")[:200])
        return "APPLIED" if done.returncode == 0 else "REJECTED"

    def _of(self, signal: Signal) -> list[str]:
        kind = signal.kind.lower().replace("_", "-")
        words = ["signal"]
        words += [word for child in signal.children for word in ("--child", child)]
        words += ["--parent", signal.parent_program_id] if signal.parent_program_id else []
        words += ["--expected-resume", f"{signal.expected_resume_ms}ms"] if signal.expected_resume_ms else []
        # A name that begins with a dash is no option.
        return [*words, "--", signal.program_id, kind]


class RequestCarrier:
    """Keeps signals for the requests to come: one goes with each. What ends a program needs `hints.trust = "all"`."""

    def __init__(self) -> None:
        self._waiting: deque[Signal] = deque()
        self._lock = threading.Lock()

    def send(self, signal: Signal | Message, seconds: float) -> str:
        if not isinstance(signal, Signal):
            raise RuntimeError(f"{signal.kind} does not go with requests: it needs grpcio or the command kvtier")
        with self._lock:
            last = self._waiting[-1] if self._waiting else None
            goes_on = (signal.program_id, "TOOL_WAIT") if signal.kind == "CONTINUATION" else None
            if last and goes_on == (last.program_id, last.kind):
                # It is over before anybody heard of it.
                self._waiting.pop()
                return "WITHDRAWN"
            if len(self._waiting) >= MAX_CARRIED:
                raise RuntimeError(f"{MAX_CARRIED} signals wait for a request already")
            self._waiting.append(signal)
        return "CARRIED"

    def take(self) -> Signal | None:
        """The next one, for a request to carry."""
        with self._lock:
            return self._waiting.popleft() if self._waiting else None


@dataclass
class Signals:
    """Sends signals in the background; `counts` has each outcome, `dropped_full`, `dropped_late` and `failed`."""

    carrier: Carrier
    deadline_seconds: float = DEADLINE_SECONDS
    max_queued: int = MAX_QUEUED
    counts: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._queue: queue.Queue[tuple[Signal | Message, float] | None] = queue.Queue(self.max_queued)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._owner = os.getpid()
        self._closed = False

    def send(self, signal: Signal | Message) -> bool:
        """Queues it; False when it was dropped. Never blocks, never raises."""
        try:
            if isinstance(self.carrier, RequestCarrier):
                self._deliver(signal, time.monotonic() + self.deadline_seconds)
                return True
            self._start()
            self._queue.put_nowait((signal, time.monotonic() + self.deadline_seconds))
            return True
        except queue.Full:
            self._count("dropped_full")
        except Exception as error:
            self._count("failed")
            logger.debug("signal %s: %s", signal.kind, error)
        return False

    def flush(self, seconds: float = _EXIT_SECONDS) -> bool:
        """Waits until all that was queued is done with, at most so long. True when it is."""
        until = time.monotonic() + seconds
        with self._queue.all_tasks_done:
            while self._queue.unfinished_tasks:
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._queue.all_tasks_done.wait(left)
        return True

    def close(self, seconds: float = _EXIT_SECONDS) -> None:
        """Flushes and ends the thread; what comes later is dropped."""
        self.flush(seconds)
        with self._lock:
            self._closed, thread = True, self._thread
        if thread:
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                return
            thread.join(seconds)

    def carried(self) -> Signal | None:
        """A signal that a request is to carry, if that is how they travel."""
        return self.carrier.take() if isinstance(self.carrier, RequestCarrier) else None

    def _start(self) -> None:
        with self._lock:
            if self._owner != os.getpid():
                # Threads do not outlive a fork of the process.
                self._thread, self._owner = None, os.getpid()
            if self._closed:
                raise RuntimeError("closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvtier-signals", daemon=True)
                self._thread.start()
                atexit.register(self.flush)

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            try:
                self._deliver(*entry)
            except Exception:
                self._count("failed")
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _deliver(self, signal: Signal | Message, until: float) -> None:
        while True:
            left = until - time.monotonic()
            if left <= 0:
                return self._count("dropped_late")
            try:
                return self._count(self.carrier.send(signal, min(left, _CALL_SECONDS)).lower())
            except Unavailable:
                time.sleep(min(_PAUSE_SECONDS, max(0.0, left)))
            except Exception as error:
                logger.debug("signal %s of %s: %s", signal.kind, signal.program_id, error)
                return self._count("failed")

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


def connect(address: str | None = None, **settings: Any) -> Signals:
    """Signals to the daemon at `address` (`unix:///path` or `http://host:port`), else to where KVTIER_ADDRESS or
    KVTIER_SOCKET say, else to this node's; by what is installed here."""
    return Signals(_carrier(address_of(address)), **settings)


def address_of(address: str | None = None) -> str | None:
    """The daemon's address: this one, else where KVTIER_ADDRESS or KVTIER_SOCKET say, else this node's, if it runs."""
    socket = os.environ.get("KVTIER_SOCKET") or DEFAULT_SOCKET
    return address or os.environ.get("KVTIER_ADDRESS") or (f"unix://{socket}" if os.path.exists(socket) else None)


def channel(address: str) -> Any:
    """A channel to a daemon. Raises ImportError without grpcio."""
    target = address.removeprefix("http://").removeprefix("https://")
    # Several agents of a machine share a socket: their channels need no name.
    return grpc_module().insecure_channel(target, options=[("grpc.default_authority", "localhost")])


def grpc_module() -> Any:
    """The module grpc. Raises ImportError where it is not installed."""
    try:
        import grpc
    except ImportError:
        raise ImportError("calls to kvtierd over gRPC need grpcio: pip install grpcio") from None
    return grpc


def _carrier(address: str | None) -> Carrier:
    if address:
        try:
            return GrpcCarrier(address)
        except ImportError as error:
            logger.info("%s", error)
        if command := os.environ.get("KVTIER_COMMAND") or shutil.which("kvtier"):
            return CommandCarrier(command, address)
    return RequestCarrier()


_default: Signals | None = None
_default_lock = threading.Lock()


def default() -> Signals:
    """The process's own, made by `connect` when it is first needed."""
    global _default
    with _default_lock:
        if _default is None:
            _default = connect()
        return _default


def use(signals: Signals | None) -> None:
    """Makes these the process's own; `None` lets the next use connect anew."""
    global _default
    with _default_lock:
        _default = signals
