"""Messages of `Programs` in protobuf's wire format: neither protobuf nor generated code is needed.

Field numbers are those of `proto/kvtier/v1/programs.proto`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtier_agents.signals import Signal

# Semantic types in the order of their numbers, from one.
TYPES = (
    "SYSTEM_PROMPT",
    "TOOL_DEFINITION",
    "REASONING_BRANCH",
    "EXECUTION_CHECKPOINT",
    "CONVERSATION_TURN",
    "TOOL_RESULT",
    "DOCUMENT",
    "SCRATCHPAD",
    "SKILL",
)
KINDS = ("", "TOOL_WAIT", "CONTINUATION", "FORK", "JOIN", "COMPACTION", "COMPLETION", "CANCELLATION")
OUTCOMES = (
    "UNSPECIFIED",
    "APPLIED",
    "ACCEPTED",
    "CLIPPED",
    "DEFERRED",
    "DUPLICATE",
    "REJECTED",
    "MISSING",
    "UNSUPPORTED",
)
PLACE_REASONS = ("UNSPECIFIED", "STAYS", "STATE", "QUEUE", "UNKNOWN_STATE")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class PlaceRequest:
    """Where to run a program's next step: `PlaceRequest`. `queues` are milliseconds by node."""

    program_id: str
    queues: dict[str, int]
    current: str = ""
    deadline_ms: int = 0
    start: bool = False


@dataclass(frozen=True)
class Placed:
    """`PlaceReply`, as far as agents need it."""

    node_id: str
    reason: str
    explanation: str


def signal_request(signal: Signal) -> bytes:
    """`SignalRequest`."""
    parts = [text(1, signal.program_id), text(2, signal.parent_program_id)]
    parts.append(number(3, KINDS.index(signal.kind)))
    parts += [text(4, child) for child in signal.children]
    parts.append(number(5, signal.expected_resume_ms))
    return b"".join(parts)


def signal_reply(data: bytes) -> tuple[str, str]:
    """Outcome and reason of a `SignalReply`; replies to declarations and progress begin alike."""
    outcome, reason = 0, ""
    for field, value in read(data):
        if field == 1 and isinstance(value, int):
            outcome = value
        elif field == 2 and isinstance(value, bytes):
            reason = value.decode(errors="replace")
    return OUTCOMES[outcome] if outcome < len(OUTCOMES) else "UNSPECIFIED", reason


def place_request(step: PlaceRequest) -> bytes:
    """`PlaceRequest`."""
    parts = [text(1, step.program_id)]
    parts += [message(4, text(1, node) + number(2, queue)) for node, queue in step.queues.items()]
    parts += [text(5, step.current), number(6, int(step.start)), number(8, step.deadline_ms)]
    return b"".join(parts)


def place_reply(data: bytes) -> Placed:
    """`PlaceReply`; what else it says is passed over."""
    reason, texts = 0, {1: "", 3: ""}
    for field, value in read(data):
        if field == 2 and isinstance(value, int):
            reason = value
        elif field in texts and isinstance(value, bytes):
            texts[field] = value.decode(errors="replace")
    named = PLACE_REASONS[reason] if reason < len(PLACE_REASONS) else "UNSPECIFIED"
    return Placed(texts[1], named, texts[3])


def read(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message by number: numbers, and texts and messages as bytes, without those of fixed length."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _read_varint(data, at)
            yield tag >> 3, value
        elif kind == _BYTES:
            length, at = _read_varint(data, at)
            yield tag >> 3, data[at : at + length]
            at += length
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"no such wire type: {kind}")


def text(field: int, value: str) -> bytes:
    """A field with a text, nothing for an empty one."""
    return message(field, value.encode()) if value else b""


def message(field: int, data: bytes) -> bytes:
    """A field with a message, an empty one too."""
    return _varint(field << 3 | _BYTES) + _varint(len(data)) + data


def number(field: int, value: int) -> bytes:
    """A field with a number that is not negative, nothing for zero."""
    return _varint(field << 3 | _VARINT) + _varint(value) if value else b""


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number without an end")
