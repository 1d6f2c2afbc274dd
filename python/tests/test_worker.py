"""The worker side over a fake session."""

from __future__ import annotations

import time
import unittest
from unittest import mock

from support import Bench, request

from kvtier import weights
from kvtier._native import CORRUPT, DONE, LOST, NativeError
from kvtier.config import Config
from kvtier.metadata import LoadTask, StepMeta, WorkerReport
from kvtier.worker import WorkerSide, save_settings


class Worker(unittest.TestCase):
    def setUp(self):
        self.bench = Bench()
        self.session = self.bench.session

    def side(self, single=True, writer=True, **settings):
        return WorkerSide(self.session, 0, writer, single, Config(**settings))

    def load(self, sync=False, missing=()):
        req = request("r", 64)
        self.bench.store(req, range(4))
        self.bench.side.matched(req, 0)
        self.bench.allocate(req, 64, external=64)
        (task,) = self.bench.step({}).loads
        task.sync = sync
        task.missing = list(missing)
        return StepMeta(loads=[task])

    def save(self, name="s"):
        req = request(name, 64, prefix=name)
        self.bench.allocate(req, 64)
        return self.bench.step({name: 64}, [req])

    def test_an_async_load_is_reported_once(self):
        side, self.session.job_polls = self.side(), 2
        side.load(self.load())
        self.assertEqual(
            [side.poll() for _ in range(4)][1:], [(set(), set(), set()), (set(), {"r"}, set()), (set(), set(), set())]
        )
        self.assertEqual(side.take_invalid_blocks(), set())

    def test_failures_are_precise_with_one_group(self):
        for sync in (False, True):
            self.setUp()
            side, self.session.lose = self.side(), {1, 3}
            meta = self.load(sync)
            side.load(meta)
            self.assertEqual(side.poll(), (set(), set() if sync else {"r"}, set()))
            bad = {block for _, index, block in meta.loads[0].blocks if index in (1, 3)}
            self.assertEqual(side.take_invalid_blocks(), bad)
            news = side.take_report()
            self.assertEqual(news.sync_loads if sync else news.lost, {"r": [(0, 1), (0, 3)]})
            self.assertEqual(side.take_invalid_blocks(), set())

    def test_failures_are_by_request_with_several_groups(self):
        side, self.session.lose = self.side(single=False), {1}
        side.load(self.load())
        self.assertEqual(side.poll(), (set(), {"r"}, {"r"}))
        self.assertEqual(side.take_invalid_blocks(), set())

    def test_a_load_that_cannot_start_is_reported_as_failed(self):
        side = self.side()
        meta = self.load()
        with mock.patch.object(self.session, "load_submit", side_effect=RuntimeError("ours")):
            side.load(meta)
        self.assertEqual(side.poll(), (set(), {"r"}, set()))
        self.assertEqual(side.take_invalid_blocks(), {block for _, _, block in meta.loads[0].blocks})

    def test_missing_blocks_fail_with_the_rest_loaded(self):
        side = self.side()
        side.load(self.load(missing=[(0, 4, 99)]))
        self.assertEqual(side.poll(), (set(), {"r"}, set()))
        self.assertEqual(side.take_invalid_blocks(), {99})

    def test_a_load_of_nothing_is_received(self):
        side = self.side()
        side.load(StepMeta(loads=[LoadTask("e", False, transfers=[b""])]))
        self.assertEqual(side.poll(), (set(), {"e"}, set()))

    def test_a_request_is_sent_when_its_copies_ended(self):
        side, self.session.job_polls = self.side(), 2
        meta = self.save()
        meta.drained = ["s"]
        side.save(meta)
        self.assertEqual([side.poll()[0] for _ in range(4)], [set(), set(), {"s"}, set()])
        self.assertEqual(side.take_report().batches, {1: 1})

    def test_of_equal_ranks_one_saves_and_all_report(self):
        side = self.side(writer=False)
        meta = self.save()
        meta.drained = ["s"]
        side.save(meta)
        self.assertEqual(side.poll()[0], {"s"})
        self.assertEqual(side.take_report().batches, {1: 1})
        self.assertNotIn("save", [call[0] for call in self.session.calls])

    def test_copies_of_preempted_requests_end_before_the_step(self):
        side, self.session.job_polls = self.side(), 5
        side.save(self.save())
        side.before_step(StepMeta(preempted={"s"}))
        self.assertIn(("cancel", 2), self.session.calls)
        self.assertEqual(side.take_report().batches, {1: 1})

    def test_copies_that_do_not_end_are_never_sealed(self):
        side = self.side()
        side.save(self.save())
        with mock.patch.object(self.session, "job_wait", return_value=None):
            side.before_step(StepMeta(preempted={"s"}))
        self.assertTrue(self.session.closed)

    def volatile(self, name="s"):
        """A step that saves blocks of a sliding window."""
        meta = self.save(name)
        for task in meta.saves:
            task.durable, task.volatile = [b""] * len(task.durable), task.durable
        return meta

    def test_a_step_waits_shortly_for_copies_out_of_blocks_it_may_overwrite(self):
        for save_timeout_ms in (10_000, 600_000):
            self.setUp()
            side = self.side(save_timeout_ms=save_timeout_ms)
            side.save(self.volatile())
            side.save(self.volatile("t"))
            count, waited = len(side._saves), []

            def job_wait(job, count, timeout_ms=0, waited=waited):
                if ("cancel", job) in self.session.calls:
                    return bytes([LOST]) * count
                waited.append(timeout_ms)
                time.sleep(timeout_ms / 1000)
                return None

            began = time.monotonic()
            with mock.patch.object(self.session, "job_wait", side_effect=job_wait):
                side.before_step(StepMeta())
            self.assertLess(time.monotonic() - began, 5)
            self.assertEqual(count, 2)
            self.assertLessEqual(sum(waited), 50)
            self.assertEqual(len([call for call in self.session.calls if call[0] == "cancel"]), 2)
            self.assertEqual((side._saves, side.counters["save_failed"]), ([], 8))
            self.assertFalse(self.session.closed)

    def test_copies_that_end_in_time_are_not_cancelled(self):
        side, self.session.job_polls, settled = self.side(), 5, []
        side.settle = lambda: settled.append(len(side._saves))
        side.save(self.volatile())
        side.before_step(StepMeta())
        self.assertEqual((side._saves, side.counters["saved"], settled), ([], 4, [1]))
        self.assertNotIn("cancel", [call[0] for call in self.session.calls])
        side.before_step(StepMeta())
        self.assertEqual(settled, [1])

    def test_volatile_copies_that_began_and_do_not_end_are_never_sealed(self):
        side = self.side()
        side.save(self.volatile())
        with mock.patch.object(self.session, "job_wait", return_value=None):
            side.before_step(StepMeta())
        self.assertTrue(self.session.closed)

    def test_where_blocks_are_zeroed_no_save_outlasts_its_step(self):
        for zeroes, left in ((False, 1), (True, 0)):
            self.setUp()
            self.session.job_polls = 5
            config = save_settings(Config(), zeroes)
            side = WorkerSide(self.session, 0, True, True, config)
            side.save(self.save())
            self.assertEqual(len(side._saves), left)
        with self.assertLogs("vllm.kvtier", "INFO"):
            save_settings(Config(), True)
        with self.assertNoLogs("vllm.kvtier", "INFO"):
            save_settings(Config(async_save=False), True)

    def test_the_sessions_state_is_told_when_it_changes_now_and_then_and_while_it_is_detached(self):
        side = self.side()
        side.rank = 3
        self.assertEqual(side.take_report().states, {3: ("attached", "")})
        self.assertIsNone(side.take_report())
        with mock.patch.object(self.session, "state", return_value=("absent", "no daemon")):
            for _ in range(2):
                self.assertEqual(side.take_report().states, {3: ("absent", "no daemon")}, "with every step")
        with mock.patch.object(self.session, "state", side_effect=NativeError("state", -3)):
            self.assertEqual(side.take_report().states[3][0], "closed")
        self.assertEqual(side.take_report().states, {3: ("attached", "")})
        self.assertIsNone(side.take_report())
        side._tell_at = 0.0
        self.assertEqual(side.take_report().states, {3: ("attached", "")}, "now and then")
        side._give_up("test")
        self.assertEqual(side.take_report().states[3][0], "closed")

    def test_corrupt_blocks_are_told_apart_from_lost_ones(self):
        side = self.side()
        side.load(self.load())
        results = bytes([DONE, CORRUPT, LOST, DONE])
        with mock.patch.object(self.session, "job_wait", return_value=results):
            side.poll()
        news = side.take_report()
        self.assertEqual((news.lost, news.corrupt), ({"r": [(0, 1), (0, 2)]}, {"r": [(0, 1)]}))

    def test_sync_saves_end_within_the_step(self):
        side, self.session.job_polls = self.side(async_save=False), 5
        side.save(self.save())
        self.assertEqual(side.take_report().batches, {1: 1})

    def test_after_a_weight_update_nothing_moves_until_the_scheduler_knows(self):
        side, load, save = self.side(), self.load(), self.save()
        with mock.patch.object(weights, "_epoch", 1):
            side.load(load)
            side.save(save)
            self.assertEqual(side.poll(), (set(), {"r"}, set()))
            self.assertEqual(len(self.session.abandoned), 4)
            self.assertEqual(side.take_report().weights_epoch, 1)
            load.weights_epoch = 1
            side.load(load)
            side.poll()
            self.assertIn("load", [call[0] for call in self.session.calls])

    def test_reports_add_up(self):
        both = WorkerReport({"a": []}, {"b": [(0, 1)]}, {1: 1}, 0).aggregate(
            WorkerReport({"a": [(0, 2)]}, {"c": []}, {1: 1, 2: 1}, 3)
        )
        self.assertEqual(both, WorkerReport({"a": [(0, 2)]}, {"b": [(0, 1)], "c": []}, {1: 2, 2: 1}, 3))
        one = WorkerReport(corrupt={"a": [(0, 1)]}, states={0: ("attached", "")})
        one.aggregate(WorkerReport(corrupt={"a": [(0, 2)]}, states={1: ("absent", "x")}))
        self.assertEqual(one.corrupt, {"a": [(0, 1), (0, 2)]})
        self.assertEqual(one.states, {0: ("attached", ""), 1: ("absent", "x")})


class Counting(unittest.TestCase):
    def test_methods_that_change_weights_are_counted_once(self):
        class Vllm:
            def reload_weights(self):
                return 7

        weights._epoch = 0
        weights.watch(Vllm)
        weights.watch(Vllm)
        self.assertEqual((Vllm().reload_weights(), weights.epoch()), (7, 1))


if __name__ == "__main__":
    unittest.main()
