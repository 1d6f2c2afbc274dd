"""How a request goes out, step by step and without I/O: placed, added to, sent, and sent otherwise where that fails.

A request always goes out: as it was, where anything here goes wrong; once more as it was, where a server does not take
what was added; to another server, where the chosen one cannot be reached.

*Bounds*: one request waits 0.5 s for the tokenizer, all its calls together, unless told otherwise; a tokenizer that
failed is left alone for a minute, a server that does not take hints for ten.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvtier_agents import programs, requests
from kvtier_agents.placement import LocalPlacer, Placement, Placer
from kvtier_agents.spans import SpanReader

logger = logging.getLogger("kvtier_agents")

TOKENIZE_SECONDS = 0.5
TOKENIZER_AWAY_SECONDS = 60.0
PLAIN_SECONDS = 600.0
# What a server answers to fields that it does not know.
_REFUSED = (400, 422)

# What a flow asks of whoever waits for it: ("send", request), ("read", response) or ("close", response).
Step = tuple[str, Any]
Flow = Generator[Step, Any, Any]


@dataclass
class Attachment:
    """Settings of attached clients, and what they have in common. Several clients may share one."""

    # Roots of servers that serve the same models, "http://host:8000": the placer chooses. Empty: as the client says.
    servers: Sequence[str] = ()
    placer: Placer = field(default_factory=LocalPlacer)
    # Asks for the places of messages; `None` to say nothing of them.
    spans: SpanReader | None = field(default_factory=SpanReader)
    # How long one request may wait for that, all calls together.
    tokenize_seconds: float = TOKENIZE_SECONDS
    # Whether llm-d's router is told the outermost program, to be fair among programs.
    fairness: bool = False
    # Requests by what became of them, and placements by their reason.
    counts: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.servers = tuple(server.rstrip("/") for server in self.servers)
        self._lock = threading.Lock()
        self._until: dict[tuple[str, str], float] = {}
        self._warned = False

    def count(self, what: str) -> None:
        """One more of it."""
        with self._lock:
            self.counts[what] += 1

    def avoid(self, what: str, server: str, seconds: float) -> None:
        """Does without something of a server for a while."""
        with self._lock:
            self._until[what, server] = time.monotonic() + seconds

    def avoids(self, what: str, server: str) -> bool:
        """Whether it is done without now."""
        with self._lock:
            return self._until.get((what, server), 0.0) > time.monotonic()

    def failed(self, error: Exception) -> None:
        """Something here went wrong: said once."""
        self.count("failed")
        if not self._warned:
            self._warned = True
            logger.warning("a request went out without hints: %s: %s (said once)", type(error).__name__, error)


class Sending:
    """One request on its way. `module` is httpx or one like it; the request's content was read."""

    def __init__(self, request: Any, shared: Attachment, module: Any) -> None:
        self.request, self.shared, self.module = request, shared, module
        # Where it would go by itself.
        self.origin = root_of(request.url)
        self.server = self.origin
        self.state = programs.state()
        self.placement: Placement | None = None
        self.change: requests.Change | None = None
        self.tried: list[str] = []

    def flow(self) -> Flow:
        """All steps; returns the response."""
        self._hear()
        self._choose()
        try:
            self.change = yield from self._changed()
        except Exception as error:
            self.shared.failed(error)
        while True:
            self._began()
            try:
                return (yield from self._sent())
            except (self.module.ConnectError, self.module.ConnectTimeout):
                self._ended(reached=False)
                if not self._elsewhere():
                    raise
            except BaseException:
                self._ended(reached=True)
                raise

    def ended(self) -> Any:
        """What to call once the answer was read; `None` for nothing."""
        return functools.partial(self._ended, reached=True) if self.placement else None

    def _hear(self) -> None:
        """Whose request it is: what is current says, or else its headers."""
        try:
            self.state = requests.said_by(self.state, self.request.headers, self.request.content)
        except Exception as error:
            self.shared.failed(error)

    def _sent(self) -> Flow:
        priority = bool(self.placement and self.placement.priority is not None)
        try:
            request = self._built(priority)
        except Exception as error:
            self.shared.failed(error)
            self.change, priority = None, False
            request = self._built(False)
        response = yield "send", request
        if response.status_code in _REFUSED and (self.change or priority):
            yield "close", response
            self.change = None
            response = yield "send", self._built(False)
            self.shared.count("resent")
            if response.status_code < 400:
                self.shared.avoid("hints", self.server, PLAIN_SECONDS)
                logger.warning("%s does not take hints: it gets none for a while", self.server)
        self.shared.count("hinted" if self.change else "plain")
        return response

    def _changed(self) -> Flow:
        """What is added, with the tokenizer's help."""
        if self.shared.avoids("hints", self.server):
            return None
        body = json.loads(self.request.content)
        if not isinstance(body, dict):
            return None
        asking = requests.change(self.state, body, self.shared.spans, self.shared.fairness)
        tokens, until = None, time.monotonic() + self.shared.tokenize_seconds
        try:
            while True:
                tokens = yield from self._tokens(asking.send(tokens), until - time.monotonic())
        except StopIteration as done:
            return done.value

    def _tokens(self, body: dict, seconds: float) -> Flow:
        """What the server's tokenizer makes of these messages; `None` for no answer."""
        if seconds <= 0 or self.shared.avoids("tokenizer", self.server):
            return None
        names = ("authorization", "api-key")
        headers = {name: self.request.headers[name] for name in names if name in self.request.headers}
        limits = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), seconds)}
        url = f"{self.server}/tokenize"
        try:
            response = yield "send", self.module.Request("POST", url, json=body, headers=headers, extensions=limits)
            content = yield "read", response
            if response.status_code == 404 or response.status_code >= 500:
                raise ConnectionError(f"it answers {response.status_code}")
            tokens = json.loads(content).get("tokens") if response.status_code == 200 else None
            return tokens if isinstance(tokens, list) else None
        except Exception as error:
            self.shared.count("tokenizer_failed")
            self.shared.avoid("tokenizer", self.server, TOKENIZER_AWAY_SECONDS)
            logger.info("%s: %s: %s", url, type(error).__name__, error)
            return None

    def _choose(self) -> bool:
        """Chooses one of the servers that were not tried; False when none is left."""
        left = [server for server in self.shared.servers if server not in self.tried]
        self.placement, self.server = None, self.origin
        if not left:
            return False
        try:
            self.placement = self.shared.placer.place(self.state.program, left)
        except Exception as error:
            self.shared.failed(error)
            self.placement = Placement(left[0], "the placer failed")
        self.shared.count(f"placed: {self.placement.reason}")
        self.server = self.placement.server
        return True

    def _elsewhere(self) -> bool:
        """The server cannot be reached: whether there is another one."""
        self.shared.count("unreached")
        self.tried.append(self.server)
        return self._choose() or self.origin not in self.tried

    def _began(self) -> None:
        if self.placement:
            self.shared.placer.began(self.server)

    def _ended(self, reached: bool) -> None:
        if self.placement:
            self.shared.placer.ended(self.server, reached)

    def _built(self, priority: bool) -> Any:
        """The request that goes out."""
        request = self.request
        if self.server == self.origin and self.change is None and not priority:
            return request
        body = dict(self.change.body) if self.change else None
        if priority:
            body = json.loads(request.content) if body is None else body
            body.setdefault("priority", self.placement.priority)
        headers = request.headers.copy()
        for name in ("content-length", *(["host"] if self.server != self.origin else [])):
            headers.pop(name, None)
        for name, value in (self.change.headers if self.change else {}).items():
            headers.setdefault(name, value)
        url = self.server + str(request.url)[len(self.origin) :]
        content = request.content if body is None else json.dumps(body, ensure_ascii=False).encode()
        return self.module.Request(request.method, url, headers=headers, content=content, extensions=request.extensions)


def ours(request: Any) -> bool:
    """Whether it is a request that is added to."""
    length, kind = request.headers.get("content-length", "0"), request.headers.get("content-type", "")
    return requests.readable(request.method, request.url.path, kind, int(length) if length.isdigit() else 0)


def root_of(url: Any) -> str:
    """A server's root: what is before `/v1/`, or before the names of the calls."""
    text = str(url).partition("?")[0]
    cut = text.rfind("/v1/")
    if cut < 0:
        cut = next((len(text) - len(path) for path in requests.PATHS if text.endswith(path)), len(text))
    return text[:cut]
