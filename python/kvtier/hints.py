"""What a request says of its tokens, gathered from all that carries hints, strongest first: `Request.kv_hints` (vLLM's
envelope), `vllm_xargs`, the session id, `kv_transfer_params`.

The daemon reads them (docs/HINTS.md says what): here they are only picked out, bounded and written as one JSON text.
Nothing here raises; what cannot be handed on is told as an outcome, and warned about once a process.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("vllm.kvtier")

# Version of the text.
_VERSION = 1
# The daemon reads no more.
MAX_BYTES = 64 * 1024
# What is warned about names this many outcomes.
_MAX_NAMED = 8

# Fields of other APIs that say how long a prompt is worth keeping.
_FOREIGN = (
    "prompt_cache_retention",
    "prompt_cache_options",
    "cache_control",
    "agent_hints",
    "agent_context",
    "nvext",
    "lmcache_retention_ttl_sec",
    "token_range_retention_configs",
    "tokenRangeRetentionConfigs",
    "tokenRangeRetentionConfig",
    "kv_cache_retention_config",
)
_XARGS = ("agentic_context", "kvtier", *_FOREIGN)
# Other keys of `kv_transfer_params` belong to other connectors.
_PARAMS = (
    "program_id",
    "parent_program_id",
    "parent_agent_id",
    "session_id",
    "agent_role",
    "blocks_parent",
    "expected_resume",
    "expected_resume_ms",
    "semantic",
    "spans",
    "taints",
    "tolerations",
    "priority",
    "ttl",
    "ttl_ms",
    "signal",
    *_FOREIGN,
)

_warned = False


@dataclass(frozen=True)
class Hints:
    """A request's hints as the daemon reads them, empty for none; and its salt, which chooses the tenant."""

    text: bytes = b""
    salt: str | None = None
    # What became of hints that could not be handed on.
    outcomes: tuple[dict[str, str], ...] = ()

    @property
    def given(self) -> bool:
        """Whether the request carried any."""
        return bool(self.text or self.outcomes)

    def at_the_end(self) -> Hints | None:
        """What the daemon is told once the request ended; `None` for nothing."""
        if b"expected_resume" not in self.text:
            return None
        return Hints(self.text[:-1] + b',"finished":true}', self.salt)


def collect(request: Any) -> Hints:
    """The hints of a vLLM request; never raises."""
    salt = getattr(request, "cache_salt", None)
    outcomes: list[dict[str, str]] = []
    # Strongest first.
    readers = {"kv_hints": _envelope, "xargs": _xargs, "session_id": _session, "params": _params}
    document: dict[str, str] = {}
    room = MAX_BYTES - 128
    for name, read in readers.items():
        try:
            value = read(request)
            if value is None:
                continue
            text = json.dumps(value, separators=(",", ":"), allow_nan=False)
        except Exception as error:
            outcomes.append(_rejected(name, f"it cannot be read: {type(error).__name__}"))
            continue
        size = len(text) + len(name) + 4
        if size > room:
            outcomes.append(_rejected(name, f"all hints together may have {MAX_BYTES} bytes"))
            continue
        room -= size
        document[name] = text
    note(outcomes)
    if not document:
        return Hints(salt=salt, outcomes=tuple(outcomes))
    tokens = getattr(request, "num_prompt_tokens", None)
    parts = [f'"v":{_VERSION}', f'"prompt_tokens":{tokens if isinstance(tokens, int) else 0}', *(f'"{k}":{v}' for k, v in document.items())]
    return Hints(("{" + ",".join(parts) + "}").encode("ascii"), salt, tuple(outcomes))


def _envelope(request: Any) -> dict | None:
    envelope = getattr(request, "kv_hints", None)
    if envelope is None:
        return None
    fields = ("protocol_version", "message_id")
    plain = {name: _field(envelope, name) for name in fields}
    of_action = ("action_id", "action_type", "action_version", "payload")
    plain["actions"] = [{name: _field(action, name) for name in of_action} for action in _field(envelope, "actions")]
    return plain


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)


def _xargs(request: Any) -> dict | None:
    extra = getattr(getattr(request, "sampling_params", None), "extra_args", None)
    return _pick(extra, _XARGS)


def _session(request: Any) -> Any:
    return getattr(request, "session_id", None) or None


def _params(request: Any) -> dict | None:
    return _pick(getattr(request, "kv_transfer_params", None), _PARAMS)


def _pick(source: Any, keys: tuple[str, ...]) -> dict | None:
    if not isinstance(source, dict):
        return None
    return {key: source[key] for key in keys if source.get(key) is not None} or None


def _rejected(name: str, reason: str) -> dict[str, str]:
    kind = {"xargs": "vllm_xargs", "params": "kv_transfer_params"}.get(name, name)
    return {"action_id": "", "action_type": kind, "outcome": "REJECTED", "reason": reason}


def note(outcomes: list[dict[str, str]]) -> None:
    """Warns, once a process, when hints were rejected."""
    global _warned
    rejected = [f"{o.get('action_type')} ({o.get('reason')})" for o in outcomes if o.get("outcome") == "REJECTED"]
    if rejected and not _warned:
        _warned = True
        logger.warning("hints rejected: %s (said once; each response tells its own)", "; ".join(rejected[:_MAX_NAMED]))
