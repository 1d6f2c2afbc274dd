"""The connector's settings: `kv_connector_extra_config` of vLLM's KV transfer config, checked once."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

DEFAULT_SOCKET = "/run/kvtier/kvtierd.sock"
_MAX_TIMEOUT_MS = 600_000
# In MiB a second: more than any bus moves.
_MAX_BANDWIDTH = 10_000_000


@dataclass(frozen=True)
class Config:
    """Settings with their defaults; times in milliseconds."""

    # The daemon's Unix socket on this node; KVTIER_SOCKET, else DEFAULT_SOCKET, when empty.
    socket: str = ""
    # Load between steps instead of in front of one. Models with several KV groups always do.
    async_load: bool = True
    # Save between steps instead of at the end of one.
    async_save: bool = True
    # How long a new request may wait for the answer to its lookup.
    lookup_timeout_ms: int = 500
    # How long a load may take before what is missing is recomputed.
    load_timeout_ms: int = 5_000
    # How long a save may take before it is given up.
    save_timeout_ms: int = 10_000
    # How long the blocks of a finished request may be kept for reservations that are not answered yet.
    finish_grace_ms: int = 200
    # How long shutdown may take to let saves finish; vLLM kills what takes more than a few seconds.
    shutdown_timeout_ms: int = 2_000
    # Longest wait for one call of the daemon.
    call_timeout_ms: int = 2_000
    # Threads that copy, in each worker.
    copy_threads: int = 1
    # Most MiB a second that copies between a GPU and elsewhere may move, in each worker; 0 for as many as come.
    device_bandwidth_mib_s: int = 0
    # Most lookups, reservations or jobs at once, each.
    max_inflight: int = 4_096
    # A namespace of this engine alone: nothing is shared with other engines or outlives this one.
    private: bool = False

    @classmethod
    def parse(cls, extra: dict) -> Config:
        """Reads the extra config.

        Raises ValueError naming the key that is unknown or has a value of the wrong type or range.
        """
        known = {f.name: f.default for f in fields(cls)}
        unknown = sorted(set(extra) - set(known))
        if unknown:
            raise ValueError(
                f"kv_connector_extra_config has unknown keys {', '.join(unknown)}: "
                f"kvtier knows {', '.join(sorted(known))}"
            )
        for key, value in extra.items():
            _check(key, value, known[key])
        config = cls(**extra)
        socket = config.socket or os.environ.get("KVTIER_SOCKET") or DEFAULT_SOCKET
        if not os.path.isabs(socket):
            raise ValueError(f"kv_connector_extra_config.socket must be an absolute path, got {socket!r}")
        return cls(**{**extra, "socket": socket})


def _check(key: str, value: object, default: object) -> None:
    if type(value) is not type(default):
        kind = {bool: "true or false", int: "a whole number", str: "a string"}[type(default)]
        raise ValueError(f"kv_connector_extra_config.{key} must be {kind}, got {value!r}")
    limit = _MAX_TIMEOUT_MS if key.endswith("_ms") else _MAX_BANDWIDTH if key.endswith("_mib_s") else 65_536
    least = 0 if key in ("finish_grace_ms", "device_bandwidth_mib_s") else 1
    if type(value) is int and not least <= value <= limit:
        raise ValueError(f"kv_connector_extra_config.{key} must be {least} to {limit}, got {value}")
