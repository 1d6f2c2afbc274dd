"""What a session hands to the library, without it."""

from __future__ import annotations

import unittest

import support  # noqa: F401

from kvtier.session import _request_id


class Ids(unittest.TestCase):
    def test_ids_that_the_daemon_takes_are_handed_on(self):
        for name in ("r", "x" * 256, "ä" * 128):
            self.assertEqual(_request_id(name), name.encode())

    def test_long_ids_are_shortened_and_stay_apart(self):
        ids = [("ä" * 300) + end for end in ("a", "b")] + ["x" * 257, "x" * 5000]
        short = [_request_id(name) for name in ids]
        self.assertEqual(len(set(short)), 4)
        self.assertEqual(short, [_request_id(name) for name in ids])
        for text in short:
            self.assertLessEqual(len(text), 256)
            text.decode()


if __name__ == "__main__":
    unittest.main()
