"""Where a worker's KV is, for both ends of a handoff: in this process, or in ranks that hold a share of the heads each.

With tensor parallelism the process that speaks to routers has no KV. Its ranks serve and pull their own heads; it keeps
the books: leases, control streams, acknowledgements. ``Puller`` is the part of a handoff that moves bytes on a decode
worker: ``kv.puller.LocalPuller`` where the KV is in the process, ``RankPullers`` over one puller per rank.
``Ranks`` is what a worker asks of its ranks. No engine is named here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from overfill.errors import RequestCancelled, StepFailed, TransferFailed, Unavailable
from overfill.kv.chunks import TransferSpec
from overfill.kv.ranges import KvRange, ReplicaCounts
from overfill.rpc.access import AccessPolicy
from overfill.rpc.tls import Credentials, ServerTls
from overfill.v1 import kv_pb2


class RankLost(Unavailable):
    """A rank of this worker has ended or is silent, so that the worker ends too."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Progress of a pull: ``ranges`` are in place now. Each vector is reported once.

    Attributes:
        kv_bytes: encoded bytes that have arrived, ``shared_bytes`` of them through shared memory.
        chunks: number of chunks that have arrived.
        broken_streams: data streams that have ended early since the last report.
    """

    ranges: Sequence[KvRange] = ()
    kv_bytes: int = 0
    shared_bytes: int = 0
    chunks: int = 0
    broken_streams: int = 0


@dataclass(frozen=True, slots=True)
class Pull:
    """What a pull moves, and where to. It can be pickled.

    Attributes:
        peer: name of the prefill worker, for errors.
        spec: the transfer. It has all KV heads of the full model, also where a puller has a share of them.
        layer_map: ``layer_map[i]`` is the full-model layer whose KV is stored in cache layer i.
        sources: the prefill worker's data addresses; their ranges contain each KV head exactly once.
        timeout: seconds left of the request's deadline.
    """

    peer: str
    spec: TransferSpec
    layer_map: Sequence[int]
    blocks: Sequence[int]
    sources: Sequence[kv_pb2.DataAddress]
    timeout: float | None


class Puller(Protocol):
    """Pulls prompts' KV from data addresses of prefill workers into blocks. Several pulls may run at once."""

    async def pull(self, pull: Pull, on_moved: Callable[[Moved], None]) -> None:
        """Returns when this puller's share of ``pull`` is in place.

        After its end, also by an error or a cancel, nothing writes and ``on_moved`` is not called.

        Args:
            on_moved: called on the event loop.

        Raises:
            TransferFailed, Unavailable, DeadlineExceeded, ...: a chunk was wrong, or a source or rank does not answer.
        """
        ...


class RankPullers:
    """Pulls with several pullers at once, each of which has a share of the KV heads. Shares are equal or disjoint.

    Args:
        pullers: each rank's share of heads, a half-open range, and its puller.
    """

    def __init__(self, pullers: Sequence[tuple[tuple[int, int], Puller]]) -> None:
        self._pullers = pullers

    async def pull(self, pull: Pull, on_moved: Callable[[Moved], None]) -> None:
        """As ``Puller.pull``. Reports a range once all ranks that hold its heads have it in place."""
        spec, shares = pull.spec, [heads for heads, _ in self._pullers]
        counts = {heads: ReplicaCounts(spec.layers, spec.tokens, heads, shares.count(heads)) for heads in shares}

        def note(heads: tuple[int, int], moved: Moved) -> None:
            on_moved(replace(moved, ranges=counts[heads].add(moved.ranges)))

        try:
            async with asyncio.TaskGroup() as group:
                for heads, puller in self._pullers:
                    group.create_task(puller.pull(pull, partial(note, heads)))
        except BaseExceptionGroup as errors:
            raise root_cause(errors) from errors


class Ranks(Protocol):
    """The ranks of a worker. Every call ends in bounded time. It raises RankLost when a rank has gone.

    Attributes:
        puller: pulls into the caches of all ranks, on a decode worker.
    """

    puller: Puller

    async def serve(
        self, host: str, port: int, tls: ServerTls | None, access: AccessPolicy, max_rpcs: int | None
    ) -> Sequence[kv_pb2.DataAddress]:
        """Has ranks listen on ``host`` for PullKv, each on ``port`` plus its number, and returns their addresses.

        Of ranks that hold the same heads, one serves.

        Args:
            port: 0 has each rank take a free port.
            tls, access, max_rpcs: as of the worker's own ``RpcServer``.

        Raises:
            Unavailable: a rank cannot listen there.
        """
        ...

    async def open(self, spec: TransferSpec, block_table: Sequence[int], cached_tokens: int) -> None:
        """Has every rank serve a transfer. ``block_table`` holds the first ``cached_tokens`` tokens already.

        Later tokens become ready layer by layer, as the ranks compute them. They may have computed some before.
        """
        ...

    async def close(self, transfer_id: bytes) -> tuple[int, int]:
        """Ends a transfer's streams in every rank. On return no rank reads its blocks.

        The transfer may have been closed before, or never opened.

        Returns:
            Monotonic nanoseconds at which ranks passed the first and the last message to the transport; 0 means never.
        """
        ...

    async def connect(self, streams: int, credentials: Credentials | None) -> None:
        """Says how ranks pull: with ``streams`` connections to each data address, and these credentials."""
        ...

    async def stop(self) -> None:
        """Ends all streams, listeners and connections of the ranks."""
        ...


def root_cause(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to report: first a worker's end, then this worker's own finding, last a cancelled stream."""
    ends = (RankLost, StepFailed)
    return min(
        errors.exceptions,
        key=lambda e: (isinstance(e, RequestCancelled), not isinstance(e, ends), not isinstance(e, TransferFailed)),
    )
