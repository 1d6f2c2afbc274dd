"""One agent's story against a real server and daemon, as an application would write it; its figures as JSON.

usage: agents_story.py {langgraph|llama_index} --server URL --daemon SOCKET --kvtier PROGRAM [--bare]
The agent calls two tools, of which the second takes long enough that others take its memory, is forked into three branches of which one is abandoned, joined and finished. A model of
random weights calls no tools: the calls are put into its real answers. Before the fork, and before the last question,
the server's own prefix cache is emptied: what is not computed anew then comes from kvtierd. `--bare` does without the
helpers. Runs in the environment that setup_agents.sh makes.
"""

import argparse
import asyncio
import json
import random
import sys
import time
import urllib.request
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rig import Daemon

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))

import kvtier_agents  # noqa: E402
from kvtier_agents import transport  # noqa: E402

BRANCHES = "abc"
ABANDONED = "c"
WEATHER_SECONDS = 2
# What happens while the second tool runs.
MEANWHILE: list = []
SYSTEM_CHARS, BRANCH_CHARS, JOIN_CHARS = 700, 500, 300
# Letters, so that a token is a letter whichever way it is read.
LETTERS = list(range(68, 94))
BODY = {"allowed_token_ids": LETTERS, "ignore_eos": True}


def text(seed: str, chars: int) -> str:
    """Words of no other seed's."""
    draw = random.Random(seed)
    return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz  ") for _ in range(chars))


def weather(city: str) -> str:
    """Says how the weather is."""
    # From this the daemon learns what tools take.
    time.sleep(WEATHER_SECONDS)
    return f"{city}: " + text(f"weather in {city}", 200)


def trains(city: str) -> str:
    """Says when trains leave."""
    for meanwhile in MEANWHILE:
        meanwhile()
    return f"{city}: " + text(f"trains to {city}", 200)


CALLS = [("weather", {"city": "Ulm"}), ("trains", {"city": "Ulm"})]


class Watched(Daemon):
    """A daemon that somebody else started."""

    def __init__(self, socket: str, kvtier: str):
        self.socket, self.target, self.home = socket, Path(kvtier).parent, Path(socket).parent

    def wait(self, what: str, reached) -> None:
        self.process = self
        super().wait(what, reached)

    def poll(self) -> None:
        """It is taken to run."""


class Story:
    """What both frameworks need: requests that are watched, phases, and what the daemon has."""

    def __init__(self, args):
        self.name, self.url, self.bare = f"trip-{args.framework}", args.server, args.bare
        self.daemon = Watched(args.daemon, args.kvtier)
        self.signals = kvtier_agents.connect(f"unix://{args.daemon}")
        # A busy machine costs time, not spans.
        self.shared = kvtier_agents.Attachment(tokenize_seconds=60)
        self.phases, self.requests = [], []
        self.seen: dict[str, Any] = {}

    def clients(self) -> tuple:
        """A client, and one with asyncio."""
        hooks = {"event_hooks": {"response": [self._saw]}, "timeout": 300}
        awaited = {"event_hooks": {"response": [self._asaw]}, "timeout": 300}
        if self.bare:
            module = transport._module()
            return module.Client(**hooks), module.AsyncClient(**awaited)
        shared = self.shared
        return kvtier_agents.http_client(shared, **hooks), kvtier_agents.async_http_client(shared, **awaited)

    def _saw(self, response) -> None:
        self._note(response, json.loads(response.read()))

    async def _asaw(self, response) -> None:
        self._note(response, json.loads(await response.aread()))

    def _note(self, response, answer: dict) -> None:
        program, usage = kvtier_agents.current(), answer.get("usage") or {}
        told = (answer.get("kv_transfer_params") or {}).get("kvtier") or {}
        row = {"program": program.id if program else "", "prompt": usage.get("prompt_tokens")}
        row["cached"] = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        row["outcomes"] = [o["outcome"] for o in told.get("outcomes", [])]
        self.requests.append({**row, "status": response.status_code})

    def phase(self, name: str) -> None:
        """Ends a phase: what it asked, once all of it is kept; then the server forgets its own cache."""
        self.daemon.settle()
        self.phases.append({"name": name, "requests": self.requests, **self.daemon.counted()})
        self.requests = []
        self.forget()

    def forget(self) -> None:
        """The server forgets its own cache."""
        urllib.request.urlopen(f"{self.url}/reset_prefix_cache", data=b"", timeout=30).close()

    def displace(self) -> None:
        """What the program has is on disk only, as if others had needed the memory; waits until it is brought back."""
        self.daemon.settle()
        before = self.daemon.counted()
        self.daemon.kvtier("evict", "--program", self.name, "--tier", "host")
        self.forget()
        self.daemon.wait("bring the program's context back", lambda: self.prefetched("outstanding") > 0)
        self.seen["displaced"] = before

    def prefetched(self, fate: str) -> int:
        """Bytes that the daemon brought before programs came back."""
        return {c["name"]: c["value"] for c in self.daemon.status()["policy"]}[f"prefetch_{fate}_bytes"]

    def look(self, name: str) -> None:
        """What the daemon has now, once it has heard what was said."""
        if not self.signals.flush(20):
            raise SystemExit(f"signals are still under way: {self.signals.counts}")
        blocks = self.daemon.kvtier("ls", "--limit", "1000")["blocks"]
        owned: dict[str, list] = {}
        for block in sorted(blocks, key=lambda b: b["depth_blocks"]):
            owned.setdefault(block["program_id"], []).append(block["semantic"])
        programs = self.daemon.kvtier("programs")["programs"]
        self.seen[name] = {"blocks": owned, "programs": programs}

    def program(self):
        """The program of all that is asked."""
        return nullcontext() if self.bare else kvtier_agents.program("trip", id=self.name, signals=self.signals)

    def system_prompt(self) -> str:
        """No other story's."""
        return "You plan journeys. " + text(f"system of {self.name}", SYSTEM_CHARS)


