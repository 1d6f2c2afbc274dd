"""A session of the library with Python types: opened lazily, and anew in a forked child.

Thread-safe as far as the library is. Nothing here waits for the daemon except `job_wait`, `close`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import threading
from ctypes import byref, c_int32, c_uint64, c_void_p

from kvtier import _native as native
from kvtier.hints import Hints

# The library's own answers are small; more than this is cut.
_TEXT_BYTES = 16 * 1024
# The library tells no more of a request's hints.
_OUTCOMES_BYTES = 64 * 1024
STATES = ("absent", "attached", "refused")
# The daemon takes no longer request ids; vLLM's hold what the client chose.
_MAX_ID_BYTES = 256


def _text(value: str | None) -> bytes | None:
    return None if not value else value.replace("\0", " ").encode()


def _request_id(value: str) -> bytes | None:
    """The id by which the daemon knows a request: a long one ends in a digest instead."""
    text = _text(value)
    if text is None or len(text) <= _MAX_ID_BYTES:
        return text
    end = b" " + hashlib.sha256(text).hexdigest().encode()
    return text[: _MAX_ID_BYTES - len(end)].decode(errors="ignore").encode() + end


class Session:
    """One attachment of this process, by spec (the JSON of `kvtier_session_open`)."""

    def __init__(self, spec: dict) -> None:
        self._spec = json.loads(json.dumps(spec))
        self._regions: list[tuple[int, ...]] = []
        self._lock = threading.Lock()
        self._handle: c_void_p | None = None
        self._pid = os.getpid()
        self._closed = False
        self._open()

    def _open(self) -> c_void_p:
        self._handle = native.open_session(json.dumps(self._spec))
        if self._regions:
            self._register()
        return self._handle

    def _live(self) -> c_void_p:
        """The handle, valid in this process: a forked child must not touch its parent's."""
        if self._handle is not None and self._pid == os.getpid():
            return self._handle
        with self._lock:
            if self._closed:
                raise native.NativeError("session", -3)
            if self._pid != os.getpid():
                self._pid, self._handle = os.getpid(), None
            return self._handle or self._open()

    def _call(self, name: str, *arguments: object) -> int:
        return native.check(name, getattr(native.library(), name)(self._live(), *arguments))

    def close(self, deadline_ms: int) -> None:
        """Lets started copies finish within the deadline; later calls raise."""
        with self._lock:
            handle, self._handle, self._closed = self._handle, None, True
            if handle is not None and self._pid == os.getpid():
                native.library().kvtier_session_close(handle, deadline_ms)

    def state(self) -> tuple[str, str]:
        """`absent`, `attached` or `refused`, and what the daemon said."""
        state, text = c_int32(), ctypes.create_string_buffer(_TEXT_BYTES)
        self._call("kvtier_session_state", byref(state), text, len(text))
        return STATES[state.value] if 0 <= state.value < len(STATES) else "absent", text.value.decode(errors="replace")

    def counters(self) -> dict:
        """The session's own counters."""
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        self._call("kvtier_counters", text, len(text))
        return json.loads(text.value or b"{}")

    def switch_namespace(self, revision: str) -> None:
        """Moves to another revision at once; pending lookups are dropped."""
        self._call("kvtier_switch_namespace", revision.encode())
        self._spec["namespace"]["revision"] = revision

    # Scheduler side.

    def lookup_submit(self, request_id: str, hashes: list[bytes], deadline_ms: int, hints: Hints) -> None:
        """Asks for the blocks of a prefix."""
        request = native.LookupRequest(
            size=ctypes.sizeof(native.LookupRequest),
            hash_len=len(hashes[0]) if hashes else 0,
            request_id=_request_id(request_id),
            hashes=b"".join(hashes),
            hash_count=len(hashes),
            cache_salt=_text(hints.salt),
            hints=hints.text or None,
            hints_len=len(hints.text),
            deadline_ms=deadline_ms,
        )
        self._call("kvtier_lookup_submit", byref(request))

    def lookup_poll(self, request_id: str, computed_tokens: int, max_tokens: int) -> native.Hit | None:
        """None while pending; a hit of no tokens for an unknown request."""
        hit = native.Hit(size=ctypes.sizeof(native.Hit))
        status = self._call("kvtier_lookup_poll", _request_id(request_id), computed_tokens, max_tokens, byref(hit))
        if status == native.PENDING:
            return None
        return hit if status == native.OK else native.Hit()

    def lookup_frames(self, request_id: str, group: int, shard: int, first: int, count: int) -> bytes:
        """Packed frames of blocks; the key of a block that is not there is zero."""
        out = ctypes.create_string_buffer(native.FRAME_BYTES * count)
        self._call("kvtier_lookup_frames", _request_id(request_id), group, shard, first, count, out)
        return out.raw

    def release(self, request_id: str, local_tokens: int, claimed_tokens: int, lost_tokens: int) -> None:
        """Ends a lookup."""
        self._call("kvtier_release", _request_id(request_id), local_tokens, claimed_tokens, lost_tokens)

    def hints_submit(self, request_id: str, hints: Hints) -> None:
        """Hands on what a request's client said, once a request."""
        self._call("kvtier_hints_submit", _request_id(request_id), _text(hints.salt), hints.text, len(hints.text))

    def hints_outcomes(self, request_id: str) -> list[dict[str, str]] | None:
        """What became of a request's hints, once; None while that is not known, or never will be."""
        text = ctypes.create_string_buffer(_OUTCOMES_BYTES)
        status = self._call("kvtier_hints_outcomes", _request_id(request_id), text, len(text))
        return json.loads(text.value) if status == native.OK else None

    def reserve_submit(self, group: int, first: int, hashes: list[bytes], parent: bytes | None, hints: Hints) -> int:
        """Asks for frames; the daemon reads in `hints` what each block is."""
        request = native.ReserveRequest(
            size=ctypes.sizeof(native.ReserveRequest),
            hash_len=len(hashes[0]),
            group=group,
            first_block=first,
            hashes=b"".join(hashes),
            count=len(hashes),
            hints_len=len(hints.text),
            parent_hash=parent,
            cache_salt=_text(hints.salt),
            hints=hints.text or None,
        )
        ticket = c_uint64()
        self._call("kvtier_reserve_submit", byref(request), byref(ticket))
        return ticket.value

    def reserve_poll(self, ticket: int, count: int, shards: int) -> tuple[bytes, bytes] | None:
        """None while pending; then a state a block, and frames by block and shard; all busy if the ticket timed out."""
        states = ctypes.create_string_buffer(count)
        frames = ctypes.create_string_buffer(native.FRAME_BYTES * count * shards)
        status = self._call("kvtier_reserve_poll", ticket, states, frames, count * shards)
        if status == native.PENDING:
            return None
        return (states.raw, frames.raw) if status == native.OK else (bytes([native.BUSY]) * count, frames.raw)

    def reserve_abandon(self, frames: list[bytes]) -> None:
        """Gives granted frames up."""
        if frames:
            self._call("kvtier_reserve_abandon", b"".join(frames), len(frames))

    # Worker side.

    def register_regions(self, regions: list[tuple[int, ...]]) -> None:
        """Where blocks lie, by group in layer order: group, base, span_bytes, block_stride, run_bytes, block_count."""
        self._regions = regions
        self._live()
        self._register()

    def _register(self) -> None:
        array = (native.Region * len(self._regions))()
        for slot, region in zip(array, self._regions, strict=True):
            slot.size = ctypes.sizeof(native.Region)
            slot.group, slot.base, slot.span_bytes, slot.block_stride, slot.run_bytes, slot.block_count = region
        status = native.library().kvtier_register_regions(self._handle, array, len(array))
        native.check("kvtier_register_regions", status)

    def load_submit(self, request_id: str, transfers: bytes, deadline_ms: int, stream: int = 0) -> int:
        """Starts copies into blocks, after what the engine's stream was given so far."""
        job, count = c_uint64(), len(transfers) // native.TRANSFER_BYTES
        self._call("kvtier_load_submit", _request_id(request_id), transfers, count, deadline_ms, stream, byref(job))
        return job.value

    def save_submit(self, transfers: bytes, deadline_ms: int, stream: int = 0) -> int:
        """Starts copies out of blocks, after what the engine's stream was given so far; sealed in the background."""
        job, count = c_uint64(), len(transfers) // native.TRANSFER_BYTES
        self._call("kvtier_save_submit", transfers, count, deadline_ms, stream, byref(job))
        return job.value

    def job_wait(self, job: int, count: int, timeout_ms: int = 0) -> bytes | None:
        """None while copies may be under way; then a result a transfer."""
        results = ctypes.create_string_buffer(max(count, 1))
        status = self._call("kvtier_job_wait", job, timeout_ms, results, count)
        if status == native.PENDING:
            return None
        return results.raw[:count] if status == native.OK else bytes([native.LOST]) * count

    def job_cancel(self, job: int) -> None:
        """Keeps copies that have not begun from beginning."""
        self._call("kvtier_job_cancel", job)
