"""Which address serves a request: the first one that can be reached, then the next. No I/O."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import grpc

from overfill.errors import OverfillError, ShuttingDown, Unavailable
from overfill.rpc.status import from_rpc_error, is_word_of_peer


class Attempts:
    """Goes round ``addresses`` while their routers are lost, within one deadline for all.

    Gives up once every address has failed since the last part of the answer came.

    Args:
        timeout: seconds for the whole request, or None.
    """

    def __init__(
        self, addresses: Sequence[str], timeout: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._addresses = deque(addresses)
        self._failures = 0
        self._clock = clock
        self._deadline = None if timeout is None else clock() + timeout

    @property
    def address(self) -> str:
        """The one to call now."""
        return self._addresses[0]

    def timeout(self) -> float | None:
        """Seconds left for the next call."""
        return None if self._deadline is None else max(self._deadline - self._clock(), 0.0)

    def progressed(self) -> None:
        """Part of the answer came from ``address``."""
        self._failures = 0

    def failed(self, error: grpc.RpcError) -> OverfillError | None:
        """What to raise after a call failed; None when ``address`` is now another one to try instead."""
        failure = from_rpc_error(error, self.address)
        lost = isinstance(failure, ShuttingDown) or (
            isinstance(failure, Unavailable) and not is_word_of_peer(error)  # else the router lives and has given up
        )
        self._failures += 1
        if not lost or self._failures >= len(self._addresses):
            return failure
        self._addresses.rotate(-1)
        return None
