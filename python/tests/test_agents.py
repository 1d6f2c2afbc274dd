"""Programs, segments, signals and spans, without any library."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import support  # noqa: F401 (finds the package)
from fake_server import render

import kvtier_agents
from kvtier_agents import headers, programs, requests, signals, wire
from kvtier_agents.placement import DaemonPlacer, LocalPlacer
from kvtier_agents.programs import Meaning
from kvtier_agents.signals import RequestCarrier, Signal, Signals, Unavailable
from kvtier_agents.spans import SpanReader


class Heard(Signals):
    """Signals that are kept instead of sent."""

    def __init__(self) -> None:
        super().__init__(carrier=None)
        self.all: list[Signal] = []

    def send(self, signal: Signal) -> bool:
        self.all.append(signal)
        return True

    def kinds(self) -> list[tuple[str, str]]:
        return [(s.kind, s.program_id) for s in self.all]


class Families(unittest.TestCase):
    def test_the_table_is_the_documented_one(self):
        docs = (Path(__file__).parents[2] / "docs" / "HINTS.md").read_text(encoding="utf-8")
        for family in headers.FAMILIES:
            of = (family.session, family.program, family.parent)
            row = [family.sender, *(", ".join(f"`{name}`" for name in names) for names in of)]
            self.assertIn(row, [_cells(line) for line in docs.splitlines()])

    def test_one_family_counts(self):
        session = {"x-session-id": "s"}
        claude = {"x-claude-code-session-id": "c"}
        agent = {**claude, "x-claude-code-agent-id": "a"}
        cases = [
            ({**session, **claude}, ("c", "c", "")),
            (agent, ("c", "a", "c")),
            ({**agent, "x-claude-code-parent-agent-id": "p"}, ("c", "a", "p")),
            ({"session-id": "s", "thread-id": "t"}, ("s", "t", "")),
            ({**session, "x-llm-d-inference-fairness-id": "f"}, ("s", "f", "")),
            ({"x-claude-code-session-id": "x" * 129, **session}, ("s", "", "")),
        ]
        for given, wanted in cases:
            found = headers.identity(given)
            self.assertEqual((found.session_id, found.program_id, found.parent_program_id), wanted)
        self.assertIsNone(headers.identity({"authorization": "Bearer"}))

    def test_headers_name_the_program_where_nothing_else_does(self):
        given = {"x-claude-code-session-id": "c", "x-claude-code-agent-id": "a"}
        said = requests.said_by(programs.State(), given, b"{}").program
        self.assertEqual((said.id, said.parent.id, said.session), ("a", "c", "c"))
        current = programs.State(programs.Program("own"))
        self.assertIs(requests.said_by(current, given, b"{}"), current)
        for body in (
            {"vllm_xargs": {"agentic_context": '{"program_id": "own"}'}},
            {"kv_transfer_params": {"program_id": "p"}},
        ):
            self.assertIsNone(requests.said_by(programs.State(), given, json.dumps(body).encode()).program)
        self.assertIsNotNone(requests.said_by(programs.State(), given, b"no JSON").program)

    def test_roles_and_what_a_parent_waits_for_are_said(self):
        with kvtier_agents.program("p", id="p", role="planner", blocks_parent=False, signals=Heard()):
            flow = requests.change(programs.state(), {}, None)
            with self.assertRaises(StopIteration) as done:
                next(flow)
        said = json.loads(done.exception.value.body["vllm_xargs"]["kvtier"])
        self.assertEqual(said, {"program_id": "p", "agent_role": "planner", "blocks_parent": False})
        with self.assertRaises(ValueError):
            kvtier_agents.program("p", role="x" * 129)


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


class Programs(unittest.TestCase):
    def setUp(self):
        self.heard = Heard()

    def program(self, id: str = "p") -> programs.Program:
        return kvtier_agents.program("p", id=id, signals=self.heard)

    def test_a_forked_branch_is_abandoned_and_the_rest_is_joined(self):
        with self.program() as run:
            with run.fork("a", "b", "c") as fork:
                for branch in fork:
                    with branch:
                        self.assertIs(kvtier_agents.current(), branch)
                        self.assertEqual(programs.state().meaning.type, "REASONING_BRANCH")
                fork["c"].abandon()
                fork["c"].abandon()
            self.assertIs(kvtier_agents.current(), run)
            self.assertEqual(run.branches, {})
        self.assertIsNone(kvtier_agents.current())
        wanted = [("FORK", "p"), ("CANCELLATION", "p/c"), ("JOIN", "p"), ("COMPLETION", "p")]
        self.assertEqual(self.heard.kinds(), wanted)
        self.assertEqual(self.heard.all[0].children, ("p/a", "p/b", "p/c"))
        self.assertEqual(self.heard.all[1].parent_program_id, "p")
        self.assertEqual(self.heard.all[2].children, ("p/a", "p/b"))

    def test_a_fork_joins_its_own_branches(self):
        with self.program() as run:
            first = run.fork("a", "b")
            second = run.fork("a")
            first.join()
            self.assertEqual(run.branches, {"a": second["a"]})
            run.join("a")
        children = [signal.children for signal in self.heard.all if signal.kind == "JOIN"]
        self.assertEqual(children, [("p/a", "p/b"), ("p/a",)])

    def test_an_agent_never_fails_for_a_signal(self):
        class Bad:
            def send(self, signal):
                raise RuntimeError("no")

        with self.assertLogs("kvtier_agents"), kvtier_agents.program("p", signals=Bad()) as run, run.fork("a") as fork:
            fork["a"].abandon()
        for seconds in (-1, float("nan"), float("inf"), 0):
            with self.program() as run, run.tool("t", expected=seconds):
                self.assertEqual(self.heard.all[-1].expected_resume_ms, 0)

    def test_an_error_abandons_a_branch_and_a_failed_run_can_be_tried_again(self):
        with self.assertRaises(KeyError), self.program() as run, run.fork("a", "b") as fork:
            with self.assertRaises(ValueError), fork["a"]:
                raise ValueError
            raise KeyError
        wanted = [("FORK", "p"), ("CANCELLATION", "p/a"), ("CANCELLATION", "p/b"), ("COMPLETION", "p")]
        self.assertEqual(self.heard.kinds(), wanted)

    def test_a_cancelled_task_abandons_its_program(self):
        async def work() -> None:
            async with self.program():
                await asyncio.sleep(60)

        async def cancel() -> None:
            task = asyncio.create_task(work())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(cancel())
        self.assertEqual(self.heard.kinds(), [("CANCELLATION", "p")])

    def test_tools_at_the_same_time_are_one_wait(self):
        with self.program() as run:
            with kvtier_agents.tool("search", expected=2.5), run.tool("search"):
                pass
            with run.tool("search"):
                pass
        kinds = [kind for kind, _ in self.heard.kinds()]
        self.assertEqual(kinds, ["TOOL_WAIT", "CONTINUATION", "TOOL_WAIT", "CONTINUATION", "COMPLETION"])
        self.assertEqual(self.heard.all[0].expected_resume_ms, 2500)
        self.assertLess(self.heard.all[2].expected_resume_ms, 2500, "what it took before is expected")
        with kvtier_agents.tool("search"):
            self.assertEqual(len(self.heard.all), 5, "without a program nobody waits")

    def test_tasks_and_bound_threads_are_in_their_program_and_others_are_not(self):
        async def seen() -> str:
            await asyncio.sleep(0)
            return kvtier_agents.current().id

        async def both() -> list:
            with self.program() as run, run.fork("a", "b") as fork:
                return await asyncio.gather(asyncio.create_task(seen()), *(b.bind(seen)() for b in fork))

        self.assertEqual(asyncio.run(both()), ["p", "p/a", "p/b"])
        with self.program() as run, ThreadPoolExecutor(1) as pool:
            self.assertIs(pool.submit(kvtier_agents.bind(kvtier_agents.current)).result(), run)
            self.assertIsNone(pool.submit(kvtier_agents.current).result())

    def test_programs_within_programs_are_children(self):
        with self.program() as run, kvtier_agents.program("writer") as child:
            self.assertEqual((child.parent, child.session, child.root), (run, "p", run))
            self.assertTrue(child.id.startswith("p/writer-"), child.id)
        self.assertEqual([kind for kind, _ in self.heard.kinds()], ["COMPLETION", "COMPLETION"])
        deep = self.program("x" * 128)
        name = deep.fork("long" * 40)["long" * 40].id
        self.assertLessEqual(len(name.encode()), programs.MAX_ID_BYTES)
        for bad in ("", "x" * 129, "a\0b"):
            with self.assertRaises(ValueError):
                kvtier_agents.program("p", id=bad)
            with self.assertRaises(ValueError):
                kvtier_agents.program("p", session=bad)

    def test_segments_add_up(self):
        with kvtier_agents.segment("document", "team=a:NoServe", ttl="5m"):
            with kvtier_agents.segment(taints=["b"]):
                self.assertEqual(programs.state().meaning, Meaning("DOCUMENT", ("team=a:NoServe", "b"), "5m"))
            self.assertEqual(programs.state().meaning.taints, ("team=a:NoServe",))
        self.assertEqual(programs.state().meaning, Meaning())
        with self.assertRaises(ValueError):
            kvtier_agents.segment("NO_SUCH_TYPE")

    def test_a_block_left_in_another_context_undoes_nothing(self):
        run = self.program()
        run.__enter__()
        thread = threading.Thread(target=run.__exit__, args=(None, None, None))
        thread.start()
        thread.join()
        self.assertIs(kvtier_agents.current(), run)
        run.__exit__(None, None, None)
        self.assertIsNone(kvtier_agents.current())

    def test_nothing_but_the_library_is_imported(self):
        code = "import kvtier_agents, sys; bad = {'httpx', 'httpx2', 'grpc', 'openai', 'vllm', 'kvtier'}; "
        code += "bad &= set(sys.modules); sys.exit(f'imported: {bad}' if bad else 0)"
        root = Path(__file__).resolve().parents[1]
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)})


class Carrier:
    """Answers as it is told."""

    def __init__(self, *answers: object) -> None:
        self.answers, self.sent = list(answers), []
        self.open = threading.Event()
        self.open.set()

    def send(self, signal: Signal, seconds: float) -> str:
        self.open.wait(10)
        self.sent.append(signal.program_id)
        answer = self.answers.pop(0) if self.answers else "APPLIED"
        if isinstance(answer, Exception):
            raise answer
        return answer


class Background(unittest.TestCase):
    def test_signals_arrive_in_order_and_are_tried_again(self):
        carrier = Carrier(Unavailable("no"), "APPLIED", RuntimeError("denied"), "DUPLICATE")
        sender = Signals(carrier)
        for name in "abc":
            self.assertTrue(sender.send(Signal("COMPLETION", name)))
        self.assertTrue(sender.flush(10))
        self.assertEqual(carrier.sent, ["a", "a", "b", "c"])
        self.assertEqual(dict(sender.counts), {"applied": 1, "failed": 1, "duplicate": 1})
        sender.close()
        self.assertFalse(sender.send(Signal("COMPLETION", "d")))

    def test_what_does_not_fit_or_is_late_is_dropped_and_nobody_waits(self):
        carrier = Carrier(*[Unavailable("no")] * 100)
        carrier.open.clear()
        sender = Signals(carrier, deadline_seconds=0.3, max_queued=4)
        began = time.monotonic()
        taken = [sender.send(Signal("COMPLETION", str(n))) for n in range(20)]
        self.assertLess(time.monotonic() - began, 0.2)
        self.assertIn(taken.count(True), (4, 5))
        carrier.open.set()
        self.assertTrue(sender.flush(10))
        late, full = sender.counts["dropped_late"], sender.counts["dropped_full"]
        self.assertEqual((late, full), (taken.count(True), taken.count(False)))

    def test_without_a_daemon_requests_carry_signals(self):
        sender = Signals(RequestCarrier())
        with kvtier_agents.program("p", id="p", signals=sender) as run:
            with run.tool("t"):
                pass
            run.fork("a", "b")
            state, body = programs.state(), {"messages": [{"role": "user", "content": "x"}]}
            said = _said(requests.change(state, body, None))
            self.assertEqual(said["signal"]["children"], ["p/a", "p/b"], "a wait that is over is not told")
            self.assertNotIn("signal", _said(requests.change(state, body, None)))
        for n in range(signals.MAX_CARRIED + 5):
            sender.send(Signal("FORK", str(n)))
        self.assertEqual(sender.counts["failed"], 6)

    def test_the_command_is_the_last_resort_before_requests(self):
        carrier = signals.CommandCarrier(sys.executable, None)
        code = "import sys; sys.exit(0 if sys.argv[-3:] == ['--', '-p', 'tool-wait'] else 2)"
        carrier._words = [sys.executable, "-c", code]
        self.assertEqual(carrier.send(Signal("TOOL_WAIT", "-p", expected_resume_ms=5), 10), "APPLIED")
        with self.assertRaises(RuntimeError):
            carrier.send(Signal("JOIN", "p"), 10)
        carrier._words = [sys.executable, "-c", "import sys; sys.exit(3)"]
        with self.assertRaises(Unavailable):
            carrier.send(Signal("JOIN", "p"), 10)

    def test_messages_on_the_wire(self):
        signal = Signal("FORK", "p", "q", ("a", "b" * 200), 300)
        data = wire.signal_request(signal)
        children = b"\x22\x01a" + b"\x22\xc8\x01" + b"b" * 200
        self.assertEqual(data, b"\x0a\x01p" + b"\x12\x01q" + b"\x18\x03" + children + b"\x28\xac\x02")
        self.assertEqual(wire.signal_reply(b"\x08\x06\x12\x02no\x18\x05\x2a\x03\x0a\x01n"), ("REJECTED", "no"))
        self.assertEqual(wire.signal_reply(b""), ("UNSPECIFIED", ""))
        for bad in (b"\x08", b"\xff" * 12, b"\x0b"):
            with self.assertRaises((ValueError, IndexError)):
                wire.signal_reply(bad)


def _said(asking) -> dict:
    """What a request says, without a tokenizer."""
    try:
        asking.send(None)
    except StopIteration as done:
        return json.loads(done.value.body["vllm_xargs"]["kvtier"])
    raise AssertionError("it asked the tokenizer")


TOOLS = [{"type": "function", "function": {"name": "search"}}]
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "I look"},
    {"role": "tool", "content": "it is this", "tool_call_id": "1"},
    {"role": "user", "content": "thanks"},
]


class Spans(unittest.TestCase):
    def spans(self, reader: SpanReader, body: dict, marked=lambda text: None, tokenize=None) -> tuple[list, int]:
        """The spans and how often the tokenizer was asked."""
        asking, answer, calls = reader.spans(body, marked), None, 0
        try:
            while True:
                asked = asking.send(answer)
                calls += 1
                answer = (tokenize or self.tokenize)(asked)
        except StopIteration as done:
            return done.value, calls

    @staticmethod
    def tokenize(asked: dict) -> list[int]:
        return render(asked["messages"], asked.get("tools"), asked["add_generation_prompt"])

    def text(self, body: dict, span: dict) -> str:
        return bytes(render(body["messages"], body.get("tools"))[span["start"] : span["end"]]).decode()

    def test_each_kind_of_message_has_its_tokens(self):
        body = {"model": "m", "messages": TALK, "tools": TOOLS}
        spans, _ = self.spans(SpanReader(), body)
        found = {span["type"]: self.text(body, span) for span in spans}
        # Where tools begin is told by what is missing without them: to a token that both have, as "[" here.
        self.assertEqual(found["SYSTEM_PROMPT"], "[system] be brief\n[")
        self.assertIn('"search"', found["TOOL_DEFINITION"])
        self.assertEqual(found["TOOL_RESULT"], "[tool] it is this\n")
        self.assertEqual([span["start"] for span in spans], sorted(span["start"] for span in spans))

    def test_a_longer_conversation_asks_for_what_is_new_only(self):
        reader = SpanReader()
        body = {"model": "m", "messages": TALK[:2], "tools": TOOLS}
        first, calls = self.spans(reader, body)
        self.assertLessEqual(calls, 4)
        self.assertEqual(self.spans(reader, body), (first, 0))
        self.assertEqual(self.spans(reader, {**body, "messages": [TALK[0], TALK[4]]})[0][0], first[0])
        longer, calls = self.spans(reader, {**body, "messages": TALK})
        self.assertEqual((longer[: len(first)], calls), (first, 3))
        other, calls = self.spans(reader, {**body, "model": "n"})
        self.assertGreater(calls, 0, "another model writes it in another way")

    def test_marked_texts_say_more_than_roles(self):
        body = {"model": "m", "messages": TALK}
        with kvtier_agents.program("p", id="p", signals=Heard()) as run:
            kvtier_agents.mark(TALK[1], "DOCUMENT", taints=["a=b"], ttl=60)
            with run.fork("x")["x"] as branch:
                spans, _ = self.spans(SpanReader(), body, branch.marked)
        document = next(span for span in spans if span["type"] == "DOCUMENT")
        self.assertEqual((document["taints"], document["ttl"]), (["a=b"], 60))
        self.assertEqual(self.text(body, document), "[user] what is it?\n")

    def test_a_template_that_needs_a_user_is_asked_with_one(self):
        def picky(asked: dict) -> list[int] | None:
            return self.tokenize(asked) if any(m["role"] == "user" for m in asked["messages"]) else None

        body = {"model": "m", "messages": TALK[:2]}
        (span,), _ = self.spans(SpanReader(), body, tokenize=picky)
        self.assertTrue(self.text(body, span).startswith("[system] be brief\n"))

    def test_no_tokenizer_no_junk_and_no_more_calls_than_allowed(self):
        for tokenize in (lambda asked: None, lambda asked: []):
            self.assertEqual(self.spans(SpanReader(), {"messages": TALK, "tools": TOOLS}, tokenize=tokenize)[0], [])
        for junk in ({}, {"messages": 3}, {"messages": []}, {"messages": [7, None, {}]}, {"messages": ["x"] * 9}):
            self.spans(SpanReader(), junk, tokenize=lambda asked: [1, 2])
        many = [m for n in range(30) for m in ({"role": "user", "content": str(n)}, {"role": "tool", "content": "r"})]
        _, calls = self.spans(SpanReader(), {"messages": many})
        self.assertLessEqual(calls, 8)
        huge = {"messages": [{"role": "system", "content": "x" * (1 << 20)}]}
        self.assertEqual(self.spans(SpanReader(), huge), ([], 0))

    def test_what_is_remembered_is_bounded(self):
        reader = SpanReader()
        for n in range(5_000):
            reader._remember(str(n), (0, n))
        self.assertEqual(len(reader._known), 4_096)


class Requests(unittest.TestCase):
    def test_what_the_caller_says_stays(self):
        with kvtier_agents.program("p", id="p", signals=Heard()), kvtier_agents.segment("DOCUMENT"):
            state = programs.state()
        own = {"vllm_xargs": {"kvtier": '{"type": "SKILL"}', "top_n": 3}, "session_id": "mine", "prompt": "x"}
        asking = requests.change(state, own, None)
        with self.assertRaises(StopIteration) as done:
            asking.send(None)
        change = done.exception.value
        self.assertEqual(change.body["vllm_xargs"]["top_n"], 3)
        self.assertIn('"type":"SKILL"', change.body["vllm_xargs"]["kvtier"])
        self.assertIn('"program_id":"p"', change.body["vllm_xargs"]["kvtier"])
        self.assertEqual(change.headers, {})
        self.assertEqual(own["vllm_xargs"]["kvtier"], '{"type": "SKILL"}')

    def test_nothing_current_nothing_said(self):
        with self.assertRaises(StopIteration) as done:
            requests.change(programs.state(), {"messages": TALK}, SpanReader()).send(None)
        self.assertIsNone(done.exception.value)


class Places(unittest.TestCase):
    def test_programs_stay_and_others_go_where_least_is_under_way(self):
        placer, servers = LocalPlacer(), ["a", "b"]
        run = programs.Program("p", signals=Heard())
        self.assertEqual(placer.place(run, servers).server, "a")
        placer.began("a")
        self.assertEqual(placer.place(None, servers).server, "b")
        branch = run.fork("x")["x"]
        self.assertEqual(placer.place(branch, servers).reason, "its program's context is there")
        placer.ended("a", False)
        self.assertEqual(placer.place(branch, servers).server, "b", "a server that is away is left alone")
        self.assertEqual(placer.place(branch, ["a"]).server, "a", "rather it than none")
        for n in range(5_000):
            placer.place(programs.Program(str(n)), servers)
        self.assertLessEqual(len(placer._homes), 4_096)


class DaemonPlaces(unittest.TestCase):
    """A placer whose daemon is a function."""

    def setUp(self):
        self.asked, self.answer = [], lambda step: wire.Placed("b", "STATE", "b: 3 ms")
        self.placer = DaemonPlacer({"http://a": "a", "http://b": "b", "http://b2": "b"}, seconds=0.04)
        self.placer._call = lambda step, timeout: self.asked.append((step, timeout)) or self.answer(step)
        self.run_of = programs.Program("p", signals=Heard())
        self.servers = ["http://a", "http://b", "http://b2", "http://nameless"]

    def place(self, servers=None):
        placement = self.placer.place(self.run_of, servers or self.servers)
        return placement.server, placement.reason

    def test_the_daemon_chooses_among_nodes(self):
        self.placer.began("http://b")
        self.placer.began("http://a")
        self.assertEqual(self.place(), ("http://b2", "kvtierd: its context is nearest there"))
        self.assertEqual(self.placer.place(self.run_of, self.servers).explanation, "b: 3 ms")
        (first, seconds), (second, _) = self.asked
        self.assertEqual((first.program_id, first.queues, first.current), ("p", {"b": 0, "a": 100}, ""))
        self.assertEqual((seconds, first.deadline_ms, second.current), (0.04, 24, "b"))

    def test_a_server_that_is_away_is_no_candidate(self):
        for server in ("http://b", "http://b2"):
            self.placer.began(server)
            self.placer.ended(server, False)
        self.answer = lambda step: wire.Placed("a", "QUEUE", "")
        self.assertEqual(self.place()[0], "http://a")
        self.assertEqual(list(self.asked[0][0].queues), ["a"])

    def test_whatever_fails_it_is_placed_as_without_a_daemon(self):
        self.answer = lambda step: wire.Placed("z", "STATE", "")
        self.assertEqual(self.place(), ("http://a", "least under way (kvtierd chose a node without a server here)"))
        self.assertEqual(self.place()[1], "its program's context is there (kvtierd did not answer lately)")
        self.assertEqual(len(self.asked), 1, "it is left alone for a while")
        self.placer._paused_until = 0.0

        def broken(step):
            raise RuntimeError("broken")

        self.answer = broken
        self.assertEqual(self.place(), ("http://a", "its program's context is there (kvtierd could not choose)"))
        self.assertEqual(self.place(["http://nameless"])[1], "least under way (kvtierd serves none of these)")
        self.assertEqual(self.placer.place(None, self.servers).reason, "least under way")
        self.assertEqual(len(self.asked), 2)

    def test_messages_are_those_of_the_protocol(self):
        step = wire.PlaceRequest("p", {"a": 300, "b": 0}, "a", 24, True)
        wanted = b"\x0a\x01p\x22\x06\x0a\x01a\x10\xac\x02\x22\x03\x0a\x01b\x2a\x01a\x30\x01\x40\x18"
        self.assertEqual(wire.place_request(step), wanted)
        reply = b"\x0a\x01b\x10\x03\x1a\x02ok\x22\x03\x0a\x01b"
        self.assertEqual(wire.place_reply(reply), wire.Placed("b", "QUEUE", "ok"))
        self.assertEqual(wire.place_reply(b"\x10\x63").reason, "UNSPECIFIED")


if __name__ == "__main__":
    unittest.main()
