"""Finished requests whose blocks vLLM keeps for us: their last saves, and the word to the workers that nothing follows.

Each request that was kept is named in `drained` once, whatever happens: only then does vLLM get its blocks back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvtier.guard import report
from kvtier.metadata import StepMeta
from kvtier.request import Draining, RequestState, now
from kvtier.saves import SaveBook


class Drains:
    """Kept requests by id."""

    def __init__(self, saves: SaveBook, held: Callable[[Sequence[list[int]]], bool]) -> None:
        """`held`: whether blocks stand on a load that is not confirmed."""
        self._saves = saves
        self._held = held
        self._kept: dict[str, RequestState] = {}

    def get(self, request_id: str) -> RequestState | None:
        """A kept request."""
        return self._kept.get(request_id)

    def all(self) -> Iterable[RequestState]:
        """The kept requests."""
        return self._kept.values()

    def keep(self, state: RequestState, block_ids: Sequence[list[int]], grace_s: float) -> None:
        """Keeps a finished request, for reservations not longer than the grace."""
        state.draining = Draining(tuple(list(row) for row in block_ids), state.computed_tokens, now() + grace_s)
        self._kept[state.id] = state

    def order(self, meta: StepMeta) -> None:
        """Adds what can be saved now to a step's orders, and who is done."""
        for state in [s for s in self._kept.values() if s.draining and not s.draining.told]:
            try:
                if not self._finish(state, state.draining, meta):
                    continue
            except Exception:
                report("drain")
            state.draining.told = True
            meta.drained.append(state.id)

    def _finish(self, state: RequestState, draining: Draining, meta: StepMeta) -> bool:
        """Whether nothing more will be saved of the request."""
        self._saves.poll(state)
        held = self._held(draining.block_ids)
        if not held:
            task = self._saves.ship(state, draining.block_ids, draining.complete_tokens)
            if task is not None:
                meta.saves.append(task)
        if (state.saves.tickets or held) and not state.stale and now() <= draining.deadline:
            return False
        self._saves.drop(state)
        return True

    def sent(self, request_id: str) -> None:
        """The workers' copies ended and vLLM has its blocks back."""
        state = self._kept.pop(request_id, None)
        if state is not None:
            self._saves.forget(state)
