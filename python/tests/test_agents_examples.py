"""The examples of docs/AGENTS.md, as they are written, but for where the server is."""

from __future__ import annotations

import re
import unittest
from pathlib import Path

import support  # noqa: F401 (finds the package)
from fake_server import FakeServer
from test_agents import Heard
from test_agents_transport import need

import kvtier_agents

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "AGENTS.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
# What an example needs besides openai.
NEEDS = {"kvtier_agents.langchain": "langchain_openai", "kvtier_agents.llama_index": "llama_index.llms.openai_like"}


class Examples(unittest.TestCase):
    def setUp(self):
        need("openai")
        self.server = FakeServer()
        self.addCleanup(self.server.close)
        self.addCleanup(kvtier_agents.use, None)

    def run_example(self, code: str) -> None:
        code = code.replace("http://localhost:8000", self.server.url)
        exec(compile(code, str(DOCUMENT), "exec", dont_inherit=True), {"__name__": "example"})

    def test_every_example_of_the_document_runs(self):
        self.assertGreaterEqual(len(EXAMPLES), 7)
        self.run_examples([code for code in EXAMPLES if not any(name in code for name in NEEDS)])

    def test_examples_with_langchain_run(self):
        need(NEEDS["kvtier_agents.langchain"])
        self.run_examples([code for code in EXAMPLES if "kvtier_agents.langchain" in code])

    def test_examples_with_llama_index_run(self):
        need(NEEDS["kvtier_agents.llama_index"])
        self.run_examples([code for code in EXAMPLES if "kvtier_agents.llama_index" in code])

    def run_examples(self, examples: list[str]) -> None:
        self.assertTrue(examples)
        for code in examples:
            with self.subTest(code):
                heard, before = Heard(), len(self.server.requests)
                kvtier_agents.use(heard)
                self.run_example(code)
                if "localhost:8000" in code:
                    hinted = ["vllm_xargs" in request[2] for request in self.server.requests[before:]]
                    self.assertTrue(hinted and all(hinted), "its requests say something")
                    self.assertIn("COMPLETION", [signal.kind for signal in heard.all])

    def test_the_first_example_says_what_its_comments_say(self):
        heard = Heard()
        kvtier_agents.use(heard)
        self.run_example(EXAMPLES[0])
        kinds = ["TOOL_WAIT", "CONTINUATION", "FORK", "CANCELLATION", "JOIN", "COMPLETION"]
        self.assertEqual([signal.kind for signal in heard.all], kinds)


if __name__ == "__main__":
    unittest.main()
