"""When a transfer of KV is given up: it has stalled, or it takes too long. Both ends of a transfer judge it so.

Many transfers that share a link are slow each, and all of them finish. Progress counts by whole messages, so each
transfer needs one message, of 1 MiB on a slow stream, in every ``STALL_TIMEOUT``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from overfill.errors import TransferFailed
from overfill.rpc.constants import MAX_TRANSFER_TIME, STALL_TIMEOUT

_INTERVAL = 0.5  # seconds between looks at a transfer


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """How long a transfer may take, in seconds.

    Attributes:
        stall: longest time without a byte moved while some are ready.
        whole: longest time from the moment all of the prompt's KV is ready until all of it has moved.
    """

    stall: float = STALL_TIMEOUT
    whole: float = MAX_TRANSFER_TIME


DEFAULT_LIMITS = TransferLimits()


class StallDetector:
    """Judges one transfer of ``total`` bytes that begins at ``now``. Times are seconds of any clock that only rises.

    A transfer that owes nothing is never given up, however long the prompt takes to compute.
    """

    def __init__(self, now: float, total: int, limits: TransferLimits) -> None:
        self._total = total
        self._limits = limits
        self._moved = 0
        self._last_progress = now
        self._all_ready: float | None = None

    def fault(self, now: float, ready: int, moved: int) -> str | None:
        """Why the transfer is to be given up; None: it goes on.

        Args:
            ready, moved: bytes since the transfer began.
        """
        if moved > self._moved or moved >= ready:
            self._moved, self._last_progress = moved, now
        if self._all_ready is None and ready >= self._total:
            self._all_ready = now
        if moved >= ready:
            return None
        if now - self._last_progress >= self._limits.stall:
            return f"no byte has moved for {self._limits.stall:g} s"
        if self._all_ready is not None and now - self._all_ready >= self._limits.whole:
            return f"it is unfinished {self._limits.whole:g} s after the prompt was computed (--max-transfer-time)"
        return None


async def watch_transfer(
    peer: str, total: int, limits: TransferLimits, ready: Callable[[], int], moved: Callable[[], int]
) -> None:
    """Watches a transfer until it is cancelled. ``ready`` and ``moved`` give bytes since the transfer began.

    Raises:
        TransferFailed: the transfer has stalled or takes too long; ``peer`` is named.
    """
    detector = StallDetector(time.monotonic(), total, limits)
    while True:
        await asyncio.sleep(_INTERVAL)
        fault = detector.fault(time.monotonic(), ready(), moved())
        if fault is not None:
            raise TransferFailed(
                f"gave up the KV transfer with {peer}, {moved()} of {ready()} ready bytes moved: {fault}"
            )
