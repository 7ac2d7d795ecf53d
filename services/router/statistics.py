"""What the router counts of its requests, in four books: metrics, scaling signals, sessions, and the last minute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from overfill.routing.job import Job
from overfill.routing.signals import Signals
from overfill.v1 import inference_pb2
from services.router.quota_hold import QuotaHold
from services.router.shared import Shared


class Statistics:
    """Counts one revision's requests from their acceptance to their end.

    ``now`` is in seconds on the event loop's clock.

    Args:
        shared: has the books that all revisions share.
        signals: the revision's.

    Attributes:
        metrics: those of the router.
    """

    def __init__(self, shared: Shared, signals: Signals, revision: str = "") -> None:
        self.metrics = shared.metrics
        self._rolling = shared.rolling
        self._sessions = shared.sessions
        self._signals = signals
        self._revision = revision

    @contextmanager
    def refusing(self, hold: QuotaHold, *uncounted: type[BaseException]) -> Iterator[None]:
        """Counts the request of ``hold`` as refused when the ``with`` block raises; the exception sets the reason.

        Args:
            uncounted: an exception of one of these classes counts as no request.
        """
        try:
            yield
        except uncounted:
            raise
        except BaseException as error:
            self.metrics.refused(error, hold.tier, hold.api, hold.revision)
            raise

    def accepted(self, request: Job) -> None:
        """Counts a request that has been queued."""
        choice = request.choice
        self._signals.arrived(choice.asked, request.prompt_tokens)  # the tier that was asked for is what should grow
        self.metrics.accepted(request.prompt_tokens, request.key, request.api, _adapter(request))
        self._sessions.accepted(request)
        if choice.brownout_from:
            self.metrics.brownout(choice.brownout_from, choice.tier)
        if choice.fallback_from:
            self.metrics.fell_back(choice.fallback_from, choice.tier)

    def tokens(self, request: Job, count: int, now: float, since_last: float | None) -> None:
        """Counts tokens that a client has, ``since_last`` seconds after the previous ones; None for the first."""
        self.metrics.tokens(count, since_last, request.key, request.tier, request.api, _adapter(request))
        self._rolling.tokens(count, now)

    def answered(self, request: Job, finished: inference_pb2.Finished, now: float, decode_base: int) -> None:
        """Counts a complete answer. ``decode_base`` is that of ``AnswerState``."""
        tier = finished.parts[-1].tier if request.adapter is None else request.tier
        self.metrics.answered(finished, tier)
        self._signals.finished(finished, tier, now, decode_base)
        self._rolling.answered(finished, now)
        self._sessions.answered(request, finished.usage)

    def ended(self, request: Job, failure: BaseException | None) -> None:
        """Counts the end of a request; ``failure`` is None if it was answered."""
        self.metrics.ended(failure, request.tier, request.api, self._revision)


def _adapter(request: Job) -> str:
    return "" if request.adapter is None else request.adapter.name
