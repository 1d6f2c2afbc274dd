"""What the scheduler side tells the workers each step, and what they tell it back. Pickled by vLLM; plain data only."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtier._native import FRAME_BYTES, KEY_BYTES, TRANSFER_BYTES

ZERO_KEY = bytes(KEY_BYTES)

# A block of a request: (group, index in the request, block id).
Block = tuple[int, int, int]


def transfer(frame: bytes, block_id: int) -> bytes:
    """A packed `kvtier_transfer`."""
    return frame + block_id.to_bytes(4, "little") + b"\0\0\0\0"


def frames_of(transfers: bytes) -> list[bytes]:
    """The frames of packed transfers."""
    return [transfers[at : at + FRAME_BYTES] for at in range(0, len(transfers), TRANSFER_BYTES)]


@dataclass
class LoadTask:
    """Blocks of one request to load."""

    request_id: str
    sync: bool
    # Blocks with a transfer, in the order of the transfers.
    blocks: list[Block] = field(default_factory=list)
    # Packed transfers, one entry a shard.
    transfers: list[bytes] = field(default_factory=list)
    # Blocks that vLLM was promised and that are not there: they fail at once.
    missing: list[Block] = field(default_factory=list)


@dataclass
class SaveTask:
    """Complete blocks of one request to save, as packed transfers, one entry a shard."""

    batch: int
    request_id: str
    # Blocks that stay where they are while the request lives.
    durable: list[bytes] = field(default_factory=list)
    # Blocks that vLLM may reuse from the next step on (sliding windows): copied before it begins.
    volatile: list[bytes] = field(default_factory=list)


@dataclass
class StepMeta:
    """One step's orders to all ranks."""

    loads: list[LoadTask] = field(default_factory=list)
    saves: list[SaveTask] = field(default_factory=list)
    preempted: set[str] = field(default_factory=set)
    # Finished requests whose last save is ordered in this step or was before.
    drained: list[str] = field(default_factory=list)
    # Namespace revision these orders belong to.
    revision: str = ""
    # Weight updates the scheduler side knows of.
    weights_epoch: int = 0


@dataclass
class WorkerReport:
    """One step's news of one rank, or of all of them aggregated."""

    # Request -> blocks (group, index) whose load failed. Present for every sync load, empty when all went well.
    sync_loads: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    # Request -> blocks (group, index) whose asynchronous load failed.
    lost: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    # Batch -> ranks whose copies of it ended.
    batches: dict[int, int] = field(default_factory=dict)
    weights_epoch: int = 0
    # Request -> those of its failed blocks whose bytes were not those that were sealed.
    corrupt: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    # Rank -> the state of its session, `attached` or another, and why; there when it changed, and now and then.
    states: dict[int, tuple[str, str]] = field(default_factory=dict)

    def aggregate(self, other: WorkerReport) -> WorkerReport:
        """Both ranks' news."""
        pairs = ((self.sync_loads, other.sync_loads), (self.lost, other.lost), (self.corrupt, other.corrupt))
        for mine, theirs in pairs:
            for request_id, blocks in theirs.items():
                mine.setdefault(request_id, []).extend(blocks)
        for batch, ranks in other.batches.items():
            self.batches[batch] = self.batches.get(batch, 0) + ranks
        self.weights_epoch = max(self.weights_epoch, other.weights_epoch)
        self.states.update(other.states)
        return self

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self.sync_loads or self.lost or self.batches or self.states)
