"""Branches that are abandoned, end to end with real vLLM: what only they held goes, everywhere, and nothing else."""

from contextlib import contextmanager

from rig import Daemon, Directory, free_port
from semantics import BLOCK_TOKENS, SMALL, Story, check, configure, story, text

SYSTEM, BRANCH = 5, 5
SYSTEM_SPAN = {"start": 0, "end": SYSTEM * BLOCK_TOKENS, "type": "SYSTEM_PROMPT"}
BRANCH_SPAN = {"start": SYSTEM * BLOCK_TOKENS, "end": (SYSTEM + BRANCH) * BLOCK_TOKENS, "type": "REASONING_BRANCH"}


def fork(s: Story, system: list, names: str, spans: list) -> dict:
    """A program asks its system prompt and goes on in branches, each a program of its own. Returns their prompts."""
    s.ask(system, program_id="main", spans=[SYSTEM_SPAN])
    s.kvtier("signal", "main", "fork", *(word for name in names for word in ("--child", f"main/{name}")))
    prompts = {name: system + text(ord(name), BRANCH) for name in names}
    for name, prompt in prompts.items():
        said = {"program_id": f"main/{name}", "parent_program_id": "main", "spans": spans}
        loaded = s.ask(prompt, **said)
        check(loaded["host"] == SYSTEM, f"branch {name} should begin with the system prompt's blocks: {loaded}")
        s.daemon.settle()
    return prompts


def system_prompt_outlives_abandoned_branch(bench, _want: list) -> None:
    """Under pressure a system prompt stays in host memory; branches go, an abandoned one everywhere."""
    with story(bench, SMALL) as s:
        system = text(4, SYSTEM)
        prompts = fork(s, system, "ab", [SYSTEM_SPAN, BRANCH_SPAN])
        freed = s.kvtier("signal", "main/b", "cancellation")
        check(freed["outcome"] == "APPLIED", f"the branch is abandoned: {freed}")
        s.press()
        tiers = {name: s.tiers(prompt) for name, prompt in prompts.items()}
        check(all("host" in t for t in tiers["a"][:SYSTEM]), f"the system prompt left host memory: {tiers['a']}")
        check(not any("host" in t for t in tiers["a"][SYSTEM:]), f"there was no pressure: {tiers['a']}")
        check(tiers["b"][SYSTEM:] == [[]] * BRANCH, f"an abandoned branch is on no tier: {tiers['b']}")
        loaded = s.ask(system)
        check((loaded["host"], loaded["disk"]) == (SYSTEM, 0), f"the system prompt comes from memory: {loaded}")
        loaded = s.ask(prompts["a"])
        check((loaded["host"], loaded["disk"]) == (SYSTEM, BRANCH), f"the living branch comes from disk: {loaded}")
        loaded = s.ask(prompts["b"])
        check((loaded["host"], loaded["disk"]) == (SYSTEM, 0), f"the abandoned branch is computed anew: {loaded}")


def keys(s: Story, prompt: list) -> list:
    """The keys of a prompt's blocks."""
    return [b["key"] for b in s.kvtier("locate", *s.named(prompt))["blocks"]]


@contextmanager
def two_nodes(bench):
    """A story on one node, beside another one; both write all they have to an object store."""
    directory = Directory(bench.home)
    directory.start()
    home = bench.home / "b"
    home.mkdir()
    other = Daemon(bench.daemon.target, home)
    try:

        def config(name: str) -> str:
            ports = [free_port() for _ in range(2)]
            return (
                f'{SMALL}[object]\nenabled = true\nurl = "file://{bench.home}/bucket"\nwrite = "all"\n'
                f'[cluster]\ndirectory = "{directory.url}"\nlisten = "127.0.0.1:{ports[0]}"\n'
                f'[transport]\norder = ["tcp"]\ntcp_listen = "127.0.0.1:{ports[1]}"\n'
            )

        configure(other, config("b"), node_id="b")
        other.start()
        with story(bench, config("a"), node_id="a") as s:
            s.daemon.wait("meet the other node", lambda: len(s.kvtier("nodes")["nodes"]) == 2)
            yield s, other
    finally:
        other.end(15)
        directory.end()


def abandoned_branch_everywhere(bench, _want: list) -> None:
    """An abandoned branch leaves host memory, disk and object store of every node; what it shared with others stays."""
    with two_nodes(bench) as (s, other):
        system = text(5, SYSTEM)
        # The shipped rules keep what is said to be a branch out of buckets.
        prompts = fork(s, system, "ab", [SYSTEM_SPAN])
        for prompt in prompts.values():
            s.kvtier("replicate", *s.named(prompt), "--node", "b")
            # Copies from elsewhere stay in memory unless they are told to go.
            for words in (["move", "--to", "disk"], ["prefetch"]):
                # By their keys: no engine told this node how blocks are named.
                answer = other.kvtier(*words, *keys(s, prompt))
                check(answer is not None, f"{words} on the other node said nothing")

        def held(node: str, prompt: list) -> list:
            """Tiers of one node that have each block."""
            blocks = s.kvtier("locate", *s.named(prompt))["blocks"]
            return [{r["tier"] for r in b["replicas"] if r["node_id"] == node} for b in blocks]

        def everywhere(node: str, prompt: list) -> bool:
            wanted = {"host", "disk", "object"} if node == "a" else {"host", "disk"}
            return all(wanted <= tiers for tiers in held(node, prompt))

        def whole() -> bool:
            return all(everywhere(node, prompt) for node in "ab" for prompt in prompts.values())

        s.daemon.wait("have all blocks on every tier of both nodes", whole)
        freed = s.kvtier("signal", "main/b", "cancellation")
        check(freed["outcome"] == "APPLIED" and freed["blocks"] == BRANCH, f"its own blocks are freed: {freed}")
        told = {n["node_id"]: n["outcome"] for n in freed["nodes"]}
        check(told == {"b": "APPLIED"}, f"the other node is told: {told}")
        s.daemon.wait("forget the branch", lambda: not any(s.tiers(prompts["b"])[SYSTEM:]))
        for node, daemon in (("a", s.daemon), ("b", other)):
            listed = daemon.kvtier("ls", "--limit", "1000")["blocks"]
            own = {b["program_id"] for b in listed}
            check("main/b" not in own, f"node {node} still has blocks of the branch: {own}")
            check(len(listed) == SYSTEM + BRANCH, f"node {node} has {len(listed)} blocks, not {SYSTEM + BRANCH}")
        check(all(everywhere(node, prompts["a"]) for node in "ab"), "copies that others hold are gone")
        loaded = s.ask(prompts["a"])
        check(loaded["host"] == SYSTEM + BRANCH, f"the living branch is whole: {loaded}")
        loaded = s.ask(prompts["b"])
        check(sum(loaded.values()) == SYSTEM, f"the abandoned branch's own blocks are computed anew: {loaded}")


PROGRAMS = [system_prompt_outlives_abandoned_branch, abandoned_branch_everywhere]
