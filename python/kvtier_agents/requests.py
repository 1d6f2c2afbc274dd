"""What is added to a request, and where it goes; no I/O.

*Invariants*: what is wrong here costs the hints, never the request; what the caller said itself stays
(`test_what_the_caller_says_stays`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvtier_agents import signals
from kvtier_agents.headers import identity
from kvtier_agents.programs import Program, State
from kvtier_agents.spans import Asking, SpanReader

# Requests of vLLM that take `vllm_xargs`.
PATHS = ("/chat/completions", "/completions")
SESSION_HEADER = "X-Session-ID"
# llm-d's router shares out what it has by this one.
FAIRNESS_HEADER = "x-llm-d-inference-fairness-id"
# A larger body is not looked into.
MAX_BODY_BYTES = 8 << 20
# The daemon reads 64 KiB of hints a request, of all carriers.
_MAX_HINT_BYTES = 48 << 10


@dataclass(frozen=True)
class Change:
    """What becomes of a request."""

    body: dict
    headers: dict[str, str]


def readable(method: str, path: str, content_type: str, length: int) -> bool:
    """Whether it is one of those that are added to."""
    named = method == "POST" and path.rstrip("/").endswith(PATHS)
    return named and "json" in content_type and 0 < length <= MAX_BODY_BYTES


def said_by(state: State, headers: Mapping[str, str], content: bytes) -> State:
    """What is current, with the program that the request's headers name where none is and its body names none."""
    found = identity(headers) if state.program is None else None
    if found is None or not found.program_id or _names_program(content):
        return state
    parent = found.parent_program_id
    parent = Program(parent, session=found.session_id or None) if parent else None
    return replace(state, program=Program(found.program_id, parent, found.session_id or None))


def _names_program(content: bytes) -> bool:
    """Whether a body says whose it is, in one of the fields that the daemon reads."""
    body = _object(content)
    xargs = _object(body.get("vllm_xargs"))
    places = (
        _object(xargs.get("agentic_context")),
        _object(xargs.get("kvtier")),
        _object(body.get("kv_transfer_params")),
    )
    return any(place.get("program_id") for place in places)


def _object(value: Any) -> dict:
    """An object, or the JSON text of one; empty for anything else."""
    try:
        value = json.loads(value) if isinstance(value, (str, bytes)) else value
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def change(state: State, body: dict, reader: SpanReader | None, fairness: bool = False) -> Asking:
    """The request with what is current said in it; `None` to leave it alone. Yields what `SpanReader.spans` does."""
    program = state.program
    said = {**_identity(program), **state.meaning.fields()}
    if said and reader is not None:
        try:
            spans = yield from reader.spans(body, program.marked if program else lambda text: None)
        except Exception:
            spans = []
        if spans:
            said["spans"] = spans
            said.setdefault("type", "CONVERSATION_TURN")
    if program and (carried := (program.signals or signals.default()).carried()):
        said["signal"] = carried.fields()
    if not said:
        return None
    return Change({**body, "vllm_xargs": _xargs(body, said)}, _headers(program, body, fairness))


def _identity(program: Program | None) -> dict[str, Any]:
    if program is None:
        return {}
    said = {"program_id": program.id, "parent_program_id": program.parent.id if program.parent else ""}
    said |= {"tolerations": list(program.tolerations), "agent_role": program.role}
    said |= {} if program.blocks_parent is None else {"blocks_parent": program.blocks_parent}
    said |= {} if _fits_header(program.session) else {"session_id": program.session}
    return {key: value for key, value in said.items() if value or value is False}


def _headers(program: Program | None, body: dict, fairness: bool) -> dict[str, str]:
    if program is None:
        return {}
    # The body's session counts before the header.
    headers = {} if body.get("session_id") else {SESSION_HEADER: program.session}
    headers |= {FAIRNESS_HEADER: program.root.id} if fairness else {}
    return {name: value for name, value in headers.items() if _fits_header(value)}


def _fits_header(value: str) -> bool:
    return value.isascii() and value.isprintable() and value == value.strip()


def _xargs(body: dict, said: dict[str, Any]) -> dict:
    """The request's `vllm_xargs` with ours; what it said itself counts before it."""
    given = body.get("vllm_xargs") or {}
    own = given.get("kvtier")
    if own is not None:
        read = json.loads(own) if isinstance(own, str) else own
        if not isinstance(read, dict):
            return given
        said = {**said, **read}
    text = json.dumps(said, separators=(",", ":"))
    if len(text) > _MAX_HINT_BYTES:
        text = json.dumps({key: value for key, value in said.items() if key != "spans"}, separators=(",", ":"))
    return {**given, "kvtier": text}
