"""`KvTierConnector`: vLLM's connector interface over the scheduler and worker sides.

vLLM makes one connector in the scheduler's process and one in each worker. The workers know the tensors, so they build
the spec; the scheduler side gets it in the handshake and opens its own session then.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvtier import _native as native
from kvtier import spec as specs
from kvtier import weights
from kvtier.config import Config
from kvtier.guard import guarded
from kvtier.metadata import StepMeta, WorkerReport
from kvtier.scheduler import SchedulerSide
from kvtier.session import Session
from kvtier.worker import WorkerSide, save_settings

logger = logging.getLogger("vllm.kvtier")

KVConnectorMetadata.register(StepMeta)
KVConnectorWorkerMetadata.register(WorkerReport)

_SOURCES = {
    "device": CacheHitSource.DEVICE,
    "host": CacheHitSource.HOST,
    "disk": CacheHitSource.DISK,
    "peer": CacheHitSource.P2P,
    "object": CacheHitSource.EXTERNAL_UNSPECIFIED,
}
# A folder where each connector leaves its counters as JSON, at the end of each request and of itself: for tests.
_COUNTERS_ENV = "KVTIER_COUNTERS_DIR"


def _stream_of(ordinal: int) -> Callable[[], int]:
    """Tells the handle of the stream that the calling thread gives a GPU its work on."""
    import torch

    return lambda: torch.cuda.current_stream(ordinal).cuda_stream


def _settle(ordinal: int) -> Callable[[], None]:
    """Waits until that stream has done its work."""
    import torch

    return lambda: torch.cuda.current_stream(ordinal).synchronize()


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler side: its spec, or why it has none."""

    spec: dict | None
    options: dict
    refusal: str = ""


