"""LangChain and LangGraph: middleware for `create_agent`, a callback handler for the rest, and an attached model.

Needs `langchain` (and `langchain-openai` for `chat_model`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from kvtier_agents import programs, transport
from kvtier_agents.programs import Program
from kvtier_agents.sending import Attachment

try:
    from langchain.agents.middleware import AgentMiddleware
    from langchain_core.callbacks import BaseCallbackHandler
except ImportError:
    raise ImportError("kvtier_agents.langchain needs LangChain: pip install langchain langchain-openai") from None

# Threads of conversations, and tool calls under way, that are remembered.
_MAX_REMEMBERED = 4_096


class ProgramMiddleware(AgentMiddleware):
    """Middleware of `create_agent`: its model's requests belong to a program, and its tool calls are told.

    In a program that is current where the agent is run, it is that one. Else each conversation (`thread_id`) is a
    program of its own, which goes on from run to run.
    """

    def __init__(self, name: str = "agent") -> None:
        super().__init__()
        self._name = name
        self._threads: OrderedDict[str, Program] = OrderedDict()
        self._lock = threading.Lock()

    def wrap_model_call(self, request: Any, handler: Callable) -> Any:
        with self._inside():
            return handler(request)

    async def awrap_model_call(self, request: Any, handler: Callable) -> Any:
        with self._inside():
            return await handler(request)

    def wrap_tool_call(self, request: Any, handler: Callable) -> Any:
        with self._inside(), programs.tool(request.tool_call["name"]):
            return handler(request)

    async def awrap_tool_call(self, request: Any, handler: Callable) -> Any:
        with self._inside(), programs.tool(request.tool_call["name"]):
            return await handler(request)

    def _inside(self) -> Any:
        if programs.current() is not None:
            return nullcontext()
        thread = _thread_id()
        if thread is None:
            return nullcontext()
        with self._lock:
            program = self._threads.pop(thread, None) or programs.program(self._name, session=thread)
            self._threads[thread] = program
            while len(self._threads) > _MAX_REMEMBERED:
                self._threads.popitem(last=False)
        return programs.active(program)

    def end(self, thread_id: str) -> None:
        """A conversation is over: its program is complete."""
        with self._lock:
            program = self._threads.pop(thread_id, None)
        if program:
            program.complete()


class ToolCallbacks(BaseCallbackHandler):
    """A callback handler, for chains and graphs without the middleware: tool calls of the current program are told."""

    # In the thread of the call: that is where the program is current.
    run_inline = True

    def __init__(self) -> None:
        self._open: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()

    def on_tool_start(self, serialized: dict | None, input_str: str, *, run_id: Any, **more: Any) -> None:
        name = (serialized or {}).get("name") or more.get("name") or "tool"
        waiting = programs.tool(name)
        waiting.__enter__()
        with self._lock:
            self._open[run_id] = waiting
            forgotten = self._open.popitem(last=False)[1] if len(self._open) > _MAX_REMEMBERED else None
        if forgotten:
            forgotten.__exit__(None, None, None)

    def on_tool_end(self, output: Any, *, run_id: Any, **more: Any) -> None:
        with self._lock:
            waiting = self._open.pop(run_id, None)
        if waiting:
            waiting.__exit__(None, None, None)

    def on_tool_error(self, error: BaseException, *, run_id: Any, **more: Any) -> None:
        self.on_tool_end(None, run_id=run_id)


def chat_model(attachment: Attachment | None = None, kind: Any = None, **settings: Any) -> Any:
    """A `ChatOpenAI`, or a class of its kind, with these settings and attached HTTP clients."""
    if kind is None:
        try:
            from langchain_openai import ChatOpenAI as kind
        except ImportError:
            raise ImportError("chat_model needs langchain-openai: pip install langchain-openai") from None
    shared = attachment or Attachment()
    clients = {"http_client": transport.http_client(shared), "http_async_client": transport.async_http_client(shared)}
    return kind(**{**clients, **settings})


def _thread_id() -> str | None:
    try:
        from langgraph.config import get_config

        thread = get_config().get("configurable", {}).get("thread_id")
        return str(thread) if thread is not None else None
    except Exception:
        # Outside of a graph there is none.
        return None
