"""The scheduler side's state machine over a fake session."""

from __future__ import annotations

import json
import time
import unittest
from types import SimpleNamespace
from unittest import mock

from support import BLOCK, Bench, request

from kvtier import request as request_module
from kvtier._native import FRAME_BYTES, TRANSFER_BYTES, NativeError
from kvtier.metadata import WorkerReport


class Loads(unittest.TestCase):
    def test_a_lookup_is_awaited_and_claimed_and_released_once(self):
        bench = Bench(lookup_polls=2)
        req = request("r", 64)
        bench.store(req, range(3))
        bench.side.on_new_request(req)
        self.assertEqual(bench.side.matched(req, 0), (None, False))
        self.assertEqual(bench.side.matched(req, 0), (None, False))
        self.assertEqual(bench.side.matched(req, 0), (48, True))
        bench.allocate(req, 48, external=48)
        (task,) = bench.step({}).loads
        self.assertEqual([index for _, index, _ in task.blocks], [0, 1, 2])
        self.assertEqual(len(task.transfers[0]), 3 * TRANSFER_BYTES)
        self.assertEqual(bench.session.released, [])
        bench.side.update(None, {"r"}, set())
        self.assertEqual(bench.session.released, [("r", 0, 48, 0)])
        bench.side.allocated(req, bench.blocks["r"], 0)
        self.assertFalse(bench.side.finished(req, bench.blocks["r"]))
        self.assertEqual(len(bench.session.released), 1)

    def test_an_answer_that_does_not_come_is_a_miss_after_the_deadline(self):
        bench = Bench(lookup_polls=10**9, lookup_timeout_ms=50)
        req = request("r", 64)
        bench.side.on_new_request(req)
        self.assertEqual(bench.side.matched(req, 0), (None, False))
        late = time.monotonic() + 0.2
        with mock.patch.object(request_module.time, "monotonic", return_value=late):
            self.assertEqual(bench.side.matched(req, 0), (0, False))
            self.assertEqual(bench.side.matched(req, 0), (0, False))
        bench.allocate(req, 64)
        self.assertEqual([r[0] for r in bench.session.released], ["r"])

    def test_sync_loads_leave_a_token_and_async_loads_do_not(self):
        for async_load, want in ((True, 64), (False, 48)):
            bench = Bench(async_load=async_load)
            req = request("r", 64)
            bench.store(req, range(4))
            self.assertEqual(bench.side.matched(req, 0), (want, async_load))

    def test_windows_leave_a_token_and_load_only_what_is_in_place(self):
        bench = Bench(windows=(0, 20))
        req = request("r", 80)
        bench.store(req, range(5))
        self.assertEqual(bench.side.matched(req, 0), (64, True))
        ids = ([1, 2, 3, 4], [0, 0, 7, 8])
        bench.side.allocated(req, ids, 64)
        (task,) = bench.step({}).loads
        self.assertEqual([(g, i) for g, i, _ in task.blocks], [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3)])
        self.assertEqual(task.missing, [])

    def test_a_promised_block_that_is_gone_fails_its_load(self):
        bench = Bench(windows=(0, 20))
        req = request("r", 80)
        bench.store(req, range(5))
        bench.side.matched(req, 0)
        for path in bench.session.store.iterdir():
            path.unlink()
        bench.side.allocated(req, ([11, 12, 13, 14], [0, 0, 17, 18]), 64)
        (task,) = bench.step({}).loads
        self.assertEqual((task.blocks, len(task.missing)), ([], 6))

    def test_an_error_while_claiming_still_orders_a_load_that_fails(self):
        bench = Bench()
        req = request("r", 64)
        bench.store(req, range(4))
        bench.side.matched(req, 0)
        with mock.patch.object(bench.side._lookups, "claim", side_effect=RuntimeError("ours")):
            bench.allocate(req, 64, external=64)
        (task,) = bench.step({}).loads
        self.assertEqual((task.request_id, task.blocks, len(task.missing)), ("r", [], 4))

    def test_a_failed_request_is_not_looked_up_again_and_its_blocks_are_left_out_for_others(self):
        bench = Bench()
        req = request("r", 64)
        bench.store(req, range(4))
        bench.side.matched(req, 0)
        bench.allocate(req, 64, external=64)
        bench.side.update(WorkerReport(lost={"r": [(0, 2)]}, corrupt={"r": [(0, 2)]}), {"r"}, set())
        self.assertEqual(bench.session.released, [("r", 0, 64, 32)])
        self.assertEqual(bench.side.matched(req, 0), (0, False))
        other = request("s", 64)
        self.assertEqual(bench.side.matched(other, 0), (32, True))
        later = time.monotonic() + 60
        with mock.patch.object(request_module.time, "monotonic", return_value=later):
            self.assertEqual(bench.side.matched(request("t", 64), 0), (64, True))

    def test_what_was_lost_is_asked_for_again_before_what_was_corrupt(self):
        bench = Bench()
        req = request("r", 80)
        bench.store(req, range(5))
        bench.side.matched(req, 0)
        bench.allocate(req, 80, external=80)
        bench.side.update(WorkerReport(lost={"r": [(0, 1), (0, 3)]}, corrupt={"r": [(0, 3)]}), {"r"}, set())
        for after, tokens in ((0, 16), (10, 48), (60, 80)):
            at = time.monotonic() + after
            with mock.patch.object(request_module.time, "monotonic", return_value=at):
                self.assertEqual(bench.side.matched(request(f"after {after}", 80), 0), (tokens, True))

    def attached(self, bench, *states):
        """The ranks tell their states."""
        bench.side.update(WorkerReport(states=dict(enumerate(states))), set(), set())

    def test_nothing_is_offered_while_a_rank_is_not_attached(self):
        bench = Bench()
        req = request("r", 64)
        bench.store(req, range(4))
        there = ("attached", "")
        with self.assertLogs("vllm.kvtier", "WARNING") as logs:
            for _ in range(3):
                self.attached(bench, there, ("absent", "no daemon at /s"))
        (line,) = logs.output
        self.assertIn("rank 1 is absent (no daemon at /s): see that kvtierd runs", line)
        bench.side.on_new_request(req)
        self.assertEqual(bench.side.matched(req, 0), (0, False))
        self.assertEqual(bench.session.calls, [])
        with self.assertLogs("vllm.kvtier", "WARNING") as logs:
            self.attached(bench, there, ("refused", "another layout"))
        self.assertIn("another layout", logs.output[0])
        with self.assertLogs("vllm.kvtier", "INFO") as logs:
            self.attached(bench, there, there)
        self.assertIn("rank 1 is attached again", logs.output[0])
        self.assertEqual(bench.side.matched(req, 0), (64, True))
        with self.assertLogs("vllm.kvtier", "WARNING"):
            self.attached(bench, there, ("absent", ""))

    def test_ranks_that_told_nothing_are_believed_to_be_attached(self):
        bench = Bench(ranks=2)
        req = request("r", 64)
        bench.store(req, range(4))
        self.attached(bench, ("attached", ""))
        self.assertEqual(bench.side.matched(req, 0), (64, True))

    def test_after_a_pause_a_request_lets_the_ranks_tell_that_they_are_back(self):
        bench = Bench()
        req, late = request("r", 64), request("s", 64)
        bench.store(req, range(4))
        self.attached(bench, ("absent", ""))
        at = time.monotonic() + 60
        with mock.patch.object(request_module.time, "monotonic", side_effect=lambda: at):
            self.assertEqual(bench.side.matched(req, 0), (None, False))
            self.assertEqual(bench.side.matched(late, 0), (None, False))
            self.attached(bench, ("attached", ""))
            self.assertEqual(bench.side.matched(req, 0), (64, True))
            # Attached no more; the step that passes says nothing new, or does not come.
            self.attached(bench, ("absent", ""))
            self.assertEqual(bench.side.matched(late, 0), (0, False))
            at += 60
            last = request("t", 64)
            self.assertEqual(bench.side.matched(last, 0), (None, False))
            at += 0.06
            self.assertEqual(bench.side.matched(last, 0), (0, False))

    def test_an_abort_while_loading_keeps_the_lookup_until_the_workers_are_done(self):
        bench = Bench()
        req = request("r", 64)
        bench.store(req, range(4))
        bench.side.matched(req, 0)
        ids = bench.allocate(req, 64, external=64)
        bench.step({})
        req.status.name = "FINISHED_ABORTED"
        self.assertFalse(bench.side.finished(req, ids))
        self.assertEqual(bench.session.released, [])
        bench.side.update(None, {"r"}, set())
        self.assertEqual(len(bench.session.released), 1)
        self.assertEqual(bench.side._requests, {})

    def test_preempted_requests_are_looked_up_again_a_few_times(self):
        bench = Bench()
        req = request("r", 64)
        bench.store(req, range(4))
        for _ in range(20):
            tokens, _ = bench.side.matched(req, 0)
            bench.allocate(req, 64, external=tokens)
            bench.step({})
            bench.side.update(None, {"r"} if tokens else set(), set())
            req.num_preemptions += 1
        self.assertEqual(len([c for c in bench.session.calls if c[0] == "lookup"]), 8)
        self.assertEqual(len(bench.session.released), 8)

    def test_adapters_are_left_alone(self):
        bench = Bench()
        req = request("r", 64, lora_request=object())
        bench.store(req, range(4))
        bench.side.on_new_request(req)
        self.assertEqual(bench.side.matched(req, 0), (0, False))
        bench.allocate(req, 64)
        self.assertEqual(bench.step({"r": 64}).saves, [])
        self.assertEqual(bench.session.calls, [])


