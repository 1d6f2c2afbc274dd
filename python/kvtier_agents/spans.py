"""From chat messages to token ranges: which tokens of a prompt are its system prompt, its tools, a tool's result.

Only the server knows how its chat template writes messages, so it is asked: `/tokenize` with the first messages of a
request gives where the next one begins. A conversation grows at its end, so nearly all of that is remembered.

The reader does no I/O: `spans` is a generator that yields bodies for `/tokenize` and is sent token ids, or `None` where
there was no answer. What cannot be told is left out.

*Bounds*: 4,096 remembered places; 8 calls a request; 64 spans a request; no conversation above 1 MiB.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from kvtier_agents.programs import Meaning

MAX_REMEMBERED = 4_096
MAX_CALLS = 8
MAX_SPANS = 64
MAX_CONVERSATION_BYTES = 1 << 20

# What messages mean by their role; others are what the request as a whole says.
BY_ROLE = {
    "system": Meaning("SYSTEM_PROMPT"),
    "developer": Meaning("SYSTEM_PROMPT"),
    "tool": Meaning("TOOL_RESULT"),
    "function": Meaning("TOOL_RESULT"),
}
TOOLS = Meaning("TOOL_DEFINITION")
# Fields of a request that change how its messages are written.
_WRITTEN = ("model", "chat_template", "chat_template_kwargs", "add_special_tokens", "mm_processor_kwargs")
# Some templates refuse a conversation without a user.
_USER = {"role": "user", "content": ""}

Asking = Generator[dict, "list[int] | None", Any]


@dataclass(frozen=True)
class _Run:
    """Messages in a row that mean the same."""

    first: int
    end: int
    meaning: Meaning


class SpanReader:
    """Remembers where messages begin; for one server, or several with the same models."""

    def __init__(self, by_role: dict[str, Meaning] | None = None) -> None:
        self.by_role = BY_ROLE if by_role is None else by_role
        self._known: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def spans(self, body: dict, marked: Callable[[str], Meaning | None] = lambda text: None) -> Asking:
        """The spans of a chat request, as its hints say them. `marked` knows what some texts mean."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or body.get("continue_final_message"):
            return []
        if len(json.dumps(messages)) > MAX_CONVERSATION_BYTES:
            return []
        prompt = _Prompt(self, body)
        tools = (yield from prompt.tools()) if prompt.written.get("tools") else None
        found = []
        for run in self._runs(messages, marked):
            start = yield from prompt.begins(run.first)
            end = yield from prompt.begins(run.end)
            if start is not None and end is not None:
                found += [{"start": a, "end": b, **run.meaning.fields()} for a, b in _without((start, end), tools)]
        if tools:
            found.append({"start": tools[0], "end": tools[1], **TOOLS.fields()})
        return sorted((s for s in found if s["start"] < s["end"]), key=lambda span: span["start"])[:MAX_SPANS]

    def _runs(self, messages: list, marked: Callable[[str], Meaning | None]) -> list[_Run]:
        runs: list[_Run] = []
        for number, message in enumerate(messages):
            content = message.get("content") if isinstance(message, dict) else None
            text = content if isinstance(content, str) else _joined(content)
            role = message.get("role", "") if isinstance(message, dict) else ""
            meaning = (marked(text) if text else None) or self.by_role.get(role) or Meaning()
            if runs and runs[-1].meaning == meaning:
                runs[-1] = _Run(runs[-1].first, number + 1, meaning)
            else:
                runs.append(_Run(number, number + 1, meaning))
        return [run for run in runs if run.meaning.fields()]

    def _recall(self, key: str) -> tuple[int, int] | None:
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                self._known.move_to_end(key)
            return found

    def _remember(self, key: str, place: tuple[int, int]) -> None:
        with self._lock:
            self._known[key] = place
            while len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)


class _Prompt:
    """One request's prompt, while its places are looked for."""

    def __init__(self, reader: SpanReader, body: dict) -> None:
        self.reader, self.messages = reader, body["messages"]
        self.written = {key: body[key] for key in (*_WRITTEN, "tools") if body.get(key) is not None}
        self.calls = 0
        self._all: list[int] | None = None

    def begins(self, count: int) -> Asking:
        """The token at which the message after the first `count` begins; `None` where that cannot be told."""
        if count == 0:
            return 0
        key = self._key("begins", count)
        known = self.reader._recall(key)
        if known is None:
            known = yield from self._measure(self.messages[:count])
            if known is None:
                return None
            self.reader._remember(key, known)
        return known[1]

    def _measure(self, first: list) -> Asking:
        if self._all is None:
            self._all = yield from self._ask(self.messages, True)
        if self._all is None:
            return None
        for probe in (first, [*first, _USER]):
            tokens = yield from self._ask(probe, False)
            if tokens is not None:
                # Templates may write the last message in another way than one in the middle.
                return (0, _common(tokens, self._all))
        return None

    def tools(self) -> Asking:
        """The tokens of the tools' definitions: what is missing from the prompt without them."""
        users = [n for n, m in enumerate(self.messages) if isinstance(m, dict) and m.get("role") == "user"]
        count = users[0] + 1 if users else len(self.messages)
        key = self._key("tools", count)
        known = self.reader._recall(key)
        if known is None:
            first = self.messages[:count]
            with_them = yield from self._ask(first, False)
            without = yield from self._ask(first, False, tools=False)
            if with_them is None or without is None:
                return None
            start = _common(with_them, without)
            tail = _common(with_them[start:][::-1], without[start:][::-1])
            known = (start, len(with_them) - tail)
            self.reader._remember(key, known)
        return known if known[0] < known[1] else None

    def _ask(self, messages: list, prompted: bool, tools: bool = True) -> Asking:
        if self.calls >= MAX_CALLS:
            return None
        self.calls += 1
        body = {**self.written, "messages": messages, "add_generation_prompt": prompted}
        if not tools:
            del body["tools"]
        return (yield body)

    def _key(self, what: str, count: int) -> str:
        text = json.dumps([what, self.written, self.messages[:count]], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _common(a: list[int], b: list[int]) -> int:
    for number, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return number
    return min(len(a), len(b))


def _without(whole: tuple[int, int], hole: tuple[int, int] | None) -> list[tuple[int, int]]:
    """What is left of a range."""
    if hole is None or hole[1] <= whole[0] or whole[1] <= hole[0]:
        return [whole]
    return [(whole[0], hole[0]), (hole[1], whole[1])]


def _joined(content: Any) -> str:
    """The text of a message in parts."""
    if not isinstance(content, list):
        return ""
    texts = (part.get("text") for part in content if isinstance(part, dict))
    return "".join(text for text in texts if isinstance(text, str))
