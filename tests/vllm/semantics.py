"""Blocks under an operator's hand, end to end with real vLLM on a deliberately small host tier.

One engine answers one question at a time with its own prefix cache emptied before each, so that whatever it does not
compute comes from kvtierd; in between the cases speak to kvtierd as an operator does, with `kvtier`. What was loaded,
and from where, is read from the daemon's ledger.
"""

import json
import random
import signal
import time
from contextlib import contextmanager

from talk import Talk

BLOCK_TOKENS = 128
# On some processors bfloat16 is too coarse to compare tokens by: an engine that hits its own prefix cache computes in other
# portions than one that does not, and where two tokens are about as likely the other one comes out.
PRECISE = ["--engine", '{"dtype": "float32"}']
# 32 blocks of the tiny model, of which one owner may claim 6.
SMALL = '[host]\ncapacity = "16MiB"\nextent = "2MiB"\n[disk]\ncapacity = "256MiB"\nsegment = "16MiB"\n'
# Survival ranking keeps what was asked for again; where a case counts on the oldest to go it says so.
OLDEST_FIRST = '[eviction]\npolicy = "lru"\n'
PIN_SECONDS = 45


def check(good: bool, what: str) -> None:
    if not good:
        raise AssertionError(what)


def text(seed: int, blocks: int) -> list:
    """Tokens of so many blocks, of no other seed's."""
    draw = random.Random(seed)
    return [7 + draw.randrange(250) for _ in range(blocks * BLOCK_TOKENS)]


class Story:
    """A daemon, an engine, and what the cases of this file ask of both."""

    def __init__(self, bench, talk: Talk):
        self.home, self.talk, self.daemon = bench.home, talk, bench.daemon
        self.answers, self.pressure = {}, 1000
        self.model = None

    def ask(self, prompt: list, **said) -> dict:
        """Asks, telling what is said of the request, and says how many blocks were loaded for it from where. One prompt has one answer, wherever it is from."""
        before = self.counted()
        # One token beyond the last block, so that all blocks can be loaded.
        more = {"xargs": {"kvtier": json.dumps(said)}} if said else {}
        answer = self.talk.ask([*prompt, 5], **more)
        self.daemon.wait("settle", lambda: not any(a["leases"] for a in self.daemon.status()["attachments"]))
        known = self.answers.setdefault(tuple(prompt), answer["tokens"])
        check(known == answer["tokens"], "the answer's tokens differ from the first time")
        return {tier: count - before[tier] for tier, count in self.counted().items()}

    def counted(self) -> dict:
        return {c["name"]: c["value"] for c in self.daemon.status()["blocks_loaded"]}

    def kvtier(self, *words: str) -> dict:
        answer = self.daemon.kvtier(*words)
        check(answer is not None, f"kvtier {' '.join(words)} said nothing")
        return answer

    def named(self, prompt: list) -> list:
        """Words that name a prompt's blocks as a target."""
        if self.model is None:
            self.model = self.kvtier("ls", "--limit", "1")["blocks"][0]["model"]
        path = self.home / "tokens.json"
        path.write_text(json.dumps(prompt))
        return ["--tokens-file", str(path), "--model", self.model]

    def tiers(self, prompt: list) -> list:
        """For each block of a prompt, the tiers that have a copy of it on whatever node."""
        blocks = self.kvtier("locate", *self.named(prompt))["blocks"]
        return [sorted({r["tier"] for r in b["replicas"]}) for b in blocks]

    def in_host(self, prompt: list) -> list:
        """For each block of a prompt, whether a copy of it is in host memory."""
        return ["host" in tiers for tiers in self.tiers(prompt)]

    def press(self) -> None:
        """Fills the host tier with what nobody wants again."""
        for _ in range(4):
            self.pressure += 1
            self.ask(text(self.pressure, 10))
            self.daemon.settle()


def configure(daemon, config: str, node_id: str = "node") -> None:
    """Writes a daemon's configuration: its name, its directories, and what is given."""
    daemon.config.write_text(f'node_id = "{node_id}"\nrun_dir = "{daemon.home}"\ndata_dir = "{daemon.home}/data"\n{config}')


