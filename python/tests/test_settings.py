"""Settings."""

from __future__ import annotations

import unittest

from support import BLOCK  # noqa: F401

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


if __name__ == "__main__":
    unittest.main()