class KvTierConnector(KVConnectorBase_V1, SupportsHMA):
    """Reads and writes KV blocks through kvtier's daemon on this node. Without the daemon everything is a miss."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._config = Config.parse(transfer.kv_connector_extra_config)
        specs.check_hash(vllm_config)
        native.library()
        self._may_load = transfer.is_kv_consumer and transfer.kv_load_failure_policy == "recompute"
        self._may_save = transfer.is_kv_producer
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._session: Session | None = None
        self._handshake: Handshake | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._warn_about_policy(transfer)
        else:
            self._watch_weights()
        atexit.register(self.shutdown)

    def _warn_about_policy(self, transfer: Any) -> None:
        if transfer.is_kv_consumer and not self._may_load:
            logger.warning(
                "kvtier stores but does not load: a block that is lost on the way would fail its request. "
                'Set "kv_load_failure_policy": "recompute" in --kv-transfer-config'
            )

    @guarded(lambda: None)
    def _watch_weights(self) -> None:
        from vllm.v1.worker.gpu_worker import Worker

        weights.watch(Worker)

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a later miss, nothing worse."""
        return False

    # Worker side.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        try:
            self._handshake = self._attach(kv_caches)
        except specs.UnsupportedError as error:
            self._handshake = Handshake(None, {}, str(error))
        except Exception as error:
            logger.exception("kvtier: this worker goes on without the cache")
            self._handshake = Handshake(None, {}, repr(error))

    def _attach(self, kv_caches: dict[str, Any]) -> Handshake:
        from vllm.distributed.parallel_state import get_tp_group

        ranks = {"rank": self._vllm_config.parallel_config.rank, "tp_rank": get_tp_group().rank_in_group}
        spec, regions, options = specs.build(self._vllm_config, self._kv_cache_config, kv_caches, ranks, self._config)
        self._session = Session(spec)
        self._session.register_regions(regions)
        single = len(spec["layout"]["groups"]) == 1
        config = save_settings(self._config, self._kv_cache_config.needs_kv_cache_zeroing)
        self._worker = WorkerSide(self._session, spec["shard"], options["writer"], single, config)
        self._worker.rank = spec["rank"]
        if "device" in spec:
            self._worker.stream = _stream_of(spec["device"]["ordinal"])
            self._worker.settle = _settle(spec["device"]["ordinal"])
        self._worker.revision = spec["namespace"]["revision"]
        return Handshake(spec, {**options, "node": specs.node()})

    def get_handshake_metadata(self) -> Handshake | None:
        return self._handshake

    def _meta(self) -> StepMeta | None:
        meta = self._connector_metadata
        return meta if self._worker is not None and isinstance(meta, StepMeta) else None

    @guarded(lambda: None)
    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        if self._worker is not None:
            self._worker.before_step(kv_connector_metadata)

    @guarded(lambda: None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if (meta := self._meta()) is not None:
            self._worker.load(meta)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    @guarded(lambda: None)
    def wait_for_save(self) -> None:
        if (meta := self._meta()) is not None:
            self._worker.save(meta)

    @guarded(KVConnectorTransferResults)
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            return KVConnectorTransferResults()
        sent, received, failed = self._worker.poll()
        return KVConnectorTransferResults(finished_sending=sent, finished_recving=received, failed_recving=failed)

    @guarded(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_invalid_blocks() if self._worker is not None else set()

    @guarded(lambda: None)
    def build_connector_worker_meta(self) -> WorkerReport | None:
        return self._worker.take_report() if self._worker is not None else None

    # Scheduler side.

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict) -> None:
        refusals = sorted({h.refusal for h in metadata.values() if h.spec is None})
        if refusals or not metadata:
            logger.warning("kvtier: nothing is cached for this engine: %s", "; ".join(refusals) or "no worker answered")
            return
        self._open_scheduler([metadata[rank] for rank in sorted(metadata)])

    @guarded(lambda: None)
    def _open_scheduler(self, handshakes: list[Handshake]) -> None:
        if why := specs.disunity([h.spec for h in handshakes], [h.options["node"] for h in handshakes]):
            logger.warning("kvtier: nothing is cached for this engine: %s", why)
            return
        spec = {**handshakes[0].spec, "role": "scheduler", "rank": 0, "shard": 0}
        # The scheduler's process copies nothing.
        spec.pop("device", None)
        options = {
            "ranks": len(handshakes),
            "load": self._may_load,
            "save": self._may_save,
            "lookahead_tokens": self._vllm_config.scheduler_config.max_num_batched_tokens,
            "private": any(h.options["private"] for h in handshakes),
        }
        self._session = Session(spec)
        self._scheduler = SchedulerSide(self._session, spec, self._config, options)
        if self._kv_cache_manager is not None:
            self._scheduler.bind_null_block(self._kv_cache_manager.block_pool.null_block.block_id)

    @guarded(lambda: None)
    def on_new_request(self, request: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.matched(request, num_computed_tokens) if self._scheduler is not None else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[CacheHitSource, int]:
        if num_external_tokens == 0 or self._scheduler is None:
            return {}
        tiers = self._scheduler.hit_sources(request, num_external_tokens)
        return {_SOURCES[name]: tokens for name, tokens in tiers.items()}

    def build_connector_meta(self, scheduler_output: Any) -> StepMeta:
        return self._scheduler.build_meta(scheduler_output) if self._scheduler is not None else StepMeta()

    def update_connector_output(self, connector_output: Any) -> None:
        if self._scheduler is not None:
            received, sent = connector_output.finished_recving or set(), connector_output.finished_sending or set()
            self._scheduler.update(connector_output.kv_connector_worker_meta, received, sent)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(self, request: Any, block_ids: Sequence[list[int]]) -> tuple[bool, dict | None]:
        if self._scheduler is None:
            return False, None
        told = self._scheduler.outcomes(request)
        keep = self._scheduler.finished(request, block_ids)
        self._leave_counters()
        return keep, told

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.switch_namespace()
        return True

    # Both sides.

    def counters(self) -> dict:
        """Counts of this side and of its session."""
        side = self._scheduler or self._worker
        return (
            {"side": side.counters() if self._scheduler else dict(side.counters), "session": self._session.counters()}
            if side
            else {}
        )

    def shutdown(self) -> None:
        """Leaves the counters behind where asked, and lets started saves finish within the deadline."""
        atexit.unregister(self.shutdown)
        session = self._session
        if session is None:
            return
        self._leave_counters()
        self._session = self._scheduler = self._worker = None
        session.close(self._config.shutdown_timeout_ms)

    @guarded(lambda: None)
    def _leave_counters(self) -> None:
        folder = os.environ.get(_COUNTERS_ENV)
        if folder:
            name = f"{self._role.name.lower()}-{os.getpid()}-{id(self):x}.json"
            with open(os.path.join(folder, name), "w", encoding="utf-8") as out:
                json.dump(self.counters(), out)
