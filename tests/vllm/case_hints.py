"""Hints over HTTP, and in vLLM's envelope: they reach the blocks, and what became of them is in the response."""

import json
from pathlib import Path

from rig import Daemon, run_engine
from server import Server

# Tokens of a block, as vLLM has them on processors.
BLOCK = 128
# Blocks of a prompt.
BLOCKS = 8


def prompt(number: int) -> list:
    """One that shares no block with others."""
    return [7 + (29 * number + 11 * n) % 250 for n in range(BLOCK * BLOCKS)]


def action(kind: str, payload: dict) -> dict:
    """An envelope with one action."""
    one = {"action_id": "a", "action_type": kind, "action_version": "1.0", "payload": payload}
    return {"protocol_version": "0.1", "message_id": "m", "actions": [one]}


def outcomes(answer: dict) -> dict:
    """Action or carrier -> outcome, as the response tells it."""
    told = (answer.get("kv_transfer_params") or {}).get("kvtier") or {}
    if "outcomes" not in told or told.get("unanswered"):
        raise AssertionError(f"the response tells no outcomes: {answer.get('kv_transfer_params')}")
    return {row["action_type"]: row["outcome"] for row in told["outcomes"]}


def expect(what: str, found, wanted) -> None:
    """Says what differs."""
    if found != wanted:
        raise AssertionError(f"{what}: {found}, not {wanted}")


def types(daemon: Daemon, program: str) -> list:
    """Types of a program's first blocks in prefix order, once all of the prompt are there."""
    found = []

    def there() -> bool:
        listed = (daemon.kvtier("ls", "--limit", "1000") or {}).get("blocks", [])
        blocks = [b for b in listed if b["program_id"] == program]
        found[:] = [b["semantic"] for b in sorted(blocks, key=lambda b: b["depth_blocks"])]
        return len(found) >= BLOCKS

    daemon.wait(f"keep the blocks of {program}", there)
    return found[:BLOCKS]


SPANS = [{"start": 0, "end": 320, "type": "SYSTEM_PROMPT"}, {"start": 320, "end": 768, "type": "TOOL_DEFINITION"}]
# The third block spans both: the more durable one counts.
SPANNED = ["SYSTEM_PROMPT"] * 3 + ["TOOL_DEFINITION"] * 3


def over_http(server: Server, daemon: Daemon, home: Path) -> None:
    """Every carrier that a client of the server has."""
    rest = ["UNSPECIFIED"] * (BLOCKS - len(SPANNED))
    said = json.dumps({"program_id": "by-context", "spans": SPANS})
    answer = server.complete(prompt(1), vllm_xargs={"agentic_context": said})
    expect("agentic_context", outcomes(answer), {"agentic_context": "APPLIED"})
    expect("types by agentic_context", types(daemon, "by-context"), SPANNED + rest)

    said = json.dumps({"program_id": "by-xargs", "spans": SPANS, "cache_control": {"type": "ephemeral", "ttl": "5m"}})
    answer = server.complete(prompt(2), vllm_xargs={"kvtier": said, "prompt_cache_retention": "24h"})
    wanted = {"kvtier": "APPLIED", "cache_control": "APPLIED", "prompt_cache_retention": "CLIPPED"}
    expect("kvtier", outcomes(answer), wanted)
    expect("types by kvtier", types(daemon, "by-xargs"), SPANNED + rest)

    answer = server.complete(
        prompt(3), kv_transfer_params={"program_id": "by-params", "semantic": "DOCUMENT", "priority": 90}
    )
    expect("kv_transfer_params", outcomes(answer), {"kv_transfer_params": "CLIPPED"})
    expect("types by kv_transfer_params", types(daemon, "by-params"), ["DOCUMENT"] * BLOCKS)

    envelope = home / "envelope.json"
    envelope.write_text(json.dumps(action("kvtier.annotate", {"program_id": "by-session", "type": "SKILL"})))
    daemon.kvtier("apply-hints", "--session", "s-1", str(envelope))
    answer = server.complete(prompt(4), headers={"X-Session-ID": "s-1"})
    expect("X-Session-ID", outcomes(answer), {"session_id": "APPLIED"})
    expect("types by session", types(daemon, "by-session"), ["SKILL"] * BLOCKS)

    # The body's session id, and a stronger carrier beside the weaker one.
    answer = server.complete(
        prompt(5),
        session_id="s-1",
        vllm_xargs={"agentic_context": json.dumps({"program_id": "both"})},
        kv_transfer_params={"program_id": "weaker"},
    )
    found = outcomes(answer)
    expect("both", found, {"agentic_context": "APPLIED", "session_id": "APPLIED", "kv_transfer_params": "APPLIED"})
    expect("types of both", types(daemon, "both"), ["SKILL"] * BLOCKS)

    for junk in ("[" * 5000, '{"program_id": 3, "spans": [[]]}', "nonsense"):
        answer = server.complete(prompt(6), vllm_xargs={"kvtier": junk})
        expect("junk", outcomes(answer), {"kvtier": "REJECTED"})
        expect("tokens beside junk", answer["usage"]["completion_tokens"], 16)
    if (server.complete(prompt(7)).get("kv_transfer_params") or {}).get("kvtier"):
        raise AssertionError("a request without hints was told of hints")


def in_envelope(model: Path, home: Path, daemon: Daemon) -> None:
    """`Request.kv_hints`, which vLLM takes from whoever embeds it."""
    directives = [{"start": 0, "end": 512, "priority": 90, "duration": 60}]
    actions = action("kvtier.annotate", {"program_id": "by-envelope", "spans": SPANS})["actions"]
    actions += action("kv.retain", {"scope": None, "directives": directives})["actions"]
    actions += action("vllm.set_priority", {"value": 3})["actions"]
    kv_hints = {"protocol_version": "0.1", "message_id": "m", "actions": actions}
    ask = [{"prompt": prompt(8), "kv_hints": kv_hints}]
    run_engine(model, home, "envelope", ["--socket", daemon.socket], ask)
    (row,) = json.loads((home / "envelope.json").read_text())["outputs"]
    wanted = {"kvtier.annotate": "APPLIED", "kv.retain": "CLIPPED", "vllm.set_priority": "UNSUPPORTED"}
    expect("kv_hints", outcomes(row), wanted)
    expect("types by kv_hints", types(daemon, "by-envelope")[: len(SPANNED)], SPANNED)


def hints(bench, _want: list) -> None:
    """What clients say of their requests, by every carrier."""
    model = bench.models / "tiny-llama"
    bench.daemon.start()
    server = Server(model, bench.home, bench.daemon.socket)
    try:
        server.wait()
        over_http(server, bench.daemon, bench.home)
    finally:
        server.end()
    in_envelope(model, bench.home, bench.daemon)
    counted = {row["name"]: row["value"] for row in bench.daemon.status()["policy"]}
    if counted["hints_rejected"] < 3 or counted["hints_ignored"] < 1:
        raise AssertionError(f"not counted: {counted}")
