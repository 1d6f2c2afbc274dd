"""Attaches what is current to the requests of httpx clients, and thereby to those of OpenAI's, LangChain's and
LlamaIndex's, which have httpx clients inside. `httpx2`, which newer OpenAI clients use, is the same here.

How a request goes out is `sending`'s: here is only what waits for it, with and without asyncio.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from kvtier_agents.sending import Attachment, Flow, Sending, ours

_MODULES = ("httpx", "httpx2")


class _Transport:
    """Sends requests through another transport."""

    def __init__(self, inner: Any, shared: Attachment, module: Any) -> None:
        self._inner, self._shared, self._module = inner, shared, module

    def handle_request(self, request: Any) -> Any:
        """As httpx's transports."""
        if not ours(request):
            return self._inner.handle_request(request)
        request.read()
        sending = Sending(request, self._shared, self._module)
        response = self._wait(sending.flow())
        if done := sending.ended():
            response.stream = _counted(self._module)[0](response.stream, done)
        return response

    def _wait(self, flow: Flow) -> Any:
        try:
            step = next(flow)
            while True:
                try:
                    found = self._take(*step)
                except BaseException as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(found)
        except StopIteration as done:
            return done.value

    def _take(self, what: str, subject: Any) -> Any:
        if what == "send":
            return self._inner.handle_request(subject)
        try:
            return subject.read() if what == "read" else None
        finally:
            subject.close()

    def close(self) -> None:
        """Closes the other one."""
        self._inner.close()

    def __enter__(self) -> _Transport:
        self._inner.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._inner.__exit__(*raised)


class _AsyncTransport:
    """The same, awaited."""

    def __init__(self, inner: Any, shared: Attachment, module: Any) -> None:
        self._inner, self._shared, self._module = inner, shared, module

    async def handle_async_request(self, request: Any) -> Any:
        """As httpx's transports."""
        if not ours(request):
            return await self._inner.handle_async_request(request)
        await request.aread()
        sending = Sending(request, self._shared, self._module)
        response = await self._wait(sending.flow())
        if done := sending.ended():
            response.stream = _counted(self._module)[1](response.stream, done)
        return response

    async def _wait(self, flow: Flow) -> Any:
        try:
            step = next(flow)
            while True:
                try:
                    found = await self._take(*step)
                except BaseException as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(found)
        except StopIteration as done:
            return done.value

    async def _take(self, what: str, subject: Any) -> Any:
        if what == "send":
            return await self._inner.handle_async_request(subject)
        try:
            return await subject.aread() if what == "read" else None
        finally:
            await subject.aclose()

    async def aclose(self) -> None:
        """Closes the other one."""
        await self._inner.aclose()

    async def __aenter__(self) -> _AsyncTransport:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *raised: Any) -> None:
        await self._inner.__aexit__(*raised)


class _Counted:
    """An answer's stream whose end is told, once."""

    def __init__(self, stream: Any, done: Any) -> None:
        self._stream, self._done = stream, done

    def _end(self) -> None:
        done, self._done = self._done, None
        if done:
            done()

    def __iter__(self) -> Any:
        return iter(self._stream)

    def close(self) -> None:
        """As httpx's streams."""
        self._end()
        self._stream.close()

    def __aiter__(self) -> Any:
        return self._stream.__aiter__()

    async def aclose(self) -> None:
        """As httpx's streams."""
        self._end()
        await self._stream.aclose()


@functools.cache
def _counted(module: Any) -> tuple[type, type]:
    # httpx looks at a stream's class to know how it is read.
    return type("Counted", (_Counted, module.SyncByteStream), {}), type(
        "Counted", (_Counted, module.AsyncByteStream), {}
    )


def attach(client: Any, attachment: Attachment | None = None) -> Any:
    """Attaches a client: httpx's or httpx2's, sync or async, or one of OpenAI's that has such a client inside.

    Returns it. Raises TypeError for anything else. A client that is attached already stays as it is.
    """
    inside = getattr(client, "_client", client)
    kinds = (kind.__module__.partition(".")[0] for kind in type(inside).__mro__)
    name = next((name for name in kinds if name in _MODULES), None)
    if name is None or not hasattr(inside, "_transport") or not hasattr(inside, "_mounts"):
        raise TypeError(f"cannot attach {type(client).__name__}: a client of httpx or httpx2, or of openai, is needed")
    module, shared = importlib.import_module(name), attachment or Attachment()

    def wrapped(inner: Any) -> Any:
        if inner is None or isinstance(inner, (_Transport, _AsyncTransport)):
            return inner
        wrap = _Transport if hasattr(inner, "handle_request") else _AsyncTransport
        return wrap(inner, shared, module)

    inside._transport = wrapped(inside._transport)
    # Proxies of the environment.
    inside._mounts = {pattern: wrapped(inner) for pattern, inner in inside._mounts.items()}
    return client


# As OpenAI's clients have them.
_HTTP = {"follow_redirects": True, "timeout": 600.0}


def http_client(attachment: Attachment | None = None, **settings: Any) -> Any:
    """An attached `httpx.Client` with these settings, of the module that the installed `openai` uses."""
    return attach(_module().Client(**{**_HTTP, **settings}), attachment)


def async_http_client(attachment: Attachment | None = None, **settings: Any) -> Any:
    """An attached `httpx.AsyncClient`, the same way."""
    return attach(_module().AsyncClient(**{**_HTTP, **settings}), attachment)


def openai_client(attachment: Attachment | None = None, **settings: Any) -> Any:
    """An attached `openai.OpenAI` with these settings."""
    return attach(_openai().OpenAI(**settings), attachment)


def async_openai_client(attachment: Attachment | None = None, **settings: Any) -> Any:
    """An attached `openai.AsyncOpenAI` with these settings."""
    return attach(_openai().AsyncOpenAI(**settings), attachment)


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise ImportError("this needs OpenAI's client: pip install openai") from None
    return openai


def _module() -> Any:
    """httpx, or the one like it whose clients `openai` takes."""
    try:
        import openai

        base = sys.modules[openai.OpenAI.__mro__[1].__module__]
        for name in reversed(_MODULES):
            if hasattr(base, name):
                return getattr(base, name)
    except (ImportError, LookupError):
        pass
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError("this needs an HTTP client: pip install httpx")
