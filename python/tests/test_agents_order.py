"""Declared steps, progress, and priorities, without a daemon."""

from __future__ import annotations

import json
import stat
import tempfile
import time
import unittest
from pathlib import Path

import support  # noqa: F401 (finds the package)

import kvtier_agents
from kvtier_agents import NextStep, Order, OrderedPlacer, Step, order, signals, wire
from kvtier_agents.order import Declaration, Progress
from kvtier_agents.placement import LocalPlacer
from kvtier_agents.signals import CommandCarrier, RequestCarrier, Signals


class Heard(Signals):
    """Signals that are kept instead of sent."""

    def __init__(self) -> None:
        super().__init__(carrier=None)
        self.all = []

    def send(self, signal) -> bool:
        self.all.append(signal)
        return True


def next_step(**said) -> bytes:
    """`NextStep` as a daemon would say it."""
    numbers = {name: number for number, name in enumerate(NextStep.__dataclass_fields__, 1)}
    parts = []
    for name, value in said.items():
        parts.append(wire.text(numbers[name], value) if isinstance(value, str) else wire.number(numbers[name], value))
    return b"".join(parts)


def reply(*steps: bytes) -> bytes:
    """`NextStepsReply`."""
    return b"".join(wire.message(1, step) for step in steps)


class Asked(Order):
    """An order whose daemon says what it is told to."""

    def __init__(self, says) -> None:
        super().__init__(address="unix:///nowhere")
        self.says, self.asked = says, []
        self._call = self.call

    def call(self, request: bytes, timeout: float) -> bytes:
        self.asked.append((request, timeout))
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


class Declarations(unittest.TestCase):
    def setUp(self):
        self.heard = Heard()

    def test_a_program_says_its_steps_and_how_far_it_is(self):
        with kvtier_agents.program("p", id="p", signals=self.heard) as run:
            run.declare(Step("a"), Step("b", after=("a",)))
            with run.step("a"):
                pass
            with run.fork("x") as fork, fork["x"], self.assertRaises(KeyError), fork["x"].step("b"):
                raise KeyError("b does not end")
        said = [s for s in self.heard.all if not isinstance(s, signals.Signal)]
        steps = (Step("a"), Step("b", after=("a",)))
        wanted = [Declaration("p", steps), Progress("p", ("a",)), Progress("p", (), ("a",)), Progress("p", ("b",))]
        self.assertEqual(said, wanted)
        self.assertEqual(self.heard.all[-1].kind, "COMPLETION")

    def test_what_a_step_shares_is_said_by_type_and_by_tokens(self):
        step = Step("a", shares="TOOL_DEFINITION", shared=("boss", 0, 512))
        shared = wire.message(9, wire.text(1, "boss") + wire.number(3, 512))
        self.assertEqual(step.encode(), wire.text(1, "a") + wire.number(8, 2) + shared)
        said = {"step_id": "a", "shares": "TOOL_DEFINITION", "shared_context": {"program_id": "boss", "end_token": 512}}
        self.assertEqual(step.json(), said)
        with self.assertRaises(ValueError):
            order.checked([Step("a", shares="DANCE")])

    def test_steps_that_cannot_be_are_refused(self):
        run = kvtier_agents.program("p", id="p", signals=self.heard)
        for steps, said in (
            ((), "1 to 4096"),
            ((Step("a"), Step("a")), "one id"),
            ((Step("a", after=("b",)),), "waits for 'b'"),
        ):
            with self.assertRaisesRegex(ValueError, said):
                run.declare(*steps)
        self.assertEqual(self.heard.all, [])

    def test_messages_are_those_of_the_protocol(self):
        step = Step("b", ("a", "c"), expected=1.5, tool_gap=0.25, tokens=300, kind="k", program="p/x")
        after = b"\x1a\x01a\x1a\x01c"
        encoded = b"\x0a\x01b\x12\x03p/x" + after + b"\x20\xdc\x0b\x28\xfa\x01\x30\xac\x02\x3a\x01k"
        self.assertEqual(step.encode(), encoded)
        declared = Declaration("p", (step,)).encode()
        self.assertEqual(declared, b"\x0a\x01p\x1a" + bytes([len(encoded)]) + encoded)
        self.assertEqual(Progress("p", ("a",), ("b",)).encode(), b"\x0a\x01p\x1a\x01a\x22\x01b")

    def test_the_command_is_run_where_there_is_no_grpc(self):
        with tempfile.TemporaryDirectory() as folder:
            command, said = Path(folder) / "kvtier", Path(folder) / "said"
            command.write_text(f'#!/bin/sh\necho "$@" >> {said}\ncat >> {said}\n')
            command.chmod(command.stat().st_mode | stat.S_IXUSR)
            carrier = CommandCarrier(str(command))
            self.assertEqual(carrier.send(Declaration("p", (Step("a", expected=2.0),)), 1.0), "APPLIED")
            carrier.send(Progress("p", ("a",), ("b",)), 1.0)
            lines = said.read_text().splitlines()
        self.assertEqual(lines[0], "--json --timeout 1000ms graph declare -")
        text, tail = lines[1].split("}--json", 1)
        wanted = {"program_id": "p", "steps": [{"step_id": "a", "expected_ms": 2000}]}
        self.assertEqual(json.loads(text + "}"), wanted)
        self.assertEqual(tail, " --timeout 1000ms graph progress --began=a --ended=b -- p")

    def test_requests_do_not_carry_declarations(self):
        sender = Signals(RequestCarrier())
        self.assertFalse(sender.send(Progress("p", ("a",))) and sender.carried())
        self.assertIsNone(sender.carried())


