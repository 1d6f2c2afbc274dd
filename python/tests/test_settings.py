"""Settings and hints."""

from __future__ import annotations

import unittest

from support import BLOCK  # noqa: F401

from kvtier import hints
from kvtier.config import DEFAULT_SOCKET, Config


class Settings(unittest.TestCase):
    def test_defaults(self):
        self.assertEqual(Config.parse({}).socket, DEFAULT_SOCKET)
        self.assertTrue(Config.parse({"socket": "/x.sock"}).async_load)

    def test_what_is_refused_is_named(self):
        cases = [
            ({"sokcet": "/x"}, "unknown keys sokcet"),
            ({"async_load": "yes"}, "async_load must be true or false"),
            ({"lookup_timeout_ms": 0}, "lookup_timeout_ms must be 1 to"),
            ({"lookup_timeout_ms": True}, "lookup_timeout_ms must be a whole number"),
            ({"socket": "relative"}, "absolute path"),
        ]
        for extra, message in cases:
            with self.assertRaisesRegex(ValueError, message):
                Config.parse(extra)


class Hints(unittest.TestCase):
    def test_what_is_valid_is_taken(self):
        spans = [{"start": 0, "end": 10, "type": "system_prompt"}, {"start": 10, "end": 20, "type": "TOOL_RESULT"}]
        found = hints.parse({"program_id": "p", "semantic": "DOCUMENT", "spans": spans, "do_remote_prefill": True})
        self.assertEqual(found, hints.Hints("p", 7, ((0, 10, 1), (10, 20, 6))))
        self.assertEqual([found.of_block(a, a + 8) for a in (0, 8, 16, 24)], [1, 1, 6, 7])

    def test_junk_is_dropped_with_one_warning(self):
        hints._warned = False
        junk = [
            7,
            [],
            {"program_id": 3},
            {"program_id": "x" * 200},
            {"semantic": "NONSENSE"},
            {"semantic": 3},
            {"spans": "x"},
            {"spans": [None, {"start": 5, "end": 5, "type": "SKILL"}, {"start": True, "end": 9, "type": "SKILL"}]},
        ]
        with self.assertLogs("vllm.kvtier") as logs:
            self.assertEqual({hints.parse(params) for params in junk}, {hints.NO_HINTS})
        self.assertEqual(len(logs.records), 1)


if __name__ == "__main__":
    unittest.main()