@contextmanager
def story(bench, config: str, node_id: str = "node"):
    """A story with a daemon of this configuration."""
    home = bench.home
    configure(bench.daemon, config, node_id)
    bench.daemon.start()
    talk = Talk(bench.models / "tiny-llama", home / "talk.log", bench.socket + ["--async-save", "false", *PRECISE])
    try:
        yield Story(bench, talk)
    finally:
        talk.end()


def pins(bench, _want: list) -> None:
    """Pinned blocks survive pressure and restart and are let go on time; what is over budget is clipped."""
    with story(bench, SMALL + OLDEST_FIRST) as s:
        prompt = text(1, 8)
        s.ask(prompt)
        s.daemon.settle()
        four = s.named(prompt[: 4 * BLOCK_TOKENS])
        began = time.monotonic()
        pinned = s.kvtier("pin", *four, "--claim", "four", "--owner", "test", "--ttl", f"{PIN_SECONDS}s")
        check(pinned["outcome"] == "APPLIED", f"four blocks fit the budget: {pinned}")
        clipped = s.kvtier("pin", *s.named(prompt), "--claim", "all", "--owner", "test", "--ttl", "1h")
        check(clipped["outcome"] == "CLIPPED", f"eight blocks are more than a fifth of 32: {clipped}")
        check(clipped["claimed_bytes"] <= clipped["budget_bytes"], f"more than the budget is claimed: {clipped}")
        s.kvtier("unpin", "--claim", "all", "--owner", "test")
        s.press()
        check(s.in_host(prompt) == [True] * 4 + [False] * 4, f"only pinned blocks outlive it: {s.in_host(prompt)}")
        s.daemon.end(signal.SIGKILL)
        s.daemon.start()
        s.daemon.wait("bring pinned blocks back", lambda: s.in_host(prompt)[:4] == [True] * 4)
        claims = [c["claim_id"] for c in s.kvtier("claims")["claims"]]
        check(claims == ["four"], f"one claim should have survived: {claims}")
        time.sleep(max(0.0, PIN_SECONDS + 1 - (time.monotonic() - began)))
        s.daemon.wait("end the claim", lambda: not s.kvtier("claims")["claims"])
        s.press()
        check(s.in_host(prompt) == [False] * 8, "once their claim is over they go as any other")


def moved_by_verb(bench, _want: list) -> None:
    """Evict, Move and Prefetch change where the next load comes from."""
    with story(bench, SMALL) as s:
        prompt = text(2, 8)
        s.ask(prompt)
        s.daemon.settle()
        seen = [s.ask(prompt)]
        for words in (["move", "--to", "disk"], ["prefetch"], ["evict", "--tier", "host"], ["evict"]):
            # A load from disk leaves a copy in host memory: each verb finds the blocks in both tiers.
            s.kvtier(*words, *s.named(prompt))
            seen.append(s.ask(prompt))
            if words[0] == "move":
                s.kvtier(*words, *s.named(prompt))
        loads = [(one["host"], one["disk"]) for one in seen]
        want = [(8, 0), (0, 8), (8, 0), (0, 8), (0, 0)]
        check(loads == want, f"blocks loaded from host memory and disk: {loads}, should be {want}")


def no_serve(bench, _want: list) -> None:
    """A block marked NoServe is computed anew for whoever does not tolerate it, and the refusal is counted."""
    with story(bench, SMALL) as s:
        prompt = text(3, 8)
        s.ask(prompt)
        s.daemon.settle()
        s.kvtier("taint", *s.named(prompt), "--taint", "pii=mail:NoServe")
        check(s.ask(prompt)["host"] == 0, "a NoServe block was handed to a request that does not tolerate it")
        denied = {p["name"]: p["value"] for p in s.daemon.status()["ledger"]["parts"]}["denied"]
        check(denied == 8 * BLOCK_TOKENS, f"{denied} tokens counted as denied")
        check(s.ask(prompt, tolerations=["pii=mail"])["host"] == 8, "a request that tolerates the taint has them all")
        s.daemon.end(signal.SIGKILL)
        s.daemon.start()
        s.daemon.wait("attach the engine again", lambda: s.daemon.status()["attachments"])
        loaded = s.ask(prompt)
        check(loaded["host"] + loaded["disk"] == 0, f"handed out after a restart: {loaded}")
        loaded = s.ask(prompt, tolerations=["pii"])
        check(loaded["disk"] == 8, f"its copies on disk serve who tolerates them: {loaded}")


SEMANTICS = [pins, moved_by_verb, no_serve]
