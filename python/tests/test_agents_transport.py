"""Attached clients of httpx, httpx2 and openai over real sockets: what arrives, and what never fails."""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import unittest

import support  # noqa: F401 (finds the package)
from fake_server import FakeServer
from test_agents import TALK, TOOLS, Heard

import kvtier_agents
from kvtier_agents import Placement, signals
from kvtier_agents.signals import Signal

# A busy machine costs time, not spans.
Attachment = functools.partial(kvtier_agents.Attachment, tokenize_seconds=30)
BODY = {"model": "m", "messages": TALK, "tools": TOOLS, "text": "ünïcode"}
CHAT = "/v1/chat/completions"


def need(name: str):
    """The module, or the test is skipped."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise unittest.SkipTest(f"SKIPPED: {name} is not installed") from None


class Attached:
    """Tests of a module like httpx; `post` is sync or not."""

    module_name = "httpx"
    awaited = False

    def setUp(self):
        self.module = need(self.module_name)
        self.servers = [FakeServer()]
        self.addCleanup(lambda: [server.close() for server in self.servers])

    def server(self, **how) -> FakeServer:
        self.servers.append(FakeServer(**how))
        return self.servers[-1]

    def post(self, url: str, attachment: object, body: object = BODY, **more):
        """Sends one request with a client of its own."""
        settings = {"trust_env": False, "timeout": 10}
        if not self.awaited:
            with self.module.Client(**settings) as client:
                if attachment:
                    kvtier_agents.attach(kvtier_agents.attach(client, attachment), attachment)
                return client.post(url, **({"json": body} if not more else more))

        async def send():
            async with self.module.AsyncClient(**settings) as client:
                if attachment:
                    kvtier_agents.attach(client, attachment)
                return await client.post(url, **({"json": body} if not more else more))

        return asyncio.run(send())

    def in_program(self, url: str, attachment: object, **more):
        with kvtier_agents.program("p", id="p", session="s", tolerations=["t"], signals=Heard()) as run:
            run.fork("b")
            with run.branch("b"), kvtier_agents.segment(ttl="10m"):
                return self.post(url, attachment, **more)

    def test_headers_of_agents_become_fields_of_the_body(self):
        server = self.servers[0]
        given = {"x-claude-code-session-id": "s", "x-claude-code-agent-id": "a"}
        how = {"content": json.dumps(BODY), "headers": {"content-type": "application/json", **given}}
        self.assertEqual(self.post(server.url + CHAT, Attachment(spans=None), **how).status_code, 200)
        self.assertEqual(server.said(), {"program_id": "a", "parent_program_id": "s"})
        self.assertEqual(server.requests[0][1]["x-session-id"], "s")

    def test_requests_say_who_they_are_and_what_they_mean(self):
        server, attachment = self.servers[0], Attachment(fairness=True)
        self.assertEqual(self.in_program(server.url + CHAT, attachment).status_code, 200)
        said, (path, headers, body) = server.said(), server.requests[0]
        spans = said.pop("spans")
        wanted = {"program_id": "p/b", "parent_program_id": "p", "tolerations": ["t"]}
        self.assertEqual(said, {**wanted, "type": "REASONING_BRANCH", "ttl": "10m"})
        self.assertEqual([s["type"] for s in spans], ["SYSTEM_PROMPT", "TOOL_DEFINITION", "TOOL_RESULT"])
        self.assertEqual((path, headers["x-session-id"], headers["x-llm-d-inference-fairness-id"]), (CHAT, "s", "p"))
        self.assertEqual({k: v for k, v in body.items() if k != "vllm_xargs"}, BODY)
        self.assertEqual(attachment.counts["hinted"], 1)
        asked = len(server.tokenized)
        self.in_program(server.url + CHAT, attachment)
        self.assertEqual(len(server.tokenized), asked, "places are remembered")

    def test_without_a_program_a_request_is_as_it_was(self):
        server, attachment = self.servers[0], Attachment()
        self.post(server.url + CHAT, attachment)
        self.post(server.url + "/v1/embeddings", attachment)
        self.assertEqual([r[2] for r in server.requests], [BODY, BODY])
        self.assertNotIn("x-session-id", server.requests[0][1])
        self.assertEqual(server.tokenized, [])

    def test_a_server_that_takes_no_hints_gets_the_request_as_it_was(self):
        server, attachment = self.server(refuses=True), Attachment()
        for _ in range(2):
            self.assertEqual(self.in_program(server.url + CHAT, attachment).status_code, 200)
        self.assertEqual(["vllm_xargs" in r[2] for r in server.requests], [True, False, False])
        self.assertEqual(server.requests[1][2], BODY)
        self.assertEqual((attachment.counts["resent"], attachment.counts["plain"]), (1, 2))

    def test_a_tokenizer_that_is_away_costs_the_spans_only(self):
        server, attachment = self.server(tokenizer=404), Attachment()
        for _ in range(2):
            self.in_program(server.url + CHAT, attachment)
            self.assertNotIn("spans", server.said())
        self.assertEqual(len(server.tokenized), 1, "it is left alone for a while")

    def test_whatever_fails_here_the_request_goes_out(self):
        server = self.servers[0]

        class Bad:
            def __getattr__(self, name):
                raise RuntimeError(name)

        bad = Attachment(spans=Bad())
        self.assertEqual(self.in_program(server.url + CHAT, bad).status_code, 200)
        worse = Attachment(servers=[server.url], placer=_Broken())
        self.assertEqual(self.in_program("http://nowhere.invalid" + CHAT, worse).status_code, 200)
        with self.assertLogs("kvtier_agents"):
            odd = json.dumps({**BODY, "vllm_xargs": {"kvtier": "["}}).encode()
            kind = {"content-type": "application/json"}
            self.in_program(server.url + CHAT, Attachment(), content=odd, headers=kind)
        self.assertEqual(server.requests[-1][2]["vllm_xargs"], {"kvtier": "["})
        self.in_program(server.url + CHAT, Attachment(), content=b"[1]", headers=kind)
        self.assertEqual(server.requests[-1][2], [1])

    def test_names_that_no_header_can_have_go_into_the_body(self):
        server = self.servers[0]
        for name in ("münchen", "a\nb", " x"):
            with kvtier_agents.program("p", id=name, signals=Heard()):
                self.post(server.url + CHAT, Attachment(fairness=True))
            self.assertEqual((server.said()["program_id"], server.said()["session_id"]), (name, name))
            self.assertNotIn("x-session-id", server.requests[-1][1])
        odd = json.dumps({**BODY, "text": "\ud800"}).encode()
        with self.assertLogs("kvtier_agents"):
            self.in_program(server.url + CHAT, Attachment(), content=odd, headers={"content-type": "application/json"})
        self.assertEqual(server.requests[-1][2]["text"], "\ud800")

    def test_programs_stay_on_a_server_and_leave_one_that_is_gone(self):
        servers = [self.server(), self.server()]
        attachment = Attachment(servers=[s.url for s in servers])
        for _ in range(3):
            self.in_program("http://nowhere.invalid" + CHAT, attachment)
        counts = [len(s.requests) for s in servers]
        self.assertEqual(counts, [3, 0])
        self.assertEqual(servers[0].requests[0][1]["host"], servers[0].url.removeprefix("http://"))
        servers[0].close()
        self.assertEqual(self.in_program("http://nowhere.invalid" + CHAT, attachment).status_code, 200)
        self.assertEqual((len(servers[1].requests), attachment.counts["unreached"]), (1, 1))
        self.assertEqual(+attachment.placer._under_way, {}, "nothing is under way")

    def test_without_any_server_the_error_is_httpx_s_own(self):
        gone = self.server()
        gone.close()
        for attachment in (Attachment(), Attachment(servers=[gone.url])):
            with self.assertRaises(self.module.ConnectError):
                self.in_program(gone.url + CHAT, attachment)

    def test_a_placer_sets_priorities(self):
        class Placer(_Broken):
            def place(self, program, servers):
                return Placement(servers[0], "first", priority=7)

        server = self.servers[0]
        attachment = Attachment(servers=[server.url], placer=Placer())
        self.in_program(server.url + CHAT, attachment)
        self.post(server.url + CHAT, attachment, {**BODY, "priority": 3})
        self.assertEqual([r[2]["priority"] for r in server.requests], [7, 3])


class _Broken:
    """A placer that does not work."""

    def place(self, program, servers):
        raise RuntimeError("no")

    def began(self, server):
        """Counts nothing."""

    def ended(self, server, reached):
        """Counts nothing."""


class Httpx(Attached, unittest.TestCase):
    pass


class HttpxAwaited(Attached, unittest.TestCase):
    awaited = True


class Httpx2(Attached, unittest.TestCase):
    module_name = "httpx2"


class Httpx2Awaited(Attached, unittest.TestCase):
    module_name, awaited = "httpx2", True


class OpenAi(unittest.TestCase):
    def setUp(self):
        need("openai")
        self.server = FakeServer()
        self.addCleanup(self.server.close)

    def test_answers_and_streams_of_openai_s_clients(self):
        settings = {"base_url": f"{self.server.url}/v1", "api_key": "-", "max_retries": 0}
        asked = {"model": "m", "messages": TALK}
        attachment = Attachment(servers=[self.server.url])
        client = kvtier_agents.openai_client(attachment, **settings)

        async def awaited() -> list:
            async with kvtier_agents.async_openai_client(attachment, **settings) as other:
                whole = await other.chat.completions.create(**asked)
                stream = await other.chat.completions.create(**asked, stream=True)
                return [whole.choices[0].message.content, *[c.choices[0].delta.content async for c in stream]]

        with kvtier_agents.program("p", id="p", signals=Heard()):
            whole = client.chat.completions.create(**asked).choices[0].message.content
            streamed = [c.choices[0].delta.content for c in client.chat.completions.create(**asked, stream=True)]
            self.assertEqual([whole, *streamed, *asyncio.run(awaited())], ["yes"] * 4)
        self.assertEqual({self.server.said(n)["program_id"] for n in range(4)}, {"p"})
        self.assertEqual(+attachment.placer._under_way, {}, "streams end too")

    def test_what_cannot_be_attached_is_said(self):
        with self.assertRaises(TypeError):
            kvtier_agents.attach(object())


class Grpc(unittest.TestCase):
    def test_signals_over_grpc(self):
        grpc = need("grpc")
        from concurrent.futures import ThreadPoolExecutor

        heard = []

        class Service(grpc.GenericRpcHandler):
            def service(self, details):
                if details.method == "/kvtier.v1.Programs/Signal":
                    return grpc.unary_unary_rpc_method_handler(lambda data, _: heard.append(data) or b"\x08\x07")

        server = grpc.server(ThreadPoolExecutor(1), handlers=[Service()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        sender = kvtier_agents.connect(f"http://127.0.0.1:{port}")
        self.assertIsInstance(sender.carrier, signals.GrpcCarrier)
        sender.send(Signal("COMPLETION", "p"))
        self.assertTrue(sender.flush(10))
        self.assertEqual((heard, dict(sender.counts)), ([b"\x0a\x01p\x18\x06"], {"missing": 1}))
        server.stop(None).wait()
        sender.deadline_seconds = 0.3
        sender.send(Signal("COMPLETION", "p"))
        self.assertTrue(sender.flush(10))
        self.assertEqual(sender.counts["dropped_late"], 1)
        sender.close()


    def test_placements_over_grpc(self):
        grpc = need("grpc")
        from concurrent.futures import ThreadPoolExecutor

        heard, reply = [], b"\x0a\x01b\x10\x02\x1a\x08b: 3 ms."

        class Service(grpc.GenericRpcHandler):
            def service(self, details):
                if details.method == "/kvtier.v1.Programs/Place":
                    return grpc.unary_unary_rpc_method_handler(lambda data, _: heard.append(data) or reply)

        server = grpc.server(ThreadPoolExecutor(1), handlers=[Service()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        nodes = {"http://a": "a", "http://b": "b"}
        # A busy machine costs time, not the choice.
        placer = kvtier_agents.DaemonPlacer(nodes, f"http://127.0.0.1:{port}", seconds=10)
        run = kvtier_agents.Program("p", signals=Heard())
        wanted = Placement("http://b", "kvtierd: its context is nearest there", None, "b: 3 ms.")
        self.assertEqual(placer.place(run, list(nodes)), wanted)
        self.assertTrue(heard[0].startswith(b"\x0a\x01p\x22\x03\x0a\x01a"), heard)
        server.stop(None).wait()
        gone = kvtier_agents.DaemonPlacer(nodes, f"http://127.0.0.1:{port}", seconds=10)
        self.assertEqual(gone.place(run, list(nodes)).reason, "least under way (kvtierd is away)")


del Attached

if __name__ == "__main__":
    unittest.main()
