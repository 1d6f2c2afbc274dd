"""The connector in a worker's process: hands copies to the library and reports when they ended.

Lifetimes: a load is reported once all its copies ended or were never begun, once; a finished request is reported sent
once, after the copies of all its saves ended; blocks that vLLM may reuse in a step are not being read when it begins.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvtier import weights
from kvtier._native import CORRUPT, DONE, TRANSFER_BYTES, NativeError
from kvtier.config import Config
from kvtier.guard import report
from kvtier.metadata import LoadTask, SaveTask, StepMeta, WorkerReport, frames_of
from kvtier.session import Session

logger = logging.getLogger("vllm.kvtier")

# A started copy is a memory copy: it ends. This is how long we believe so before the session is given up.
_COPY_END_MS = 30_000
# How long a step may wait, in all, for copies out of blocks that it may overwrite, before those not begun are given up.
# What they would have saved is a later miss; the wait is felt by every request of the step.
_VOLATILE_WAIT_MS = 50
# How often the scheduler side is told the state of the session, though nothing changed.
_TELL_PERIOD_S = 2.0


def save_settings(config: Config, zeroes: bool) -> Config:
    """The settings to save by, given whether vLLM zeroes the blocks it hands out. It may do so before it lets us end
    the copies out of them, so that no copy may outlast its step."""
    if not zeroes or not config.async_save:
        return config
    logger.info("kvtier: vLLM zeroes new blocks of this model: saves end within their step, async_save is not followed")
    return replace(config, async_save=False)


@dataclass
class _SaveJob:
    """Copies out of blocks that are under way."""

    job: int
    count: int
    request_id: str
    batch: int
    volatile: bool


@dataclass
class _LoadJob:
    """Copies into blocks that are under way; no job when nothing could be started."""

    task: LoadTask
    job: int | None
    cancel_at: float
    cancelled: bool = False


class WorkerSide:
    """Loads and saves of one rank."""

    def __init__(self, session: Session, shard: int, writer: bool, single_group: bool, config: Config) -> None:
        self._session = session
        self._shard = shard
        # Of the ranks that hold identical KV, one saves.
        self._writer = writer
        self._single_group = single_group
        self._config = config
        # The engine's stream: copies come after what it was given. Without a device there is none.
        self.stream: Callable[[], int] = lambda: 0
        # Waits until the engine's stream has done what it was given.
        self.settle: Callable[[], None] = lambda: None
        self.rank = 0
        # The namespace revision the session is at.
        self.revision = ""
        self._saves: list[_SaveJob] = []
        self._loads: list[_LoadJob] = []
        self._drained: set[str] = set()
        self._invalid_blocks: set[int] = set()
        self._report = WorkerReport()
        # The state last told, and when to tell it again.
        self._told, self._tell_at = ("", ""), 0.0
        self._broken = False
        self.counters = {"loaded": 0, "load_failed": 0, "saved": 0, "save_failed": 0}

    def before_step(self, meta: StepMeta) -> None:
        """`handle_preemptions`: ends copies out of blocks that this step may overwrite."""
        try:
            if meta.revision != self.revision:
                self._session.switch_namespace(meta.revision)
                self.revision = meta.revision
        except Exception:
            report("switch_namespace")
        try:
            self._end_before(meta)
        except Exception:
            report("handle_preemptions")
            self._give_up("saves could not be ended")

    def _end_before(self, meta: StepMeta) -> None:
        """Ends copies out of blocks that the step may overwrite: what is not begun shortly never begins."""
        ending = [save for save in self._saves if save.request_id in meta.preempted and not save.volatile]
        for save in ending:
            self._quietly(self._session.job_cancel, save.job)
        volatile = [save for save in self._saves if save.volatile]
        if volatile:
            # The copies cannot begin before the last step is computed: that wait is not theirs.
            self.settle()
        until = time.monotonic() + _VOLATILE_WAIT_MS / 1000
        for save in volatile:
            results = self._results(save, until)
            if results is not None:
                self._saved(save, results)
                continue
            self._quietly(self._session.job_cancel, save.job)
            ending.append(save)
        until = time.monotonic() + _COPY_END_MS / 1000
        for save in ending:
            self._end_begun(save, self._results(save, until))

    def _results(self, save: _SaveJob, until: float) -> bytes | None:
        """A save's results; None when it is not over by then."""
        left_ms = max(0, round((until - time.monotonic()) * 1000))
        try:
            return self._session.job_wait(save.job, save.count, left_ms)
        except NativeError as error:
            logger.warning("kvtier: job %d: %s", save.job, error)
            return bytes(save.count)

    def _quietly(self, call, *arguments) -> None:
        try:
            call(*arguments)
        except NativeError as error:
            logger.debug("%s", error)

    def _end_save(self, save: _SaveJob) -> None:
        """Waits until a save's copies ended."""
        self._end_begun(save, self._wait(save.job, save.count, self._config.save_timeout_ms))

    def _end_begun(self, save: _SaveJob, results: bytes | None) -> None:
        """Books a cancelled save; without results, copies that had begun did not end."""
        if results is None:
            # Its blocks are about to be overwritten: what it copies must never be sealed.
            self._give_up(f"a save of {save.request_id} did not end")
            results = bytes(save.count)
        self._saved(save, results)

    def _wait(self, job: int, count: int, timeout_ms: int) -> bytes | None:
        """The job's results; past the timeout it is cancelled and what has begun is waited for."""
        try:
            results = self._session.job_wait(job, count, timeout_ms)
            if results is None:
                self._session.job_cancel(job)
                results = self._session.job_wait(job, count, _COPY_END_MS)
            return results
        except NativeError as error:
            logger.warning("kvtier: job %d: %s", job, error)
            return bytes(count)

    def _give_up(self, why: str) -> None:
        if not self._broken:
            self._broken = True
            logger.error("kvtier: %s; this worker goes on without the cache", why)
            self._session.close(0)

    def load(self, meta: StepMeta) -> None:
        """`start_load_kv`: starts this step's loads, and ends the synchronous ones."""
        started = [self._start_load(task, meta) for task in meta.loads]
        self._loads.extend(load for load in started if not load.task.sync)
        for load in started:
            if load.task.sync:
                self._loaded(load.task, self._end_load(load))

    def _end_load(self, load: _LoadJob) -> bytes | None:
        """Waits until a synchronous load's copies ended. What cannot be told has failed: vLLM reads the blocks next."""
        try:
            return self._wait(load.job, len(load.task.blocks), self._config.load_timeout_ms) if load.job else None
        except Exception:
            report("load")
            return None

    def _start_load(self, task: LoadTask, meta: StepMeta) -> _LoadJob:
        cancel_at = time.monotonic() + self._config.load_timeout_ms / 1000 + 1.0
        # One missing block fails the whole load where failures are not reported by block.
        pointless = bool(task.missing) and not self._single_group
        if pointless or not task.blocks or weights.epoch() > meta.weights_epoch:
            return _LoadJob(task, None, cancel_at)
        try:
            transfers, timeout_ms = task.transfers[self._shard], self._config.load_timeout_ms
            job = self._session.load_submit(task.request_id, transfers, timeout_ms, self.stream())
            return _LoadJob(task, job, cancel_at)
        except Exception:
            report("load_submit")
            return _LoadJob(task, None, cancel_at)

    def _loaded(self, task: LoadTask, results: bytes | None) -> bool:
        """Books a load that ended; answers whether all of it is there."""
        results = (results or b"").ljust(len(task.blocks), b"\0")
        failed = [block for block, result in zip(task.blocks, results, strict=True) if result != DONE] + task.missing
        self.counters["loaded"] += len(task.blocks) + len(task.missing) - len(failed)
        self.counters["load_failed"] += len(failed)
        lost = [(group, index) for group, index, _ in failed]
        wrong = [block[:2] for block, result in zip(task.blocks, results, strict=True) if result == CORRUPT]
        if wrong:
            self._report.corrupt[task.request_id] = wrong
        if task.sync:
            self._report.sync_loads[task.request_id] = lost
        elif lost:
            self._report.lost[task.request_id] = lost
        if self._single_group:
            self._invalid_blocks.update(block for _, _, block in failed)
        return not failed

    def save(self, meta: StepMeta) -> None:
        """`wait_for_save`: starts this step's saves; ends them too unless saves are asynchronous."""
        for task in meta.saves:
            started = self._start_saves(task, meta)
            if not started:
                self._copied(task.batch)
            self._saves.extend(started)
            if not self._config.async_save:
                for save in started:
                    self._end_save(save)
        self._drained.update(meta.drained)

    def _start_saves(self, task: SaveTask, meta: StepMeta) -> list[_SaveJob]:
        if not self._writer:
            return []
        jobs = []
        for parts, volatile in ((task.durable, False), (task.volatile, True)):
            transfers = parts[self._shard]
            if not transfers:
                continue
            if weights.epoch() > meta.weights_epoch or self._broken:
                self._quietly(self._session.reserve_abandon, frames_of(transfers))
                continue
            try:
                job = self._session.save_submit(transfers, self._config.save_timeout_ms, self.stream())
                count = len(transfers) // TRANSFER_BYTES
                jobs.append(_SaveJob(job, count, task.request_id, task.batch, volatile))
            except Exception:
                report("save_submit")
                self._quietly(self._session.reserve_abandon, frames_of(transfers))
        return jobs

    def _saved(self, save: _SaveJob, results: bytes) -> None:
        self._saves.remove(save)
        done = results.count(DONE)
        self.counters["saved"] += done
        self.counters["save_failed"] += save.count - done
        if all(other.batch != save.batch for other in self._saves):
            self._copied(save.batch)

    def _copied(self, batch: int) -> None:
        self._report.batches[batch] = self._report.batches.get(batch, 0) + 1

    def poll(self) -> tuple[set[str], set[str], set[str]]:
        """`get_transfer_results`: requests sent, received, and those of them whose load failed."""
        for save in list(self._saves):
            results = self._poll(save.job, save.count)
            if results is not None:
                self._saved(save, results)
        received, failed = set(), set()
        for load in list(self._loads):
            results = self._poll_load(load)
            if results is None:
                continue
            self._loads.remove(load)
            received.add(load.task.request_id)
            if not self._loaded(load.task, results) and not self._single_group:
                failed.add(load.task.request_id)
        busy = {save.request_id for save in self._saves}
        sent = self._drained - busy
        self._drained &= busy
        return sent, received, failed

    def _poll(self, job: int, count: int) -> bytes | None:
        try:
            return self._session.job_wait(job, count, 0)
        except Exception:
            report("job_wait")
            return bytes(count)

    def _poll_load(self, load: _LoadJob) -> bytes | None:
        if load.job is None:
            return bytes(len(load.task.blocks))
        results = self._poll(load.job, len(load.task.blocks))
        if results is None and not load.cancelled and time.monotonic() > load.cancel_at:
            load.cancelled = True
            self._quietly(self._session.job_cancel, load.job)
        return results

    def take_invalid_blocks(self) -> set[int]:
        """`get_block_ids_with_load_errors`."""
        blocks, self._invalid_blocks = self._invalid_blocks, set()
        return blocks

    def take_report(self) -> WorkerReport | None:
        """`build_connector_worker_meta`."""
        news, self._report = self._report, WorkerReport()
        self._tell_state(news)
        epoch = weights.epoch()
        if news.is_empty() and not epoch:
            return None
        news.weights_epoch = epoch
        return news

    def _tell_state(self, news: WorkerReport) -> None:
        """Adds the session's state when it changed, and from time to time: a report may be dropped on the way."""
        try:
            state = ("closed", "this worker gave it up") if self._broken else self._session.state()
        except NativeError as error:
            state = ("closed", str(error))
        # While it is not attached with every step: the scheduler waits for such news.
        if state != self._told or state[0] != "attached" or time.monotonic() >= self._tell_at:
            self._told, self._tell_at = state, time.monotonic() + _TELL_PERIOD_S
            news.states[self.rank] = state
