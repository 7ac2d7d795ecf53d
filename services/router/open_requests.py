"""The requests that a router prepares, runs and hands to clients, those of all revisions: what it drains."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from overfill.api.keys import ApiKey
from overfill.errors import OverfillError, ShuttingDown
from overfill.routing.admission import KeyLimiter
from overfill.routing.relay import Relay
from services.router.limits import READ_GRACE
from services.router.quota_hold import QuotaHold


class OpenRequests:
    """Counts requests until they have ended and clients have read their answers.

    Args:
        key_limiter: quotas of the API keys.
    """

    def __init__(self, key_limiter: KeyLimiter) -> None:
        self._key_limiter = key_limiter
        self._running: dict[Relay, ApiKey | None] = {}
        self._preparing = 0  # requests that are being checked and started
        self._aborted = False
        self._open: set[Relay] = set()  # those that still run; their answers are in ``_running`` until they are read
        self._all_closed, self._all_read = asyncio.Event(), asyncio.Event()
        self._all_closed.set()
        self._all_read.set()
        self._read_at = 0.0  # time when a client had read a delta
        self._draining = False

    @property
    def draining(self) -> bool:
        """True once the router refuses new requests."""
        return self._draining

    @contextmanager
    def hold_quota(self, caller: ApiKey | None = None, api: str = "grpc") -> Iterator[QuotaHold]:
        """Yields the hold on a key's quota with which the answers of one client request are checked and started."""
        self._preparing += 1
        self._note_idle()
        try:
            with QuotaHold(self._key_limiter, caller, api) as hold:
                yield hold
        finally:
            self._preparing -= 1
            self._note_idle()

    def check_open(self) -> None:
        """Raises ShuttingDown if the router accepts no new requests."""
        if self._draining:
            raise ShuttingDown("this router is shutting down")

    def begin(self, relay: Relay, hold: QuotaHold) -> None:
        """Starts ``relay``. Raises PromptTooLong, Overloaded or ShuttingDown if it cannot be queued."""
        if self._aborted:
            raise ShuttingDown("this router is shutting down")
        self._open.add(relay)
        self._note_idle()
        relay.start()
        self._running[relay] = hold.caller
        hold.started()
        self._all_read.clear()

    def close(self, relay: Relay, error: BaseException | None) -> None:
        """Ends ``relay`` and forgets it. ``error`` is the reason, for traces, if the request is not answered."""
        relay.close(error)
        if relay in self._running and (caller := self._running.pop(relay)) is not None:
            self._key_limiter.release(caller.id)
        if not self._running:
            self._all_read.set()

    def closed(self, relay: Relay) -> None:
        """Records that ``relay`` has ended; its answer may still be unread."""
        self._open.discard(relay)
        self._note_idle()

    def read(self, now: float) -> None:
        """Records that a client has a delta. ``now`` is in seconds on the event loop's clock."""
        self._read_at = now

    def drain(self) -> None:
        """Refuses new requests from now on."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Returns once no request is prepared or runs, and clients have read all answers.

        After the last computation, it gives up when no client has read a delta for ``READ_GRACE`` seconds. After
        ``abort_all``, it returns at once.
        """
        await self._all_closed.wait()
        now = asyncio.get_running_loop().time
        self._read_at = now()
        while not self._all_read.is_set() and (left := self._read_at + READ_GRACE - now()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._all_read.wait()

    def abort_all(self, error: OverfillError) -> None:
        """Ends every running request with ``error``, and starts no more. ``wait_idle`` then waits for nothing."""
        self._aborted = True
        self._note_idle()
        self._all_read.set()
        # Ends waiting requests first: each running one that ends frees a slot, which would go to a waiting one.
        for relay in sorted(self._running, key=lambda relay: relay.placed):
            relay.abort(error)

    def _note_idle(self) -> None:
        if self._aborted or not (self._open or self._preparing):
            self._all_closed.set()
        else:
            self._all_closed.clear()
