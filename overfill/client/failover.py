"""Failover between router addresses, within one deadline for all of them. No I/O."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import grpc

from overfill.errors import (
    DeadlineExceeded,
    Incompatible,
    ModelNotFound,
    OverfillError,
    PromptTooLong,
    RequestCancelled,
    ShuttingDown,
    Unavailable,
)
from overfill.rpc.status import from_rpc_error, is_word_of_peer

_MAX_ROUNDS = 4
"""Limit on rounds through all addresses in which routers accept the request but send no part of the answer."""


class AddressFailover:
    """The address that serves a request: the first one that can be reached, then the next, in a circle.

    It gives up once every address has failed since a router last accepted the request or sent a part of the answer. A
    router that says that it shuts down begins a new round: while a silent address was tried, another router may have
    been replaced. A router that leaves is asked again once, because its address may now lead to another one.
    Routers that accept the request and then fail are tried for four rounds: a failed router may be back before the next
    one fails. A router that cannot continue the answer is passed over: another one would come of it, the prompt is too
    long there, or the router does not have the model or the tier.

    Args:
        timeout: Seconds for the whole request; None means no limit.
        shared: Whether each address that has not failed yet gets an equal share of the time left. Short calls set it,
            so that one frozen router does not use up the time for the others.
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
        self._failures = 0  # since a router last accepted the request, or said that it shuts down
        self._losses = 0  # since the last part of the answer
        self._leave: OverfillError | None = None  # of the first router that left since the last part of the answer
        self._refusal: OverfillError | None = None  # of the first router that cannot continue the answer
        self._clock = clock
        self._deadline = None if timeout is None else clock() + timeout

    @property
    def address(self) -> str:
        """The address to call now."""
        return self._addresses[0]

    def timeout(self) -> float | None:
        """Seconds for the next call; None means no limit."""
        if self._deadline is None:
            return None
        left = max(self._deadline - self._clock(), 0.0)
        return left / (len(self._addresses) - self._failures) if self._shared else left

    def accepted(self) -> None:
        """Records that the router at ``address`` has accepted the request."""
        self._failures = 0

    def progressed(self) -> None:
        """Records that the router at ``address`` has sent a part of the answer."""
        self._failures = self._losses = 0
        self._leave = None

    def next_address_or_error(self, error: grpc.RpcError, continues: bool = False) -> OverfillError | None:
        """Moves to the next address after a failed call, and returns None; or returns the error to raise.

        Args:
            continues: Whether the call asked for the rest of an answer.
        """
        failure = from_rpc_error(error, self.address)
        refused = continues and isinstance(failure, Incompatible | ModelNotFound | PromptTooLong)
        if refused and self._refusal is None:
            self._refusal = failure
        # A router that shuts down may cancel the answer; this client did not. A router that answers Unavailable itself
        # is alive and has given the request up.
        leaves = isinstance(failure, ShuttingDown | RequestCancelled)
        unreachable = isinstance(failure, Unavailable) and not is_word_of_peer(error)
        lost = leaves or unreachable or refused or (self._shared and isinstance(failure, DeadlineExceeded))
        self._losses += 1
        if leaves and self._leave is None:
            self._leave, self._failures = failure, 0
        else:
            self._failures = 1 if isinstance(failure, ShuttingDown) else self._failures + 1
            count = len(self._addresses)
            if not lost or self._failures >= count or self._losses >= _MAX_ROUNDS * count:
                told = self._refusal or self._leave
                return told if unreachable and told is not None else failure
        self._addresses.rotate(-1)
        return None
