"""The C ABI of `libkvtier.so` through ctypes: structures as in `kvtier.h`, and nothing but calls.

Every call releases the interpreter's lock. `KVTIER_LIBRARY` names the library; otherwise the one packaged here is used.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, byref, c_char_p, c_int32, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path

ABI_VERSION = 3
FRAME_BYTES = 80
TRANSFER_BYTES = 88
KEY_BYTES = 32

OK, PENDING, MISS = 0, 1, 2
STATUS_NAMES = {
    -1: "invalid argument",
    -2: "the process was forked",
    -3: "the session is closed",
    -4: "the library panicked",
    -5: "refused",
    -6: "too many at once",
    -7: "the buffer is too small",
    -8: "I/O error",
}
FORKED, LIMIT = -2, -6

# Results of one transfer of a job, and states of one reserved block.
DONE, CORRUPT, LOST = 1, 2, 3
GRANTED, PRESENT, BUSY = 1, 2, 3


class NativeError(RuntimeError):
    """A call of the library failed."""

    def __init__(self, call: str, status: int, message: str = "") -> None:
        name = STATUS_NAMES.get(status, f"status {status}")
        super().__init__(f"{call}: {name}{': ' + message if message else ''}")
        self.status = status


class LookupRequest(Structure):
    """kvtier_lookup_request."""

    _fields_ = [
        ("size", c_uint32),
        ("hash_len", c_uint32),
        ("request_id", c_char_p),
        ("hashes", c_char_p),
        ("hash_count", c_uint32),
        ("local_tokens", c_uint32),
        ("cache_salt", c_char_p),
        ("hints", c_char_p),
        ("hints_len", c_uint32),
        ("deadline_ms", c_uint32),
    ]


class Hit(Structure):
    """kvtier_hit: the usable prefix in tokens, and where the part beyond the computed tokens lies."""

    _fields_ = [(name, c_uint32) for name in ("size", "tokens", "host", "disk", "object", "peer", "device")]


class ReserveRequest(Structure):
    """kvtier_reserve_request."""

    _fields_ = [
        ("size", c_uint32),
        ("hash_len", c_uint32),
        ("group", c_uint32),
        ("first_block", c_uint32),
        ("hashes", c_char_p),
        ("count", c_uint32),
        ("hints_len", c_uint32),
        ("parent_hash", c_char_p),
        ("cache_salt", c_char_p),
        ("hints", c_char_p),
    ]


class Frame(Structure):
    """kvtier_frame."""

    _fields_ = [
        ("key", c_uint8 * KEY_BYTES),
        ("group", c_uint32),
        ("shard", c_uint32),
        ("extent", c_uint32),
        ("source", c_uint32),
        ("offset", c_uint64),
        ("bytes", c_uint64),
        ("generation", c_uint64),
        ("checksum", c_uint64),
    ]


class Transfer(Structure):
    """kvtier_transfer."""

    _fields_ = [("frame", Frame), ("block_id", c_uint32), ("reserved", c_uint32)]


class Region(Structure):
    """kvtier_region: where one layer of a group keeps its blocks."""

    _fields_ = [
        ("size", c_uint32),
        ("group", c_uint32),
        ("base", c_uint64),
        ("span_bytes", c_uint64),
        ("block_stride", c_uint64),
        ("run_bytes", c_uint64),
        ("block_count", c_uint64),
    ]


assert ctypes.sizeof(Frame) == FRAME_BYTES and ctypes.sizeof(Transfer) == TRANSFER_BYTES

_SIGNATURES = {
    "kvtier_session_open": [c_char_p, POINTER(c_void_p), c_char_p, c_size_t],
    "kvtier_session_state": [c_void_p, POINTER(c_int32), c_char_p, c_size_t],
    "kvtier_switch_namespace": [c_void_p, c_char_p],
    "kvtier_lookup_submit": [c_void_p, POINTER(LookupRequest)],
    "kvtier_lookup_poll": [c_void_p, c_char_p, c_uint32, c_uint32, POINTER(Hit)],
    "kvtier_lookup_frames": [c_void_p, c_char_p, c_uint32, c_uint32, c_uint32, c_uint32, c_void_p],
    "kvtier_release": [c_void_p, c_char_p, c_uint32, c_uint32, c_uint32],
    "kvtier_hints_submit": [c_void_p, c_char_p, c_char_p, c_char_p, c_uint32],
    "kvtier_hints_outcomes": [c_void_p, c_char_p, c_char_p, c_size_t],
    "kvtier_reserve_submit": [c_void_p, POINTER(ReserveRequest), POINTER(c_uint64)],
    "kvtier_reserve_poll": [c_void_p, c_uint64, c_void_p, c_void_p, c_uint32],
    "kvtier_reserve_abandon": [c_void_p, c_char_p, c_uint32],
    "kvtier_register_regions": [c_void_p, POINTER(Region), c_uint32],
    "kvtier_load_submit": [c_void_p, c_char_p, c_char_p, c_uint32, c_uint32, c_uint64, POINTER(c_uint64)],
    "kvtier_save_submit": [c_void_p, c_char_p, c_uint32, c_uint32, c_uint64, POINTER(c_uint64)],
    "kvtier_job_wait": [c_void_p, c_uint64, c_uint32, c_void_p, c_uint32],
    "kvtier_job_cancel": [c_void_p, c_uint64],
    "kvtier_weights_digest": [c_char_p, c_char_p, c_size_t],
    "kvtier_counters": [c_void_p, c_char_p, c_size_t],
}

_library: ctypes.CDLL | None = None


def library_path() -> Path:
    """The library that will be opened."""
    override = os.environ.get("KVTIER_LIBRARY")
    return Path(override) if override else Path(__file__).with_name("libkvtier.so")


def library() -> ctypes.CDLL:
    """The opened library, its version checked."""
    global _library
    if _library is not None:
        return _library
    path = library_path()
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(
            f"libkvtier.so could not be opened ({error}): install the kvtier wheel, or set KVTIER_LIBRARY to its path"
        ) from error
    lib.kvtier_abi_version.restype = c_uint32
    found = lib.kvtier_abi_version()
    if found != ABI_VERSION:
        raise RuntimeError(
            f"{path} has ABI version {found}, this plugin needs {ABI_VERSION}: install one release of both"
        )
    for name, arguments in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, c_int32
    lib.kvtier_session_close.argtypes, lib.kvtier_session_close.restype = [c_void_p, c_uint32], None
    _library = lib
    return lib


def check(call: str, status: int) -> int:
    """Passes OK, PENDING and MISS on and raises on everything else."""
    if status < 0:
        raise NativeError(call, status)
    return status


def weights_digest(path: str) -> str:
    """Digest of a checkpoint directory."""
    out = ctypes.create_string_buffer(512)
    check("kvtier_weights_digest", library().kvtier_weights_digest(os.fsencode(path), out, len(out)))
    return out.value.decode()


def open_session(spec_json: str) -> c_void_p:
    """Opens a session; it attaches in the background."""
    handle, message = c_void_p(), ctypes.create_string_buffer(1024)
    status = library().kvtier_session_open(spec_json.encode(), byref(handle), message, len(message))
    if status != OK:
        raise NativeError("kvtier_session_open", status, message.value.decode(errors="replace"))
    return handle
