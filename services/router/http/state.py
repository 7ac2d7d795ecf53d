"""What all connections of the HTTP server share: their limits, their number, and the bytes that they hold."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from overfill.errors import Overloaded
from overfill.rpc.reload import ReloadingValue

SHORT = 16 << 10
"""Size in bytes up to which a body does not count."""

C = TypeVar("C")
R = TypeVar("R")


class ByteBudget:
    """Limits the bytes that bodies in receipt may hold together.

    A body counts with its announced length, so that the budget never refuses a body halfway. Bodies of at most
    ``SHORT`` bytes do not count: they should not wait for long ones, and the number of connections limits them.

    Args:
        total: maximum of all bodies, in bytes.
        share: maximum of the bodies of one API key, so that one key does not shut out the others. Requests without a
            key have no limit but ``total``.
    """

    def __init__(self, total: int, share: int) -> None:
        self._total, self._share = total, share
        self._held: Counter[str] = Counter()
        self._sum = 0

    def take(self, key: str, size: int) -> None:
        """Counts ``size`` bytes as held by ``key``, which is empty without API keys. Raises Overloaded."""
        if size <= SHORT:
            return
        if self._sum + size > self._total:
            raise Overloaded(
                f"this router receives request bodies of {self._sum} bytes already; its limit is {self._total}",
                1.0,
                "router_busy",
            )
        if key and self._held[key] + size > self._share:
            raise Overloaded(
                f"this router receives request bodies of {self._held[key]} bytes for this API key already; "
                f"a key's limit is {self._share}",
                1.0,
                "router_busy",
            )
        self._held[key] += size
        self._sum += size

    def release(self, key: str, size: int) -> None:
        """Ends the count of ``size`` bytes."""
        if size <= SHORT:
            return
        self._sum -= size
        self._held[key] -= size
        if not self._held[key]:
            del self._held[key]


@dataclass(eq=False)
class ServerState(Generic[C, R]):
    """State that the connections of one server share. ``C`` is the class of connections, ``R`` that of requests.

    Attributes:
        app: answers a request. A connection cancels it when the client disconnects.
        now: the event loop's clock, in seconds.
        max_connections: maximum number of connections, counted from accept on.
        max_body: maximum size of a request's body in bytes.
        budget: limit of all bodies in receipt.
        tls: the current TLS context; None means no TLS.
        discarded_until: time until which connections have used up their rate of discarding bodies.
        draining: True once connections close after their answers.
        open: all connections.
        none_open: set while there are none.
        free: the connections without a request whose client has read all answers, the longest without one first.
        receiving: the connections whose request's body arrives, the oldest first.
    """

    app: Callable[[R], Awaitable[None]]
    now: Callable[[], float]
    max_connections: int
    max_body: int
    budget: ByteBudget
    tls: ReloadingValue[ssl.SSLContext] | None
    discarded_until: float = 0.0
    draining: bool = False
    open: set[C] = field(default_factory=set)
    none_open: asyncio.Event = field(default_factory=asyncio.Event)
    free: dict[C, None] = field(default_factory=dict)
    receiving: dict[C, None] = field(default_factory=dict)
