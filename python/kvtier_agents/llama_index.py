"""LlamaIndex: an attached model, and tools whose calls are told.

Needs `llama-index-core` (and `llama-index-llms-openai-like` for `llm`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvtier_agents import programs, transport
from kvtier_agents.sending import Attachment

try:
    from llama_index.core.tools import FunctionTool
    from llama_index.core.tools.types import adapt_to_async_tool
except ImportError:
    raise ImportError("kvtier_agents.llama_index needs LlamaIndex: pip install llama-index-core") from None


class _Told:
    """What is put before a tool's class: its program waits while the tool is called."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        with programs.tool(self.metadata.get_name()):
            return super().call(*args, **kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        with programs.tool(self.metadata.get_name()):
            return await super().acall(*args, **kwargs)


def told(tools: Iterable[Any]) -> list[Any]:
    """These tools, or functions that become some, as tools whose calls are told: what `FunctionAgent(tools=..)` takes.

    Each is a copy of its own class: agents look at that to see whether a tool wants their context.
    """
    return [_told(tool if hasattr(tool, "metadata") else FunctionTool.from_defaults(tool)) for tool in tools]


def _told(tool: Any) -> Any:
    kind = type(adapted := adapt_to_async_tool(tool))
    mine = object.__new__(type(f"Told{kind.__name__}", (_Told, kind), {}))
    # As `copy.copy` does, but for the class.
    state = adapted.__reduce_ex__(4)[2]
    if hasattr(mine, "__setstate__"):
        mine.__setstate__(state)
    else:
        mine.__dict__.update(state)
    return mine


def llm(attachment: Attachment | None = None, kind: Any = None, **settings: Any) -> Any:
    """An `OpenAILike`, or a class of its kind, with these settings and attached HTTP clients."""
    if kind is None:
        try:
            from llama_index.llms.openai_like import OpenAILike as kind
        except ImportError:
            raise ImportError("llm needs OpenAILike: pip install llama-index-llms-openai-like") from None
    shared = attachment or Attachment()
    clients = {"http_client": transport.http_client(shared), "async_http_client": transport.async_http_client(shared)}
    return kind(**{**clients, **settings})
