"""LangChain, LangGraph and LlamaIndex themselves, with models that answer what they are told or a server that does."""

from __future__ import annotations

import asyncio
import operator
import unittest
from typing import Annotated, TypedDict

import support  # noqa: F401 (finds the package)
from fake_server import FakeServer
from test_agents import Heard
from test_agents_transport import need

import kvtier_agents

TOOL = [("TOOL_WAIT", "p"), ("CONTINUATION", "p")]


class Who(TypedDict):
    who: Annotated[list, operator.add]


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


class LangChain(unittest.TestCase):
    def setUp(self):
        need("langchain")
        need("langgraph")
        from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
        from langchain_core.messages import AIMessage

        self.seen, test = [], self

        class Model(GenericFakeChatModel):
            def bind_tools(self, tools, **more):
                return self

            def _generate(self, *args, **more):
                test.seen.append(kvtier_agents.current())
                return super()._generate(*args, **more)

        call = {"name": "add", "args": {"a": 1, "b": 2}, "id": "1", "type": "tool_call"}
        answers = (message for _ in range(2) for message in (AIMessage("", tool_calls=[call]), AIMessage("three")))
        self.model, self.heard = Model(messages=answers), Heard()

    def agent(self, **settings):
        from langchain.agents import create_agent

        return create_agent(self.model, [add], **settings)

    def test_an_agent_is_in_the_program_around_it_and_tells_its_tools(self):
        from kvtier_agents.langchain import ProgramMiddleware

        agent, asked = self.agent(middleware=[ProgramMiddleware()]), {"messages": [("user", "1 + 2?")]}
        with kvtier_agents.program("p", id="p", signals=self.heard):
            self.assertEqual(agent.invoke(asked)["messages"][-1].content, "three")
            self.assertEqual(asyncio.run(agent.ainvoke(asked))["messages"][-1].content, "three")
        self.assertEqual([program.id for program in self.seen], ["p"] * 4)
        self.assertEqual(self.heard.kinds(), [*TOOL, *TOOL, ("COMPLETION", "p")])

    def test_without_a_program_a_conversation_is_one(self):
        from langgraph.checkpoint.memory import InMemorySaver

        from kvtier_agents.langchain import ProgramMiddleware

        middleware = ProgramMiddleware("helper")
        agent = self.agent(middleware=[middleware], checkpointer=InMemorySaver())
        kvtier_agents.use(self.heard)
        self.addCleanup(kvtier_agents.use, None)
        for _ in range(2):
            agent.invoke({"messages": [("user", "1 + 2?")]}, {"configurable": {"thread_id": "talk"}})
        (program,) = {id(p): p for p in self.seen}.values()
        self.assertEqual((program.session, program.id.startswith("helper-")), ("talk", True))
        self.assertEqual([kind for kind, _ in self.heard.kinds()], ["TOOL_WAIT", "CONTINUATION"] * 2)
        middleware.end("talk")
        middleware.end("talk")
        self.assertEqual(self.heard.kinds()[4:], [("COMPLETION", program.id)])

    def test_without_program_and_conversation_all_works_as_before(self):
        from kvtier_agents.langchain import ProgramMiddleware

        agent = self.agent(middleware=[ProgramMiddleware()])
        self.assertEqual(agent.invoke({"messages": [("user", "1 + 2?")]})["messages"][-1].content, "three")
        self.assertEqual(self.seen, [None, None])

    def test_callbacks_tell_tools_of_any_graph(self):
        from langchain_core.tools import tool

        from kvtier_agents.langchain import ToolCallbacks

        def fail(a: int) -> int:
            """Fails."""
            raise ValueError(a)

        callbacks = ToolCallbacks()
        with kvtier_agents.program("p", id="p", signals=self.heard):
            tool(add).invoke({"a": 1, "b": 2}, {"callbacks": [callbacks]})
            asyncio.run(tool(add).ainvoke({"a": 1, "b": 2}, {"callbacks": [callbacks]}))
            with self.assertRaises(ValueError):
                tool(fail).invoke({"a": 1}, {"callbacks": [callbacks]})
        self.assertEqual(self.heard.kinds(), [*TOOL, *TOOL, *TOOL, ("COMPLETION", "p")])
        self.assertEqual(callbacks._open, {})

    def test_branches_of_a_graph_at_the_same_time_are_programs_of_their_own(self):
        from langgraph.graph import END, START, StateGraph

        graph = StateGraph(Who)
        with kvtier_agents.program("p", id="p", signals=self.heard) as run, run.fork("a", "b") as fork:
            for branch, name in zip(fork, "ab", strict=True):
                graph.add_node(name, branch.bind(lambda state: {"who": [kvtier_agents.current().id]}))
                graph.add_edge(START, name)
                graph.add_edge(name, END)
            graph.add_node("outside", lambda state: {"who": [kvtier_agents.current().id]})
            graph.add_edge(START, "outside")
            found = graph.compile().invoke({"who": []})["who"]
        self.assertEqual(sorted(found), ["p", "p/a", "p/b"])

    def test_an_attached_model(self):
        need("langchain_openai")
        from kvtier_agents.langchain import chat_model

        server = FakeServer()
        self.addCleanup(server.close)
        model = chat_model(model="m", base_url=f"{server.url}/v1", api_key="-")

        async def awaited() -> str:
            async with model.http_async_client:
                return (await model.ainvoke("hello")).content

        with kvtier_agents.program("p", id="p", signals=self.heard), model.http_client:
            self.assertEqual([model.invoke("hello").content, asyncio.run(awaited())], ["yes", "yes"])
        self.assertEqual([server.said(n)["program_id"] for n in range(2)], ["p", "p"])


class LlamaIndex(unittest.TestCase):
    def setUp(self):
        need("llama_index.core")

    def test_tools_stay_what_they_are_and_are_told(self):
        from llama_index.core.tools import FunctionTool
        from llama_index.core.workflow import Context

        from kvtier_agents.llama_index import told

        def where(ctx: Context, a: int) -> int:
            """Wants its agent's context."""
            return a

        # Annotations of this file are texts.
        where.__annotations__["ctx"] = Context
        heard = Heard()
        tools = told([add, FunctionTool.from_defaults(where)])
        self.assertTrue(all(isinstance(tool, FunctionTool) for tool in tools))
        self.assertTrue(tools[1].requires_context)
        with kvtier_agents.program("p", id="p", signals=heard):
            self.assertEqual(tools[0].call(a=1, b=2).raw_output, 3)
            self.assertEqual(asyncio.run(tools[0].acall(a=1, b=2)).raw_output, 3)
        self.assertEqual(heard.kinds(), [*TOOL, *TOOL, ("COMPLETION", "p")])
        self.assertEqual(tools[0].metadata.get_name(), "add")

    def test_an_attached_model(self):
        need("llama_index.llms.openai_like")
        from kvtier_agents.llama_index import llm

        server = FakeServer()
        self.addCleanup(server.close)
        model = llm(model="m", api_base=f"{server.url}/v1", api_key="-", is_chat_model=True, max_tokens=4)

        async def awaited() -> str:
            async with model._async_http_client:
                return (await model.acomplete("hello")).text

        with kvtier_agents.program("p", id="p", signals=Heard()), model._http_client:
            self.assertEqual([model.complete("hello").text, asyncio.run(awaited())], ["yes", "yes"])
        self.assertEqual([server.said(n)["program_id"] for n in range(2)], ["p", "p"])


if __name__ == "__main__":
    unittest.main()
