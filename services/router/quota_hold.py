"""The part of an API key's quota that one client request takes."""

from __future__ import annotations

from typing import Self

from overfill.api.keys import ApiKey
from overfill.routing.admission import KeyLimiter, KeyQuota


class QuotaHold:
    """Counts the answers of one client request against its key's quota, from before the first costly work.

    A context manager: at its end, answers that were not started no longer count as running. They still count against
    the key's rate, because the router has worked for them.

    Args:
        caller: API key of the request; None if the router uses no keys.
        api: API of the request, one of ``telemetry.router_metrics.APIS``.

    Attributes:
        caller, api: as the arguments.
        tier: tier that the request's latest answer would have; empty while it is unknown.
        revision: revision that would write it; None while it is unknown.
    """

    def __init__(self, limiter: KeyLimiter, caller: ApiKey | None, api: str) -> None:
        self.caller = caller
        self.api = api
        self.tier = ""
        self.revision: str | None = None
        self._limiter = limiter
        self._taken = 0
        self._held = 0  # answers that count as running and were not started

    def take(self, now: float, answers: int = 1) -> None:
        """Counts ``answers`` answers against the quota, less those that earlier calls have counted.

        Args:
            now: seconds on the event loop's clock.
            answers: number of answers to start together. Each counts as a request of the key.

        Raises:
            InvalidRequest, Overloaded: the key's quota does not admit this number of answers.
        """
        more = answers - self._taken
        if self.caller is None or more <= 0:
            return
        quota = KeyQuota(self.caller.name, self.caller.rate, self.caller.concurrency)
        self._limiter.acquire(self.caller.id, quota, now, more, self._taken)
        self._taken += more
        self._held += more

    def started(self) -> None:
        """Records that an answer runs; its end releases it."""
        if self.caller is not None:
            self._held -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        while self._held:
            self._held -= 1
            assert self.caller is not None
            self._limiter.release(self.caller.id)
