"""The connector in the scheduler's process. No I/O: every hook reads local state and leaves the rest to the library.

Lifetimes that vLLM relies on: a promised asynchronous load always ends in an order to the workers, a request that
`finished` answered True for is always named in `drained` once, a lookup is always released once.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from typing import Any

from kvtier import hints as hint
from kvtier import request as req
from kvtier._native import NativeError
from kvtier.config import Config
from kvtier.drains import Drains
from kvtier.guard import guarded, report
from kvtier.lookups import Lookups
from kvtier.metadata import LoadTask, StepMeta, WorkerReport
from kvtier.request import RequestState
from kvtier.saves import SaveBook
from kvtier.session import Session
from kvtier.shape import Shape

logger = logging.getLogger("vllm.kvtier")

# How often the attachment's state is looked at, for the log.
_STATE_PERIOD_S = 2.0
# How long a new request may wait for frames, once.
_FRAMES_WAIT_S = 0.02
# How long a request may wait, once, for the workers to tell that they are attached again.
_NEWS_WAIT_S = 0.05
# What to do about a worker's session, by its state.
_REMEDIES = {
    "absent": "see that kvtierd runs on its node and that its socket is where the engine's config says",
    "refused": "mend what its daemon says",
    "closed": "restart the engine",
}


class SchedulerSide:
    """Requests of one engine and their loads and saves."""

    def __init__(self, session: Session, spec: dict, config: Config, options: dict) -> None:
        """`options`: ranks, load, save (whether each is done at all), lookahead_tokens."""
        shape = Shape.of(spec, options["ranks"])
        sync = not config.async_load and len(shape.groups) == 1
        if not config.async_load and not sync:
            logger.info("kvtier: models with several KV groups load asynchronously; async_load=false is not followed")
        self._session = session
        self._config = config
        self._load, self._save = options["load"], options["save"]
        self._lookahead_tokens = options["lookahead_tokens"]
        self._lookups = Lookups(session, shape, sync, config.lookup_timeout_ms)
        self._saves = SaveBook(session, shape)
        self._volatile = not all(group.durable for group in shape.groups)
        self._requests: dict[str, RequestState] = {}
        self._drains = Drains(self._saves, self._held)
        self._new_loads: list[LoadTask] = []
        # Block ids whose synchronous load is not confirmed: nothing computed from them may be saved.
        self._unconfirmed: dict[str, set[int]] = {}
        self._revision = spec["namespace"]["revision"]
        self._weights_epoch = 0
        self._state, self._state_at = ("", ""), 0.0
        # Rank -> the state of its session, of those last told not to be attached. Others are believed to be.
        self._detached: dict[int, str] = {}
        self._heard_at = 0.0
        if config.private or options.get("private"):
            self.switch_namespace()

    def bind_null_block(self, block_id: int) -> None:
        """The id of the block that stands for no block."""
        self._saves.null_block = block_id

    def _of(self, request: Any) -> RequestState:
        state = self._requests.get(request.request_id)
        if state is None:
            state = self._requests[request.request_id] = RequestState.new(request)
            self._hand_on(state)
        return state

    def _hand_on(self, state: RequestState) -> None:
        """Tells the daemon what the request's client said, once."""
        if not state.hints.text:
            return
        try:
            self._session.hints_submit(state.id, state.hints)
        except NativeError as error:
            logger.debug("hints of %s not handed on: %s", state.id, error)

    def _tell_end(self, state: RequestState) -> None:
        """Tells the daemon that a request ended, where its client said when the program will be back."""
        hints = state.hints.at_the_end()
        if hints is None:
            return
        try:
            self._session.hints_submit(state.id, hints)
        except NativeError as error:
            logger.debug("the end of %s not told: %s", state.id, error)

    def _outcomes(self, state: RequestState) -> dict | None:
        """What the response tells of the request's hints; None for a request without."""
        if not state.hints.given:
            return None
        told = None
        try:
            told = self._session.hints_outcomes(state.id) if state.hints.text else []
        except (NativeError, ValueError) as error:
            logger.debug("outcomes of %s not told: %s", state.id, error)
        hint.note(told or [])
        answer: dict = {"outcomes": [*state.hints.outcomes, *(told or [])]}
        if told is None:
            answer["unanswered"] = True
        return {"kvtier": answer}

    @guarded(lambda: None)
    def on_new_request(self, request: Any) -> None:
        """Asks for the request's prefix at once."""
        state = self._of(request)
        if self._load and not self._detached:
            self._lookups.submit(state)

    @guarded(lambda: (0, False))
    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """`get_num_new_matched_tokens`."""
        if not self._load or request.skip_reading_prefix_cache:
            return 0, False
        state = self._of(request)
        # A hit is loaded by all ranks.
        if self._detached:
            return (None if self._awaits_news(state) else 0), False
        tokens = self._lookups.matched(state, computed)
        if tokens is None or self._awaits_frames(state, computed + tokens):
            return None, False
        return tokens, bool(tokens) and not self._lookups.sync

    def _awaits_news(self, state: RequestState) -> bool:
        """Workers tell with each step. After a pause what they told is old, and a request lets one step pass."""
        state.asked_at = state.asked_at or req.now()
        is_old = self._heard_at + _NEWS_WAIT_S < state.asked_at
        return is_old and req.now() < state.asked_at + _NEWS_WAIT_S

    def _awaits_frames(self, state: RequestState, present: int) -> bool:
        """Reserves ahead of a first step whose blocks will have left their window by the second, and waits for the
        answer, shortly: else only the end of a prompt could ever be saved."""
        if not self._save or not self._volatile or state.lookup is None or state.lookup.expired:
            return False
        self._notice_preemption(state)
        if not state.saves.started:
            state.frames_until = req.now() + _FRAMES_WAIT_S
            self._saves.start(state, present)
            none = [[] for _ in self._saves.groups]
            self._saves.reserve(state, none, present + self._lookahead_tokens)
        self._saves.poll(state)
        return bool(state.saves.tickets) and req.now() < state.frames_until

    @guarded(lambda: None)
    def allocated(self, request: Any, block_ids: Sequence[list[int]], external_tokens: int) -> None:
        """`update_state_after_alloc`: claims the hit vLLM took, and begins to reserve."""
        state = self._of(request)
        if external_tokens > 0:
            self._claim(state, block_ids, external_tokens)
        self._notice_preemption(state)
        self._start(state, block_ids)

    def _claim(self, state: RequestState, block_ids: Sequence[list[int]], tokens: int) -> None:
        try:
            self._notice_preemption(state)
            task = self._lookups.claim(state, block_ids, tokens, self._saves.null_block)
        except Exception:
            report("claim")
            task = self._doomed(state, block_ids, tokens)
        self._new_loads.append(task)
        if task.sync:
            self._unconfirmed[state.id] = {block for _, _, block in task.blocks + task.missing}

    def _doomed(self, state: RequestState, block_ids: Sequence[list[int]], tokens: int) -> LoadTask:
        """A task that fails at once: vLLM was promised these tokens and must be told."""
        local = state.lookup.local_tokens if state.lookup else 0
        state.load = req.Load(local, tokens, self._lookups.sync)
        missing = []
        for group, row in zip(self._saves.groups, block_ids, strict=False):
            first, end = local // group.block_tokens, (local + tokens) // group.block_tokens
            missing.extend((group.index, index, row[index]) for index in range(first, min(end, len(row))))
        return LoadTask(state.id, self._lookups.sync, missing=missing)

    def _start(self, state: RequestState, block_ids: Sequence[list[int]]) -> None:
        if state.load is not None and not state.load.sync:
            return
        lookup, present = state.lookup, 0
        if state.load is not None:
            present = state.load.local_tokens + state.load.claimed_tokens
        elif lookup is not None:
            present = lookup.tokens if not lookup.expired else lookup.local_tokens
            self._lookups.release(state)
        elif not self._load:
            present = state.request.num_computed_tokens
        if self._save:
            self._saves.start(state, present)
            upto = min(len(row) * g.block_tokens for row, g in zip(block_ids, self._saves.groups, strict=True))
            self._saves.reserve(state, block_ids, upto)

    def hit_sources(self, request: Any, tokens: int) -> dict[str, int]:
        """Tokens of a claimed hit by tier: device, host, disk, object, peer."""
        state = self._requests.get(request.request_id)
        tiers = state.lookup.tiers if state and state.lookup else {}
        if sum(tiers.values()) != tokens:
            return {"host": tokens}
        return {name: n for name, n in tiers.items() if n}

    def build_meta(self, output: Any) -> StepMeta:
        """`build_connector_meta`: this step's orders."""
        loads, self._new_loads = self._new_loads, []
        meta = StepMeta(loads=loads, revision=self._revision, weights_epoch=self._weights_epoch)
        try:
            meta.preempted = set(output.preempted_req_ids or ())
            for state in filter(None, map(self._requests.get, meta.preempted)):
                self._notice_preemption(state)
            self._order_saves(output, meta)
            self._watch()
        except Exception:
            report("build_connector_meta")
        self._drains.order(meta)
        return meta

    def _notice_preemption(self, state: RequestState) -> None:
        """Once a preemption: its blocks are gone, and the workers stop copying them in front of the step. (vLLM may
        preempt and resume a request within one step, so that its new blocks come first.)"""
        preemptions = getattr(state.request, "num_preemptions", 0)
        if preemptions != state.preemptions:
            state.preemptions = preemptions
            self._saves.drop(state)
            state.saves.started = False
            self._unconfirmed.pop(state.id, None)

    def _order_saves(self, output: Any, meta: StepMeta) -> None:
        if not self._save:
            return
        self._saves.sweep()
        for request_id, scheduled in output.num_scheduled_tokens.items():
            state = self._requests.get(request_id)
            if state is None or not state.saves.started:
                continue
            request = state.request
            complete = min(request.num_computed_tokens + scheduled, request.num_tokens)
            if not state.saves.tickets and not state.saves.granted and not self._saves.unreserved(state):
                continue
            block_ids = output.kv_connector_block_state.get_block_ids(request_id)
            if block_ids is None:
                continue
            self._saves.reserve(state, block_ids, complete + self._lookahead_tokens)
            self._saves.poll(state)
            if not self._held(block_ids) and (task := self._saves.ship(state, block_ids, complete)) is not None:
                meta.saves.append(task)

    def _held(self, block_ids: Sequence[list[int]]) -> bool:
        """Whether the request stands on blocks that may not have been loaded."""
        return any(not blocks.isdisjoint(row) for blocks in self._unconfirmed.values() for row in block_ids)

    @guarded(lambda: None)
    def outcomes(self, request: Any) -> dict | None:
        """What `request_finished` tells the client; before `finished`."""
        state = self._requests.get(request.request_id)
        return self._outcomes(state) if state is not None and not state.finished else None

    def finished(self, request: Any, block_ids: Sequence[list[int]]) -> bool:
        """`request_finished_all_groups`: whether vLLM must keep the blocks until `drained` is answered."""
        state = self._requests.pop(request.request_id, None)
        if state is None:
            return False
        try:
            return self._finish(state, block_ids)
        except Exception:
            report("request_finished")
            # Copies that are under way must end before the blocks are used again.
            if not state.saves.batches or state.load is not None:
                return False
            self._drains.keep(state, block_ids, 0.0)
            return True

    def _finish(self, state: RequestState, block_ids: Sequence[list[int]]) -> bool:
        state.finished = True
        if state.load is not None and not state.load.sync:
            # Aborted while it loads: vLLM frees its blocks when the workers report the load.
            self._saves.drop(state)
            self._saves.forget(state)
            self._requests[state.id] = state
            return False
        if state.load is None:
            self._lookups.release(state)
        aborted = str(getattr(state.request.status, "name", "")) in ("FINISHED_ABORTED", "FINISHED_ERROR")
        if aborted:
            self._saves.drop(state)
        else:
            self._tell_end(state)
        self._saves.trim(state, state.computed_tokens)
        if state.saves.idle:
            if state.load is not None:
                self._requests[state.id] = state
            return False
        self._drains.keep(state, block_ids, self._config.finish_grace_ms / 1000)
        return True

    @guarded(lambda: None)
    def update(self, report_: WorkerReport | None, received: set[str], sent: set[str]) -> None:
        """`update_connector_output`: what the workers did."""
        self._heard_at = req.now()
        if report_ is not None:
            self._note_states(report_.states)
            for batch, ranks in report_.batches.items():
                self._saves.copied(batch, ranks)
            for request_id, corrupt in report_.corrupt.items():
                self._note_corrupt(request_id, corrupt)
            for request_id, lost in report_.lost.items():
                self._note_lost(request_id, lost)
            for request_id, lost in report_.sync_loads.items():
                self._note_lost(request_id, lost)
                self._loaded(request_id)
            if report_.weights_epoch > self._weights_epoch:
                self._weights_epoch = report_.weights_epoch
                self.switch_namespace()
        for request_id in received:
            self._loaded(request_id)
        for request_id in sent:
            self._drains.sent(request_id)

    def _find(self, request_id: str) -> RequestState | None:
        return self._requests.get(request_id) or self._drains.get(request_id)

    def _note_lost(self, request_id: str, lost: list[tuple[int, int]]) -> None:
        state = self._find(request_id)
        if state is not None and state.load is not None:
            state.load.lost.extend(lost)

    def _note_corrupt(self, request_id: str, corrupt: list[tuple[int, int]]) -> None:
        state = self._find(request_id)
        if state is not None and state.load is not None:
            state.load.corrupt.extend(corrupt)

    def _note_states(self, states: dict[int, tuple[str, str]]) -> None:
        """Keeps which ranks cannot load, and says each change once."""
        for rank, (state, why) in sorted(states.items()):
            before = self._detached.pop(rank, "attached")
            if state != "attached":
                self._detached[rank] = state
            if state == before:
                continue
            if state == "attached":
                logger.info("kvtier: rank %d is attached again", rank)
            else:
                remedy = _REMEDIES.get(state, _REMEDIES["absent"])
                logger.warning("kvtier: nothing is loaded: rank %d is %s (%s): %s", rank, state, why, remedy)

    def _loaded(self, request_id: str) -> None:
        self._unconfirmed.pop(request_id, None)
        state = self._find(request_id)
        if state is None:
            return
        lost = bool(state.load and state.load.lost)
        valid = self._lookups.finish(state)
        if state.finished:
            if lost:
                self._saves.drop(state)
            self._requests.pop(request_id, None)
        elif self._save:
            if lost:
                self._saves.drop(state)
                state.saves.started = False
            self._saves.start(state, valid)

    def switch_namespace(self) -> None:
        """Nothing stored before is found any more, and nothing computed before is stored."""
        self._revision = uuid.uuid4().hex
        self._session.switch_namespace(self._revision)
        for state in [*self._requests.values(), *self._drains.all()]:
            state.stale = True
            self._saves.drop(state)
        logger.info("kvtier: moved to namespace revision %s", self._revision)

    def _watch(self) -> None:
        """Logs when the attachment changes."""
        if req.now() - self._state_at < _STATE_PERIOD_S:
            return
        self._state_at = req.now()
        state = self._session.state()
        if state != self._state:
            self._state = state
            level = logging.WARNING if state[0] == "refused" else logging.INFO
            logger.log(level, "kvtier: %s%s", state[0], f": {state[1]}" if state[1] else "")

    def counters(self) -> dict:
        """Counts since the start."""
        return {**self._lookups.counters, **self._saves.counters}