class Orders(unittest.TestCase):
    def test_what_is_next_is_read(self):
        said = {"program_id": "p/x", "step_id": "s", "graph": "p", "rank_ms": 7, "priority": 1 << 40}
        first = next_step(**said, reason="why", running=1)
        asked = Asked(reply(first, next_step(program_id="q", priority=(1 << 64) - 5)))
        steps = asked.next(["p/x", "q"], limit=2, running=True)
        wanted = NextStep("p/x", "s", "p", rank_ms=7, priority=1 << 40, reason="why", running=True)
        self.assertEqual(steps, [wanted, NextStep("q", priority=-5)])
        self.assertEqual(asked.asked, [(b"\x0a\x03p/x\x0a\x01q\x18\x02\x20\x01", order.DEADLINE_SECONDS)])

    def test_a_program_has_the_priority_of_its_most_urgent_step(self):
        steps = [next_step(program_id=p, priority=n) for p, n in (("p", 9), ("p", 4), ("other", 1))]
        asked = Asked(reply(*steps))
        self.assertEqual(asked.priority("p"), 4)
        self.assertIsNone(Asked(reply()).priority("p"))
        with kvtier_agents.program("p", id="p", signals=Heard()) as run:
            placer = OrderedPlacer(LocalPlacer(), asked)
            self.assertEqual(placer.place(run, ["s"]).priority, 4)
            self.assertIsNone(placer.place(None, ["s"]).priority)
            placer.began("s")
            placer.ended("s", True)

    def test_whatever_goes_wrong_is_no_answer(self):
        for says in (OSError("gone"), b"\xff", reply(wire.number(1, 7) + b"\x0b"), reply(wire.text(6, "no number"))):
            asked = Asked(says)
            self.assertIsNone(asked.priority("p"), says)
            self.assertEqual(asked.counts["failed"], 1)
            self.assertIsNone(asked.next())
            self.assertEqual((len(asked.asked), asked.counts["away"]), (1, 1), "it is left alone for a while")
            asked._away = time.monotonic()
            self.assertIsNone(asked.next())
            self.assertEqual(len(asked.asked), 2)

    def test_over_grpc(self):
        try:
            import grpc
        except ImportError:
            self.skipTest("grpcio is not installed")
        from concurrent.futures import ThreadPoolExecutor

        heard = []
        says = reply(next_step(program_id="p", priority=3))

        class Service(grpc.GenericRpcHandler):
            def service(self, details):
                def answer(data, _):
                    heard.append((details.method, data))
                    return says if details.method.endswith("/NextSteps") else b"\x08\x01"

                return grpc.unary_unary_rpc_method_handler(answer)

        server = grpc.server(ThreadPoolExecutor(1), handlers=[Service()])
        address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        sender = kvtier_agents.connect(address)
        with kvtier_agents.program("p", id="p", signals=sender) as run:
            run.declare(Step("a"))
            with run.step("a"):
                pass
        self.assertTrue(sender.flush(10))
        methods = [method.rpartition("/")[2] for method, _ in heard]
        self.assertEqual(methods, ["Declare", "Progress", "Progress", "Signal"])
        self.assertEqual(dict(sender.counts), {"applied": 4})
        self.assertEqual(Order(address, seconds=10).priority("p"), 3)
        server.stop(None).wait()
        began = time.monotonic()
        self.assertIsNone(Order(address).priority("p"))
        self.assertLess(time.monotonic() - began, 2)
        sender.close()


if __name__ == "__main__":
    unittest.main()
