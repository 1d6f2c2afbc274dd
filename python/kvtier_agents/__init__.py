"""Agents on kvtier: says which program a request belongs to, what its messages mean and how long they matter, and tells
kvtierd of forks, joins, tool calls and ends.

    from kvtier_agents import openai_client, program, tool

    client = openai_client(base_url="http://localhost:8000/v1", api_key="-")
    with program("research") as run:
        client.chat.completions.create(model="m", messages=messages)
        with tool("search"):
            found = search()
        with run.fork("a", "b") as branches:
            ...

Nothing but Python's own library is imported before it is used. docs/AGENTS.md has examples.
"""

from kvtier_agents.order import NextStep, Order, OrderedPlacer, Step
from kvtier_agents.placement import DaemonPlacer, LocalPlacer, Placement, Placer
from kvtier_agents.programs import Fork, Program, Tool, bind, current, fork, mark, program, segment, tool
from kvtier_agents.sending import Attachment
from kvtier_agents.signals import Signal, Signals, connect, use
from kvtier_agents.spans import SpanReader
from kvtier_agents.transport import (
    async_http_client,
    async_openai_client,
    attach,
    http_client,
    openai_client,
)

__all__ = [
    "Attachment",
    "DaemonPlacer",
    "Fork",
    "LocalPlacer",
    "NextStep",
    "Order",
    "OrderedPlacer",
    "Placement",
    "Placer",
    "Program",
    "Signal",
    "Signals",
    "SpanReader",
    "Step",
    "Tool",
    "async_http_client",
    "async_openai_client",
    "attach",
    "bind",
    "connect",
    "current",
    "fork",
    "http_client",
    "mark",
    "openai_client",
    "program",
    "segment",
    "tool",
    "use",
]
