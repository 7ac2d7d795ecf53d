"""Detection of KV transfers that have stalled or take too long. Both ends of a transfer use it.

A transfer is judged by stalls, not by its rate: when many transfers share a link, each is slow but all finish. Progress
is counted in whole messages, so a transfer needs one message per ``STALL_TIMEOUT``. On a slow stream that is 1 MiB.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from overfill.errors import TransferFailed
from overfill.rpc.constants import MAX_TRANSFER_TIME, STALL_TIMEOUT

_INTERVAL = 0.5  # seconds between checks of a transfer


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """Time limits of a transfer.

    Attributes:
        stall: seconds without progress, while bytes are ready, after which the transfer fails.
        whole: seconds that the transfer may take after all of the prompt's KV is ready.
    """

    stall: float = STALL_TIMEOUT
    whole: float = MAX_TRANSFER_TIME


DEFAULT_LIMITS = TransferLimits()


class StallDetector:
    """Checks one transfer of ``total`` bytes that starts at ``now``. Times are seconds of any monotonic clock.

    While all ready bytes have moved, the transfer does not stall, however long the prompt takes to compute.
    """

    def __init__(self, now: float, total: int, limits: TransferLimits) -> None:
        self._total = total
        self._limits = limits
        self._moved = 0
        self._last_progress = now
        self._all_ready: float | None = None

    def fault(self, now: float, ready: int, moved: int) -> str | None:
        """Returns the reason why the transfer must be given up, or None.

        Args:
            ready, moved: bytes since the transfer started.
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
    """Checks a transfer periodically until this task is cancelled.

    Args:
        peer: name of the other end, for the error.
        ready, moved: return bytes since the transfer started.

    Raises:
        TransferFailed: the transfer has stalled or takes too long.
    """
    detector = StallDetector(time.monotonic(), total, limits)
    while True:
        await asyncio.sleep(_INTERVAL)
        fault = detector.fault(time.monotonic(), ready(), moved())
        if fault is not None:
            raise TransferFailed(
                f"gave up the KV transfer with {peer}, {moved()} of {ready()} ready bytes moved: {fault}"
            )
