"""Counts the KV blocks of a router's workers, for an endpoint picker."""

from __future__ import annotations

from collections.abc import Iterable

from overfill.routing.pool import Pool, Roster
from overfill.telemetry.picker import KvBlocks
from overfill.v1 import decode_pb2


def kv_blocks(rosters: Iterable[Roster], now: float) -> KvBlocks:
    """Returns the blocks of the workers that take requests, as last reported. Callable from any thread.

    Args:
        now: seconds on the event loop's clock.
    """
    prefill, decode = [], []
    for roster in rosters:
        prefill += _loads(roster.prefill, now)
        for pool in roster.decode.values():
            decode += _loads(pool, now)
    return KvBlocks(
        used=sum(load.kv_blocks_used for load in decode),
        total=sum(load.kv_blocks_total for load in decode),
        block_size=max((load.block_size for load in prefill), default=0),
        prompt_total=sum(load.kv_blocks_total for load in prefill),
    )


def _loads(pool: Pool, now: float) -> list[decode_pb2.WorkerLoad]:
    reports = [worker.report for worker in list(pool) if worker.alive(now)]
    return [report.load for report in reports if report is not None]