def branch_prompt(name: str) -> str:
    return f"Way {name}. " + text(f"branch {name}", BRANCH_CHARS)


def join_prompt(answers: list) -> str:
    return "Choose. " + " ".join(answers) + text("join", JOIN_CHARS)


def scripted_chat(story: Story) -> Any:
    """LangChain's model: its answers are the server's; its tool calls are CALLS, one after the other."""
    from langchain_openai import ChatOpenAI

    class Scripted(ChatOpenAI):
        def bind_tools(self, tools: Any, **more: Any) -> Any:
            # The server is told of the tools but not to look for calls.
            return super().bind_tools(tools, tool_choice="none").bind(scripted=True)

        def _generate(self, messages: list, *args: Any, scripted: bool = False, **more: Any) -> Any:
            result = super()._generate(messages, *args, **more)
            done = sum(m.type == "tool" for m in messages)
            if scripted and done < len(CALLS):
                name, arguments = CALLS[done]
                call = {"name": name, "args": arguments, "id": f"call-{done}", "type": "tool_call"}
                result.generations[0].message.tool_calls = [call]
            return result

    sync, awaited = story.clients()
    settings = {"model": "tiny", "base_url": f"{story.url}/v1", "api_key": "-", "temperature": 0, "max_tokens": 24}
    return Scripted(**settings, extra_body=BODY, http_client=sync, http_async_client=awaited)


def langgraph(story: Story) -> list:
    """`create_agent` within a graph whose branches run at the same time."""
    from operator import add
    from typing import Annotated, TypedDict

    from langchain.agents import create_agent
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_core.utils.function_calling import convert_to_openai_tool
    from langgraph.graph import END, START, StateGraph

    model = scripted_chat(story)
    middleware = []
    if not story.bare:
        from kvtier_agents.langchain import ProgramMiddleware

        middleware.append(ProgramMiddleware())
    tools = {"tools": [convert_to_openai_tool(tool) for tool in (weather, trains)], "tool_choice": "none"}
    agent = create_agent(model, [weather, trains], system_prompt=story.system_prompt(), middleware=middleware)

    class State(TypedDict):
        stem: list
        answers: Annotated[list, add]
        end: str

    def plan(state: State) -> dict:
        stem = agent.invoke({"messages": [HumanMessage("To Ulm, please.")]})["messages"]
        story.phase("agent")
        story.fork = None if story.bare else kvtier_agents.fork(*BRANCHES)
        return {"stem": [SystemMessage(story.system_prompt()), *stem]}

    def way(name: str):
        def ask(state: State) -> dict:
            with nullcontext() if story.bare else story.fork[name]:
                answer = model.invoke([*state["stem"], HumanMessage(branch_prompt(name))], **tools)
                return {"answers": [(name, answer.content)]}

        return ask

    def join(state: State) -> dict:
        story.phase("branches")
        story.look("forked")
        kept = [answer for name, answer in sorted(state["answers"]) if name != ABANDONED]
        if not story.bare:
            story.fork[ABANDONED].abandon()
            story.look("abandoned")
            story.fork.join()
            story.look("joined")
        asked = [*state["stem"], HumanMessage(join_prompt(kept))]
        return {"end": model.invoke(asked, **tools).content}

    graph = StateGraph(State)
    graph.add_node("plan", plan)
    graph.add_node("join", join)
    graph.add_edge(START, "plan")
    for name in BRANCHES:
        graph.add_node(name, way(name))
        graph.add_edge("plan", name)
    graph.add_edge(list(BRANCHES), "join")
    graph.add_edge("join", END)
    with story.program():
        state = graph.compile().invoke({"answers": []})
    story.phase("end")
    return [*(answer for _, answer in sorted(state["answers"])), state["end"]]


