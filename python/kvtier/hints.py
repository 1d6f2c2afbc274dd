"""What a request says of its tokens: `kv_transfer_params` of the OpenAI API, validated.

`{"program_id": str, "semantic": TYPE, "spans": [{"start": int, "end": int, "type": TYPE}]}`; spans are token ranges of
the prompt. Other keys belong to other connectors. What does not make sense is dropped with one warning a process.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

logger = logging.getLogger("vllm.kvtier")

# Wire numbers.
SEMANTIC_TYPES = {
    "UNSPECIFIED": 0,
    "SYSTEM_PROMPT": 1,
    "TOOL_DEFINITION": 2,
    "REASONING_BRANCH": 3,
    "EXECUTION_CHECKPOINT": 4,
    "CONVERSATION_TURN": 5,
    "TOOL_RESULT": 6,
    "DOCUMENT": 7,
    "SCRATCHPAD": 8,
    "SKILL": 9,
}
# A block that spans two types takes the one that is worth keeping longer: least durable first.
_DURABILITY = [0, 8, 3, 6, 5, 7, 4, 9, 2, 1]
_RANK = {number: rank for rank, number in enumerate(_DURABILITY)}

MAX_PROGRAM_ID_BYTES = 128
MAX_SPANS = 256

_warned = False


@dataclass(frozen=True)
class Hints:
    """Program and default type of a request's blocks, spans of other types, and its salt, which chooses the tenant."""

    program_id: str = ""
    semantic: int = 0
    # (first token, end token, type)
    spans: tuple[tuple[int, int, int], ...] = ()
    salt: str | None = None

    def of_block(self, start: int, end: int) -> int:
        """The type of the block of tokens `start..end`."""
        found = [kind for first, last, kind in self.spans if first < end and start < last]
        return max(found, key=_RANK.__getitem__) if found else self.semantic

    def with_semantic(self, semantic: int) -> Hints:
        """The same with another type for all."""
        return Hints(self.program_id, semantic, salt=self.salt)


NO_HINTS = Hints()


def parse(params: object) -> Hints:
    """Hints of a request's transfer params; never raises."""
    if not isinstance(params, dict):
        return NO_HINTS
    junk: list[str] = []
    program = params.get("program_id", "")
    if not isinstance(program, str) or len(program.encode(errors="replace")) > MAX_PROGRAM_ID_BYTES:
        junk.append("program_id")
        program = ""
    semantic = _type(params.get("semantic", "UNSPECIFIED"))
    if semantic is None:
        junk.append("semantic")
    spans = _spans(params.get("spans", []), junk)
    _warn(junk)
    return Hints(program, semantic or 0, spans) if program or semantic or spans else NO_HINTS


def _spans(raw: object, junk: list[str]) -> tuple[tuple[int, int, int], ...]:
    if not isinstance(raw, list) or len(raw) > MAX_SPANS:
        junk.append("spans")
        return ()
    spans = []
    for number, span in enumerate(raw):
        get = span.get if isinstance(span, dict) else lambda _key: None
        start, end, kind = get("start"), get("end"), _type(get("type"))
        if type(start) is int and type(end) is int and 0 <= start < end and kind is not None:
            spans.append((start, end, kind))
        else:
            junk.append(f"spans[{number}]")
    return tuple(spans)


def _type(name: object) -> int | None:
    return SEMANTIC_TYPES.get(name.upper()) if isinstance(name, str) else None


def _warn(junk: list[str]) -> None:
    global _warned
    if junk and not _warned:
        _warned = True
        logger.warning("kv_transfer_params: ignored what is not valid: %s (said once)", ", ".join(junk[:8]))
