"""Which address serves a new request: the first one that can be reached. No I/O."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import grpc

from overfill.errors import OverfillError, Unavailable
from overfill.rpc.status import from_rpc_error


class Attempts:
    """Walks through ``addresses`` until one answers, within one deadline for all.

    Args:
        timeout: seconds for the whole request, or None.
    """

    def __init__(
        self, addresses: Sequence[str], timeout: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.address, *self._others = addresses
        self._clock = clock
        self._deadline = None if timeout is None else clock() + timeout

    def timeout(self) -> float | None:
        """Seconds left for the next call."""
        return None if self._deadline is None else max(self._deadline - self._clock(), 0.0)

    def failed(self, error: grpc.RpcError, answered: bool) -> OverfillError | None:
        """What to raise after a call failed; None when ``address`` is now another one to try instead.

        ``answered``: the server had sent something, so it has begun the request and nobody else may take it.
        """
        failure = from_rpc_error(error, self.address)
        if isinstance(failure, Unavailable) and not answered and self._others:
            self.address, *self._others = self._others
            return None
        return failure
