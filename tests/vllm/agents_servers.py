"""Conversations over two real servers, each with a daemon of its own: placed by program, and one after the other.

usage: agents_servers.py URL URL
Prints {"sticky": FIGURES, "round_robin": FIGURES}: prompt tokens, those that a server computed, requests by server, and
the reasons of their placement.
"""

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
    figures = {"prompt": 0, "computed": 0}
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


def main() -> None:
    servers = sys.argv[1:]
    sticky = converse(servers, "sticky", kvtier_agents.LocalPlacer())
    print(json.dumps({"sticky": sticky, "round_robin": converse(servers, "round_robin", RoundRobin())}))


if __name__ == "__main__":
    main()
