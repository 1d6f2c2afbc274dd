"""Hints: gathered from every carrier, bounded, and never in the way of a request."""

from __future__ import annotations

import json
import unittest
from types import SimpleNamespace

import support  # noqa: F401 (finds the package)

from kvtier import hints


def request(**fields: object) -> SimpleNamespace:
    return SimpleNamespace(**{"num_prompt_tokens": 90, "cache_salt": None, **fields})


def envelope(*actions: tuple[str, dict]) -> dict:
    rows = [
        {"action_id": f"a{n}", "action_type": kind, "action_version": "1.0", "payload": payload}
        for n, (kind, payload) in enumerate(actions)
    ]
    return {"protocol_version": "0.1", "message_id": "m", "actions": rows}


def struct(value: object) -> object:
    """As vLLM's structs: attributes instead of keys, but for payloads."""
    actions = [SimpleNamespace(**action) for action in value["actions"]]
    return SimpleNamespace(**{**value, "actions": actions})


class Gathered(unittest.TestCase):
    def setUp(self):
        hints._warned = False

    def test_every_carrier_is_handed_on_under_its_name(self):
        given = envelope(("kv.retain", {"directives": [{"start": 0, "end": 16, "priority": 90}]}))
        xargs = {"agentic_context": '{"program_id": "p"}', "top_n": 3, "prompt_cache_retention": "24h"}
        params = {"program_id": "q", "do_remote_prefill": True, "remote_block_ids": [1, 2]}
        for kv_hints in (given, struct(given)):
            found = hints.collect(
                request(
                    kv_hints=kv_hints,
                    sampling_params=SimpleNamespace(extra_args=xargs),
                    session_id="s",
                    kv_transfer_params=params,
                    cache_salt="x",
                )
            )
            want = {
                "v": 1,
                "prompt_tokens": 90,
                "kv_hints": given,
                "xargs": {"agentic_context": '{"program_id": "p"}', "prompt_cache_retention": "24h"},
                "session_id": "s",
                "params": {"program_id": "q"},
            }
            self.assertEqual((json.loads(found.text), found.salt, found.outcomes), (want, "x", ()))

    def test_a_request_without_hints_says_nothing(self):
        for req in (
            request(),
            SimpleNamespace(),
            request(kv_hints=None, session_id="", sampling_params=None, kv_transfer_params=None),
            request(kv_transfer_params={"do_remote_prefill": True}, sampling_params=SimpleNamespace(extra_args={})),
        ):
            found = hints.collect(req)
            self.assertEqual((found.text, found.given), (b"", False))

    def test_what_cannot_be_read_is_rejected_with_one_warning(self):
        class Hostile(dict):
            def get(self, key, default=None):
                raise RuntimeError("no")

        bad = [
            request(kv_hints=7),
            request(kv_hints={"actions": 3}),
            request(kv_transfer_params={"priority": float("nan")}),
            request(kv_transfer_params={"spans": object()}),
            request(kv_transfer_params=Hostile()),
            request(session_id=object()),
            request(sampling_params=SimpleNamespace(extra_args={"kvtier": {1: {2, 3}}})),
        ]
        with self.assertLogs("vllm.kvtier") as logs:
            for req in bad:
                found = hints.collect(req)
                self.assertEqual([o["outcome"] for o in found.outcomes], ["REJECTED"], req)
                self.assertTrue(found.given)
        self.assertEqual(len(logs.records), 1)

    def test_junk_of_any_type_never_raises(self):
        junk = (7, "x", [], [None], {}, {"spans": "x"}, {"kvtier": "{"}, b"\xff", object())
        for value in junk:
            for name in ("kv_hints", "sampling_params", "session_id", "kv_transfer_params"):
                hints.collect(request(**{name: value}))
            hints.collect(request(sampling_params=SimpleNamespace(extra_args=value)))

    def test_too_much_costs_the_weakest_carriers(self):
        big = {"program_id": "p", "spans": [{"start": n, "end": n + 1, "type": "SKILL"} for n in range(3_000)]}
        found = hints.collect(request(session_id="s", kv_transfer_params=big))
        self.assertEqual(json.loads(found.text), {"v": 1, "prompt_tokens": 90, "session_id": "s"})
        self.assertEqual([o["action_type"] for o in found.outcomes], ["kv_transfer_params"])
        self.assertLessEqual(len(found.text), hints.MAX_BYTES)


if __name__ == "__main__":
    unittest.main()
