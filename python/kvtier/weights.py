"""Notices that a worker's weights were changed in place, which no connector hook tells.

vLLM changes weights through methods of its worker class; they are wrapped to count. From then on the worker neither
loads nor saves until the scheduler side has moved the engine to a new namespace revision.
"""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("vllm.kvtier")

# Methods of vLLM's Worker that leave other weights behind than those that were digested.
_METHODS = ("reload_weights", "update_weights", "finish_weight_update")

_epoch = 0


def epoch() -> int:
    """How many times weights were changed in this process."""
    return _epoch


def _count(method):
    @functools.wraps(method)
    def call(*args: object, **kwargs: object) -> object:
        global _epoch
        # Counted first: a change that fails half-way is a change.
        _epoch += 1
        return method(*args, **kwargs)

    call.counted_by_kvtier = True
    return call


def watch(worker_class: type) -> None:
    """Counts calls of the methods of a worker class that change weights."""
    for name in _METHODS:
        method = getattr(worker_class, name, None)
        if method is None:
            logger.warning(
                "kvtier: vLLM's worker has no %s: call reset_prefix_cache(reset_connector=True) after weight updates",
                name,
            )
        elif not getattr(method, "counted_by_kvtier", False):
            setattr(worker_class, name, _count(method))
