"""Where a worker's KV is, for both ends of a handoff: in this process, or in ranks that hold a share of the heads each.

With tensor parallelism the process that speaks to routers has no KV. Its ranks serve and pull their own heads; it keeps
the books: leases, control streams, coverage. ``Puller`` is the part of a handoff that moves bytes on a decode worker.
``ServingRanks`` is what a prefill worker asks of its ranks. No engine is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from overfill.kv.chunks import TransferSpec
from overfill.kv.ranges import KvRange
from overfill.v1 import kv_pb2


@dataclass(frozen=True, slots=True)
class Moved:
    """Progress of a pull: ``ranges`` are in place now. Replicated heads are reported once all replicas hold them.

    Attributes:
        kv_bytes: encoded bytes of the ranges, ``shared_bytes`` of them through shared memory.
        chunks: number of chunks.
        broken_streams: data streams that have ended early since the last report.
    """

    ranges: Sequence[KvRange]
    kv_bytes: int = 0
    shared_bytes: int = 0
    chunks: int = 0
    broken_streams: int = 0


class Puller(Protocol):
    """Pulls one prompt's KV from the data addresses of a prefill worker into blocks."""

    async def pull(
        self,
        spec: TransferSpec,
        layer_map: Sequence[int],
        blocks: Sequence[int],
        sources: Sequence[kv_pb2.DataAddress],
        timeout: float | None,
        on_moved: Callable[[Moved], None],
    ) -> None:
        """Returns when all that ``spec`` describes is in place. After its end, also by a cancel, nothing writes.

        Args:
            sources: the prefill worker's data addresses; their ranges contain each KV head exactly once.
            on_moved: called on the event loop.

        Raises:
            TransferFailed, Unavailable: a chunk was wrong, or a source does not answer.
        """
        ...


class ServingRanks(Protocol):
    """The ranks of a prefill worker, which serve ``PullKv`` on data addresses of their own."""

    async def open(self, spec: TransferSpec, block_table: Sequence[int], cached_tokens: int) -> None:
        """Has every rank serve a transfer. ``block_table`` holds the first ``cached_tokens`` tokens already.

        Later tokens become ready layer by layer, as the ranks compute them.
        """
        ...

    async def close(self, transfer_id: bytes) -> None:
        """Ends a transfer's streams in every rank. On return no rank reads its blocks."""
        ...
