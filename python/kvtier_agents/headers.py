"""Who a request is of, by the headers that agents and routers send: families of headers, of which one counts.

The table is that of docs/HINTS.md (`test_the_table_is_the_documented_one`), and the daemon's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# The daemon takes no longer ids.
_MAX_ID_BYTES = 128


@dataclass(frozen=True)
class Family:
    """Headers that are sent together, and which names the session, the program and its parent: the first that is
    there."""

    sender: str
    session: tuple[str, ...]
    program: tuple[str, ...] = ()
    # A program is not its own parent.
    parent: tuple[str, ...] = ()


# The first family of which a header is there counts.
FAMILIES = (
    Family(
        "Claude Code",
        ("x-claude-code-session-id",),
        ("x-claude-code-agent-id", "x-claude-code-session-id"),
        ("x-claude-code-parent-agent-id", "x-claude-code-session-id"),
    ),
    Family("Codex, OpenCode", ("session-id", "session_id"), ("thread-id", "session-id", "session_id")),
    Family("OpenCode", ("x-session-affinity",)),
    Family("Dynamo", ("x-dynamo-session-id",)),
    Family(
        "llm-d, vLLM",
        ("x-session-id",),
        ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"),
    ),
)


@dataclass(frozen=True)
class Identity:
    """Who a request is of; empty where that was not said."""

    session_id: str = ""
    program_id: str = ""
    parent_program_id: str = ""


def identity(headers: Mapping[str, str]) -> Identity | None:
    """Who a request is of; `headers` are looked up by names in lower case. `None` where none of them is there. What
    cannot be a name counts as not there."""

    def value(names: tuple[str, ...]) -> str:
        values = ((headers.get(name) or "").strip() for name in names)
        return next((v for v in values if v and len(v.encode()) <= _MAX_ID_BYTES and "\0" not in v), "")

    for family in FAMILIES:
        session, program = value(family.session), value(family.program)
        if session or program:
            parent = value(family.parent)
            return Identity(session, program, "" if parent == program else parent)
    return None