class Saves(unittest.TestCase):
    def shipped(self, meta):
        return [len(task.durable[0]) // TRANSFER_BYTES for task in meta.saves]

    def test_only_complete_blocks_are_saved_and_each_once(self):
        bench = Bench(options={"load": False})
        req = request("r", 100)
        bench.allocate(req, 100)
        self.assertEqual(self.shipped(bench.step({"r": 40}, [req])), [2])
        self.assertEqual(self.shipped(bench.step({"r": 60}, [req])), [4])
        for token in range(28):
            req.num_tokens += 1
            if req.num_tokens % BLOCK == 0:
                req.block_hashes.append(bytes([token]) * 32)
            bench.blocks["r"][0][:] = range(1, 2 + req.num_tokens // BLOCK)
            meta = bench.step({"r": 1}, [req])
            complete = req.num_tokens % BLOCK == 0
            self.assertEqual(self.shipped(meta), [1] if complete else [])

    def test_what_was_loaded_is_not_saved(self):
        bench = Bench()
        req = request("r", 96)
        bench.store(req, range(4))
        self.assertEqual(bench.side.matched(req, 0), (64, True))
        bench.allocate(req, 64, external=64)
        bench.step({})
        bench.side.update(None, {"r"}, set())
        req.num_computed_tokens = 64
        bench.allocate(req, 96)
        self.assertEqual(self.shipped(bench.step({"r": 32}, [req])), [2])

    def test_a_late_answer_ships_later_and_a_finished_request_waits_for_it_shortly(self):
        bench = Bench(reserve_polls=2)
        req = request("r", 32)
        ids = bench.allocate(req, 32)
        self.assertEqual(self.shipped(bench.step({"r": 32}, [req])), [])
        self.assertTrue(bench.side.finished(req, ids))
        meta = bench.step({})
        self.assertEqual((self.shipped(meta), meta.drained), ([], []))
        meta = bench.step({})
        self.assertEqual((self.shipped(meta), meta.drained), ([2], ["r"]))
        self.assertEqual(bench.step({}).drained, [])
        bench.side.update(WorkerReport(batches={1: 1}), set(), {"r"})
        self.assertEqual((list(bench.side._drains.all()), bench.side._requests), ([], {}))

    def test_the_grace_of_a_finished_request_ends(self):
        bench = Bench(reserve_polls=10**9, finish_grace_ms=50)
        req = request("r", 32)
        ids = bench.allocate(req, 32)
        bench.step({"r": 32}, [req])
        self.assertTrue(bench.side.finished(req, ids))
        later = time.monotonic() + 0.2
        with mock.patch.object(request_module.time, "monotonic", return_value=later):
            self.assertEqual(bench.step({}).drained, ["r"])

    def test_a_finished_request_without_saves_under_way_is_let_go(self):
        bench = Bench()
        req = request("r", 32)
        ids = bench.allocate(req, 32)
        bench.step({"r": 32}, [req])
        bench.side.update(WorkerReport(batches={1: 1}), set(), set())
        self.assertFalse(bench.side.finished(req, ids))

    def test_all_ranks_must_have_copied(self):
        bench = Bench(shards=2, ranks=2)
        req = request("r", 32)
        ids = bench.allocate(req, 32)
        (task,) = bench.step({"r": 32}, [req]).saves
        self.assertEqual([len(part) for part in task.durable], [2 * TRANSFER_BYTES] * 2)
        bench.side.update(WorkerReport(batches={1: 1}), set(), set())
        self.assertTrue(bench.side.finished(req, ids))

    def test_aborted_requests_give_their_frames_up(self):
        bench = Bench()
        req = request("r", 64)
        ids = bench.allocate(req, 64)
        bench.step({"r": 20}, [req])
        bench.side.update(WorkerReport(batches={1: 1}), set(), set())
        req.status.name = "FINISHED_ABORTED"
        self.assertFalse(bench.side.finished(req, ids))
        self.assertEqual([len(f) for f in bench.session.abandoned], [FRAME_BYTES] * 3)

    def test_answers_for_nobody_are_swept_up(self):
        bench = Bench(reserve_polls=1)
        req = request("r", 64)
        ids = bench.allocate(req, 64)
        req.status.name = "FINISHED_ABORTED"
        self.assertFalse(bench.side.finished(req, ids))
        bench.step({})
        bench.step({})
        self.assertEqual(len(bench.session.abandoned), 4)

    def test_a_preempted_request_starts_over(self):
        bench = Bench()
        req = request("r", 64)
        bench.allocate(req, 64)
        bench.step({"r": 32}, [req])
        req.num_preemptions, req.num_computed_tokens = 1, 0
        meta = bench.step({}, preempted={"r"})
        self.assertEqual(meta.preempted, {"r"})
        self.assertEqual(len(bench.session.abandoned), 2)
        bench.allocate(req, 64)
        self.assertEqual(self.shipped(bench.step({"r": 64}, [req])), [4])

    def test_nothing_is_saved_that_stands_on_an_unconfirmed_load(self):
        bench = Bench(async_load=False)
        req, other = request("r", 64), request("s", 64)
        bench.store(req, range(2))
        self.assertEqual(bench.side.matched(req, 0), (32, False))
        ids = bench.allocate(req, 64, external=32)
        req.num_computed_tokens = 32
        # Another request shares the blocks that are being loaded.
        bench.blocks["s"] = ([*ids[0][:2], 91, 92],)
        other.num_computed_tokens = 32
        bench.side.allocated(other, bench.blocks["s"], 0)
        self.assertEqual(self.shipped(bench.step({"r": 32, "s": 32}, [req, other])), [])
        bench.side.update(WorkerReport(sync_loads={"r": [(0, 1)]}), set(), set())
        # vLLM recomputes from the block that failed on.
        req.num_computed_tokens = 16
        meta = bench.step({"r": 16}, [req])
        by_request = {task.request_id: len(task.durable[0]) // TRANSFER_BYTES for task in meta.saves}
        self.assertEqual(by_request.get("r", 0), 0)
        self.assertEqual(self.shipped(bench.step({"r": 32}, [req])), [2])

    def test_blocks_out_of_their_window_are_given_up(self):
        bench = Bench(windows=(0, 20), options={"load": False})
        req = request("r", 64)
        bench.allocate(req, 64)
        bench.blocks["r"] = (bench.blocks["r"][0], [0, 0, *bench.blocks["r"][1][2:]])
        (task,) = bench.step({"r": 64}, [req]).saves
        self.assertEqual((len(task.durable[0]), len(task.volatile[0])), (4 * TRANSFER_BYTES, 2 * TRANSFER_BYTES))
        self.assertEqual(len(bench.session.abandoned), 2)

    def test_hints_go_once_by_themselves_and_with_lookups_and_blocks(self):
        bench = Bench()
        req = request("r", 64, kv_transfer_params={"program_id": "x", "semantic": "DOCUMENT"})
        bench.side.on_new_request(req)
        bench.allocate(req, 64)
        ((name, hints),) = bench.session.hinted
        self.assertEqual((name, json.loads(hints.text)["params"]["program_id"]), ("r", "x"))
        reserves = [call[1:] for call in bench.session.calls if call[0] == "reserve"]
        self.assertEqual(reserves, [(0, 0, 4, hints.text)])
        self.assertEqual([c[2] for c in bench.session.calls if c[0] == "lookup"], [hints.text])

    def test_the_response_tells_what_became_of_hints(self):
        bench = Bench()
        row = {"action_id": "a", "action_type": "kv.retain", "outcome": "CLIPPED", "reason": "at most 1 h"}
        told, silent, plain = request("t", 32, session_id="s"), request("u", 32, session_id="s"), request("v", 32)
        for req in (told, silent, plain):
            bench.side.on_new_request(req)
        bench.session.outcomes["t"] = [row]
        self.assertEqual(bench.side.outcomes(told), {"kvtier": {"outcomes": [row]}})
        self.assertEqual(bench.side.outcomes(silent), {"kvtier": {"outcomes": [], "unanswered": True}})
        self.assertIsNone(bench.side.outcomes(plain))
        bench.side.finished(told, ([],))
        self.assertIsNone(bench.side.outcomes(told))

    def test_the_end_is_told_where_the_client_said_when_it_is_back(self):
        bench = Bench()
        says = request("r", 32, kv_transfer_params={"program_id": "p", "expected_resume": 5})
        silent = request("s", 32, kv_transfer_params={"program_id": "p"})
        aborted = request("a", 32, kv_transfer_params={"program_id": "p", "expected_resume": 5})
        aborted.status = SimpleNamespace(name="FINISHED_ABORTED")
        for req in (says, silent, aborted):
            bench.side.on_new_request(req)
        self.assertEqual(len(bench.session.hinted), 3)
        for req in (says, silent, aborted):
            bench.side.finished(req, ([],))
        ((name, hints),) = bench.session.hinted[3:]
        said = json.loads(hints.text)
        self.assertEqual((name, said["finished"], said["params"]["expected_resume"]), ("r", True, 5))

    def test_a_failing_session_costs_the_hints_only(self):
        bench = Bench()
        req = request("r", 64, session_id="s")
        with mock.patch.object(bench.session, "hints_submit", side_effect=NativeError("hints", -6)):
            bench.side.on_new_request(req)
        self.assertEqual([c[0] for c in bench.session.calls], ["lookup"])

    def test_a_new_namespace_drops_what_was_computed_before(self):
        bench = Bench()
        req = request("r", 64)
        bench.allocate(req, 64)
        bench.side.switch_namespace()
        meta = bench.step({"r": 64}, [req])
        self.assertEqual((meta.saves, len(meta.revision)), ([], 32))
        self.assertEqual(len(bench.session.abandoned), 4)
        bench.side.update(WorkerReport(weights_epoch=1), set(), set())
        later = bench.step({})
        self.assertNotEqual(later.revision, meta.revision)
        self.assertEqual(later.weights_epoch, 1)


if __name__ == "__main__":
    unittest.main()
