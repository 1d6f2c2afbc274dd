"""Keeps our errors out of the engine: a hook that fails logs once and answers as if nothing were cached."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

logger = logging.getLogger("vllm.kvtier")

_logged: set[str] = set()


def guarded(default: Callable[[], object]) -> Callable:
    """Wraps a hook; `default` makes its answer when it raises."""

    def wrap(hook: Callable) -> Callable:
        @functools.wraps(hook)
        def call(*args: object, **kwargs: object) -> object:
            try:
                return hook(*args, **kwargs)
            except Exception:
                report(hook.__qualname__)
                return default()

        return call

    return wrap


def report(where: str) -> None:
    """Logs the exception being handled, once a place."""
    if where not in _logged:
        _logged.add(where)
        logger.exception("%s failed; the request goes on without the cache (said once)", where)
