"""Agents of LangGraph and of LlamaIndex, with and without the helpers: what their programs hold, and what is freed."""

import json
import os
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

from rig import Daemon, Directory, Skipped, free_port
from semantics import BLOCK_TOKENS, PRECISE, check, configure
from server import Server

HERE = Path(__file__).resolve().parent
STORY, SERVERS = HERE / "agents_story.py", HERE / "agents_servers.py"
STORY_SECONDS = 300
# As many models' templates do, it writes the tools behind the system prompt.
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n"
    "{% if tools and loop.first %}[tools] {{ tools | tojson }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# Why a token was computed that had been computed before.
LOST = ("evicted", "expired", "corrupt", "late", "too_slow", "denied", "busy", "unavailable")
# Two tool calls, a fork, a branch's end, a join, the end.
SIGNALS = 2 * 2 + 1 + 1 + 1 + 1
REQUESTS = 3 + 3 + 1


def interpreter(bench) -> Path:
    """Python with the libraries of agents."""
    python = bench.models / "agents" / "bin" / "python"
    if "agents" in os.environ.get("KVTIER_SKIP", "").split(","):
        raise Skipped("KVTIER_SKIP")
    if not python.exists():
        raise Skipped(f"the agents' libraries are not installed: tests/vllm/setup_agents.sh makes {python}")
    return python


def start(bench, daemon: Daemon) -> Server:
    """A server on a daemon; its own cache can be emptied, and it says what it found in caches."""
    template = daemon.home / "chat.jinja"
    template.write_text(TEMPLATE)
    more = ["--enable-prompt-tokens-details", "--chat-template", str(template)]
    more += ["--dtype", json.loads(PRECISE[1])["dtype"]]
    daemon.start()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    try:
        return Server(bench.models / "tiny-llama", daemon.home, daemon.socket, *more)
    finally:
        del os.environ["VLLM_SERVER_DEV_MODE"]


