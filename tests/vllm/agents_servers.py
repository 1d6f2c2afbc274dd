"""Conversations over two real servers, each with a daemon of its own: placed by program, and one after the other.

usage: agents_servers.py URL URL [--daemon SOCKET --nodes NODE,NODE]
Prints {"sticky": FIGURES, "round_robin": FIGURES}: prompt tokens, those that a server computed, requests by server, and
the reasons of their placement. With a daemon it is asked where each request goes, and its explanations are told too:
"placed" instead of "sticky".
"""

import argparse
import itertools
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))

import kvtier_agents  # noqa: E402
from kvtier_agents import Placement, Signals  # noqa: E402
from kvtier_agents.signals import RequestCarrier  # noqa: E402

TALKS, TURNS, SYSTEM_CHARS, TURN_CHARS = 3, 4, 700, 200


class RoundRobin:
    """Each request goes to the next server."""

    def __init__(self):
        self.turn = itertools.count()

    def place(self, program, servers) -> Placement:
        return Placement(servers[next(self.turn) % len(servers)], "its turn")

    def began(self, server: str) -> None:
        """Counts nothing."""

    def ended(self, server: str, reached: bool) -> None:
        """Counts nothing."""


def text(seed: str, chars: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz  ") for _ in range(chars))


def converse(servers: list, name: str, placer) -> dict:
    """All conversations, turn by turn."""
    shared = kvtier_agents.Attachment(servers=servers, placer=placer, tokenize_seconds=60)
    client = kvtier_agents.openai_client(shared, base_url=f"{servers[0]}/v1", api_key="-", max_retries=0)
    quiet = Signals(RequestCarrier())
    runs = [kvtier_agents.program(name, id=f"{name}-{n}", signals=quiet) for n in range(TALKS)]
    talks = [[{"role": "system", "content": text(run.id, SYSTEM_CHARS)}] for run in runs]
    figures: dict = {"prompt": 0, "computed": 0}
    for turn in range(TURNS):
        for run, talk in zip(runs, talks, strict=True):
            talk.append({"role": "user", "content": text(f"{run.id} {turn}", TURN_CHARS)})
            with kvtier_agents.programs.active(run):
                more = {"ignore_eos": True, "allowed_token_ids": list(range(68, 94))}
                answer = client.chat.completions.create(
                    model="tiny", messages=talk, max_tokens=16, temperature=0, extra_body=more
                )
            talk.append({"role": "assistant", "content": answer.choices[0].message.content})
            cached = answer.usage.prompt_tokens_details
            figures["prompt"] += answer.usage.prompt_tokens
            figures["computed"] += answer.usage.prompt_tokens - (cached.cached_tokens or 0 if cached else 0)
    return {**figures, "counts": dict(shared.counts)}


class Heard(kvtier_agents.DaemonPlacer):
    """Keeps what the daemon said."""

    heard: list = []

    def place(self, program, servers) -> Placement:
        placement = super().place(program, servers)
        self.heard.append(placement.explanation)
        return placement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs=2)
    parser.add_argument("--daemon")
    parser.add_argument("--nodes", default="")
    args = parser.parse_args()
    told = {}
    if args.daemon:
        nodes = dict(zip(args.servers, args.nodes.split(","), strict=True))
        placer = Heard(nodes, f"unix://{args.daemon}", seconds=2.0)
        told["placed"] = {**converse(args.servers, "placed", placer), "explained": placer.heard}
    else:
        told["sticky"] = converse(args.servers, "sticky", kvtier_agents.LocalPlacer())
    told["round_robin"] = converse(args.servers, "round_robin", RoundRobin())
    print(json.dumps(told))


if __name__ == "__main__":
    main()