def llama_index(story: Story) -> list:
    """`FunctionAgent`, and branches as asyncio's tasks."""
    from llama_index.core.agent.workflow import FunctionAgent
    from llama_index.core.llms import ChatMessage
    from llama_index.core.llms.llm import ToolSelection
    from llama_index.core.memory import ChatMemoryBuffer
    from llama_index.llms.openai_like import OpenAILike

    class Scripted(OpenAILike):
        """Its answers are the server's; its tool calls are CALLS, one after the other."""

        async def achat_with_tools(self, tools: Any, chat_history: Any = None, **more: Any) -> Any:
            specs = [tool.metadata.to_openai_tool() for tool in tools]
            return await self.achat(chat_history, tools=specs, tool_choice="none")

        def get_tool_calls_from_response(self, response: Any, error_on_no_tool_call: bool = True, **more: Any) -> Any:
            if story.calls >= len(CALLS):
                return []
            name, arguments = CALLS[story.calls]
            story.calls += 1
            return [ToolSelection(tool_id=f"call-{name}", tool_name=name, tool_kwargs=arguments)]

    story.calls = 0
    sync, awaited = story.clients()
    settings = {"model": "tiny", "api_base": f"{story.url}/v1", "api_key": "-", "temperature": 0, "max_tokens": 24}
    more = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 4096, "timeout": 300}
    clients = {"http_client": sync, "async_http_client": awaited}
    model = Scripted(**settings, **more, **clients, additional_kwargs={"extra_body": BODY})
    tools: list = [weather, trains]
    if not story.bare:
        from kvtier_agents.llama_index import told

        tools = told(tools)
    agent = FunctionAgent(tools=tools, llm=model, system_prompt=story.system_prompt(), streaming=False)

    async def run() -> list:
        memory = ChatMemoryBuffer.from_defaults(token_limit=100_000)
        await agent.run("To Ulm, please.", memory=memory)
        stem = [ChatMessage(role="system", content=story.system_prompt()), *await memory.aget_all()]
        story.phase("agent")
        specs = [tool.metadata.to_openai_tool() for tool in agent.tools]

        async def ask(prompt: str) -> str:
            asked = [*stem, ChatMessage(role="user", content=prompt)]
            return (await model.achat(asked, tools=specs, tool_choice="none")).message.content

        fork = None if story.bare else kvtier_agents.fork(*BRANCHES)
        ways = [(ask if fork is None else fork[name].bind(ask))(branch_prompt(name)) for name in BRANCHES]
        answers = await asyncio.gather(*ways)
        story.phase("branches")
        story.look("forked")
        if fork is not None:
            fork[ABANDONED].abandon()
            story.look("abandoned")
            fork.join()
            story.look("joined")
        kept = [answer for name, answer in zip(BRANCHES, answers, strict=True) if name != ABANDONED]
        return [*answers, await ask(join_prompt(kept))]

    async def whole() -> list:
        async with story.program():
            return await run()

    answers = asyncio.run(whole())
    story.phase("end")
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=("langgraph", "llama_index"))
    parser.add_argument("--server", required=True)
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--kvtier", required=True)
    parser.add_argument("--bare", action="store_true")
    args = parser.parse_args()
    story = Story(args)
    if not args.bare:
        MEANWHILE.append(story.displace)
    answers = {"langgraph": langgraph, "llama_index": llama_index}[args.framework](story)
    story.look("ended")
    counts = {"requests": dict(story.shared.counts), "signals": dict(story.signals.counts)}
    prefetched = {fate: story.prefetched(fate) for fate in ("useful", "late", "wasted")}
    told = {"answers": answers, "phases": story.phases, "seen": story.seen}
    print(json.dumps({**told, "counts": counts, "prefetched": prefetched}))


if __name__ == "__main__":
    main()