def told_by(command: list) -> dict:
    """What a story prints last."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=STORY_SECONDS, check=False
    )
    check(done.returncode == 0, f"the story ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def serving(bench):
    """A daemon and a server. Yields what runs a story against them."""
    python = interpreter(bench)
    server = start(bench, bench.daemon)

    def story(framework: str, *words: str) -> dict:
        command = [python, STORY, framework, "--server", f"http://127.0.0.1:{server.port}", *words]
        return told_by([*command, "--daemon", bench.daemon.socket, "--kvtier", bench.daemon.target / "kvtier"])

    try:
        server.wait()
        yield story
    finally:
        server.end()


def rows(seen: dict) -> dict:
    """Program -> its row of `kvtier programs`; of a session with the same name, the one that holds more."""
    found: dict = {}
    for row in seen["programs"]:
        old = found.get(row["program_id"])
        if old is None or (row["blocks"], row["state"] == "ended") > (old["blocks"], old["state"] == "ended"):
            found[row["program_id"]] = row
    return found


def stem_is_never_computed_again(told: dict) -> int:
    """By the ledger and by the server's own count: branches and the end compute what is theirs. Returns its blocks."""
    agent, branches, end = told["phases"]
    stem = agent["requests"][-1]["prompt"] // BLOCK_TOKENS
    before = agent["tokens"]
    for phase in (branches, end):
        prompts = [r["prompt"] // BLOCK_TOKENS for r in phase["requests"]]
        cached = [r["cached"] // BLOCK_TOKENS for r in phase["requests"]]
        check(cached == [stem] * len(cached), f"{phase['name']}: the stem has {stem} blocks, found were {cached}")
        now = phase["tokens"]
        novel = (now["novel"] - before["novel"]) // BLOCK_TOKENS
        own = sum(prompts) - stem * len(prompts)
        check(novel == own, f"{phase['name']}: {novel} blocks were new, {own} should have been")
        check(
            now["host"] - before["host"] >= stem * BLOCK_TOKENS, f"{phase['name']}: the stem came from elsewhere: {now}"
        )
        before = now
    lost = {reason: end["tokens"][reason] for reason in LOST if end["tokens"][reason]}
    check(not lost, f"tokens were computed again: {lost}")
    return stem


def branch_is_freed(told: dict, name: str, stem: int) -> None:
    """What the abandoned branch alone held is gone at once, what the others hold with the join, the stem stays."""
    seen, branches = told["seen"], [f"{name}/{branch}" for branch in "abc"]
    forked = {program: seen["forked"]["blocks"].get(program, []) for program in branches}
    check(all(forked.values()), f"each branch should have blocks of its own: {forked}")
    # A block that spans two types has the more durable one: the first may have some of the stem.
    kinds = {kind for own in forked.values() for kind in own[1:]}
    check(kinds == {"REASONING_BRANCH"}, f"types of the branches' blocks: {kinds}")
    exclusive = {program: rows(seen["forked"])[program]["exclusive_blocks"] for program in branches}
    check(exclusive == {p: len(own) for p, own in forked.items()}, f"kvtier programs: {exclusive}, blocks: {forked}")

    a, b, abandoned = branches
    left = seen["abandoned"]["blocks"]
    check(abandoned not in left, f"the abandoned branch has blocks: {left}")
    check(abandoned not in rows(seen["abandoned"]), "the abandoned branch is listed")
    check((left[a], left[b]) == (forked[a], forked[b]), f"living branches lost blocks: {left}")
    left = seen["joined"]["blocks"]
    check(set(left) == {name}, f"after the join only the stem is left: {left}")
    check(rows(seen["joined"])[name]["exclusive_blocks"] == stem, f"the stem is its program's: {seen['joined']}")
    wanted = {"SYSTEM_PROMPT", "TOOL_DEFINITION", "TOOL_RESULT"}
    check(wanted <= set(left[name]), f"types of the stem: {left[name]}")
    ended = rows(seen["ended"])[name]
    check(ended["state"] == "ended", f"the program has ended: {ended}")


def memory_is_back_at_the_resume(told: dict) -> None:
    """Its context went while a tool ran: what the next call read came from memory again, not from the disk."""
    before, after = told["seen"]["displaced"]["tokens"], told["phases"][0]["tokens"]
    prefetched = told["prefetched"]
    print(json.dumps({"prefetched": prefetched, "host": after["host"] - before["host"]}), flush=True)
    check(prefetched["useful"] > 0, f"nothing was brought in time: {prefetched}")
    resumed = told["phases"][0]["requests"][2]["cached"] // BLOCK_TOKENS * BLOCK_TOKENS
    check(after["host"] - before["host"] == resumed > 0, f"{resumed} tokens were found, from {before} to {after}")
    check(after["disk"] == before["disk"], f"the disk was read at the resume: {before}, {after}")


def agent(bench, framework: str) -> None:
    """One framework's story with the helpers, then the same without."""
    with serving(bench) as story:
        told = story(framework)
        stem = stem_is_never_computed_again(told)
        branch_is_freed(told, f"trip-{framework}", stem)
        memory_is_back_at_the_resume(told)
        counts = told["counts"]
        check(counts == {"requests": {"hinted": REQUESTS}, "signals": {"applied": SIGNALS}}, f"counted: {counts}")
        outcomes = {o for phase in told["phases"] for request in phase["requests"] for o in request["outcomes"]}
        check(outcomes == {"APPLIED"}, f"hints should all be taken: {outcomes}")
        bare = story(framework, "--bare")
        check(bare["answers"] == told["answers"], f"without helpers: {bare['answers']}, with: {told['answers']}")
        check(not any(r["outcomes"] for p in bare["phases"] for r in p["requests"]), "hints without helpers")


def langgraph_agent(bench, _want: list) -> None:
    """LangChain's agent in a LangGraph graph."""
    agent(bench, "langgraph")


def llama_index_agent(bench, _want: list) -> None:
    """LlamaIndex's FunctionAgent."""
    agent(bench, "llama_index")


def programs_stay_on_their_server(bench, _want: list) -> None:
    """Two servers that share nothing: placed by program, conversations compute what is new; round robin, much more."""
    python = interpreter(bench)
    home = bench.home / "b"
    home.mkdir()
    other, servers = Daemon(bench.daemon.target, home), []
    try:
        servers = [start(bench, daemon) for daemon in (bench.daemon, other)]
        for server in servers:
            server.wait()
        told = told_by([python, SERVERS, *(f"http://127.0.0.1:{server.port}" for server in servers)])
    finally:
        for server in servers:
            server.end()
        other.end(signal.SIGTERM)
    print(json.dumps(told), flush=True)
    sticky, robin = told["sticky"], told["round_robin"]
    check(sticky["prompt"] == robin["prompt"], f"both should ask the same: {told}")
    check(2 * sticky["computed"] < robin["prompt"], f"most of a conversation should be found: {sticky}")
    check(1.3 * sticky["computed"] < robin["computed"], f"round robin should compute more: {told}")
    counts = sticky["counts"]
    reasons = (counts.get("placed: least under way"), counts.get("placed: its program's context is there"))
    check(reasons == (3, 9), f"three programs are placed once each, and stay: {counts}")


def daemons_place_programs(bench, _want: list) -> None:
    """Two servers of one cluster: kvtierd says where each call goes, and why; round robin, what is elsewhere is fetched."""
    python = interpreter(bench)
    home = bench.home / "b"
    home.mkdir()
    other, directory, servers = Daemon(bench.daemon.target, home), Directory(bench.home), []
    directory.start()
    try:
        for node, daemon in (("a", bench.daemon), ("b", other)):
            ports = [free_port(), free_port()]
            cluster = f'[cluster]\ndirectory = "{directory.url}"\nlisten = "127.0.0.1:{ports[0]}"\n'
            transport = f'[transport]\norder = ["tcp"]\ntcp_listen = "127.0.0.1:{ports[1]}"\n'
            configure(daemon, SIZES + cluster + transport, node)
        servers = [start(bench, daemon) for daemon in (bench.daemon, other)]
        for server in servers:
            server.wait()
        urls = [f"http://127.0.0.1:{server.port}" for server in servers]
        told = told_by([python, SERVERS, *urls, "--daemon", bench.daemon.socket, "--nodes", "a,b"])
    finally:
        for server in servers:
            server.end()
        other.end(signal.SIGTERM)
        directory.end()
    print(json.dumps(told), flush=True)
    placed, robin = told["placed"], told["round_robin"]
    check(placed["prompt"] == robin["prompt"], f"both should ask the same: {told}")
    check(2 * placed["computed"] < placed["prompt"], f"most of a conversation should be found: {placed}")
    by_daemon = sum(n for reason, n in placed["counts"].items() if reason.startswith("placed: kvtierd:"))
    check(by_daemon >= 9, f"kvtierd should say where a conversation goes on: {placed['counts']}")


# What both nodes of a cluster have.
SIZES = '[host]\ncapacity = "256MiB"\nextent = "32MiB"\n[disk]\ncapacity = "1GiB"\nsegment = "64MiB"\n'
AGENTS = [langgraph_agent, llama_index_agent]
# Two servers at once take minutes on two cores: only where they are named.
SLOW_AGENTS = [programs_stay_on_their_server, daemons_place_programs]
