"""Which address serves a request: the first one that can be reached, then the next. No I/O."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import grpc

from overfill.errors import DeadlineExceeded, OverfillError, RequestCancelled, ShuttingDown, Unavailable
from overfill.rpc.status import from_rpc_error, is_word_of_peer

_MOST_ROUNDS = 4
"""Times that every address may be lost, since the last part of the answer, by a request that was taken each time."""


class Attempts:
    """Goes round ``addresses`` while their routers are lost, within one deadline for all.

    Gives up once every address has failed since the request was last taken, or part of its answer came. Routers that
    take it and are lost, again and again, are tried for four rounds: one may be back by the time that the next fails.

    Args:
        timeout: seconds for the whole request, or None.
        shared: each address that has not failed yet gets an equal share of the time that is left. For short calls:
            one frozen router must not use up the time of the others.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        timeout: float | None,
        clock: Callable[[], float] = time.monotonic,
        *,
        shared: bool = False,
    ) -> None:
        self._shared = shared
        self._addresses = deque(addresses)
        self._failures = 0  # since the request was last taken
        self._losses = 0  # since the last part of the answer
        self._clock = clock
        self._deadline = None if timeout is None else clock() + timeout

    @property
    def address(self) -> str:
        """The one to call now."""
        return self._addresses[0]

    def timeout(self) -> float | None:
        """Seconds for the next call."""
        if self._deadline is None:
            return None
        left = max(self._deadline - self._clock(), 0.0)
        return left / (len(self._addresses) - self._failures) if self._shared else left

    def taken(self) -> None:
        """The router at ``address`` has taken the request."""
        self._failures = 0

    def progressed(self) -> None:
        """Part of the answer came from ``address``."""
        self._failures = self._losses = 0

    def failed(self, error: grpc.RpcError) -> OverfillError | None:
        """What to raise after a call failed; None when ``address`` is now another one to try instead."""
        failure = from_rpc_error(error, self.address)
        # A router that ends in the middle of an answer may cancel it; we did not. One that says Unavailable itself is
        # alive, and has given up.
        lost = isinstance(failure, ShuttingDown | RequestCancelled) or (
            isinstance(failure, Unavailable) and not is_word_of_peer(error)
        )
        lost = lost or (self._shared and isinstance(failure, DeadlineExceeded))
        self._failures += 1
        self._losses += 1
        most = len(self._addresses)
        if not lost or self._failures >= most or self._losses >= _MOST_ROUNDS * most:
            return failure
        self._addresses.rotate(-1)
        return None
