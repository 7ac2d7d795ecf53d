"""What the router counts of its requests, in four books: metrics, scaling signals, sessions, and the last minute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from overfill.routing.job import Job
from overfill.routing.rolling_stats import RollingStats
from overfill.routing.session_stats import SessionStats
from overfill.routing.signals import Signals
from overfill.telemetry.router_metrics import RouterMetrics
from overfill.v1 import inference_pb2
from services.router.quota_hold import QuotaHold


class Statistics:
    """Counts requests from their acceptance to their end. ``now`` is in seconds on the event loop's clock.

    Attributes:
        metrics: as the argument.
        rolling: statistics of the last minute.
        sessions: statistics of the sessions that were active lately.
    """

    def __init__(self, metrics: RouterMetrics, signals: Signals) -> None:
        self.metrics = metrics
        self.rolling = RollingStats()
        self.sessions = SessionStats()
        self._signals = signals

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
            self.metrics.refused(error, hold.tier, hold.api)
            raise

    def accepted(self, request: Job) -> None:
        """Counts a request that has been queued."""
        choice = request.choice
        self._signals.arrived(choice.asked, request.prompt_tokens)  # the tier that was asked for is what should grow
        self.metrics.accepted(request.prompt_tokens, request.key, request.api, _adapter(request))
        self.sessions.accepted(request)
        if choice.brownout_from:
            self.metrics.brownout(choice.brownout_from, choice.tier)
        if choice.fallback_from:
            self.metrics.fell_back(choice.fallback_from, choice.tier)

    def tokens(self, request: Job, count: int, now: float, since_last: float | None) -> None:
        """Counts tokens that a client has, ``since_last`` seconds after the previous ones; None for the first."""
        self.metrics.tokens(count, since_last, request.key, request.tier, request.api, _adapter(request))
        self.rolling.tokens(count, now)

    def answered(self, request: Job, finished: inference_pb2.Finished, now: float, decode_base: int) -> None:
        """Counts a complete answer. ``decode_base`` is that of ``AnswerState``."""
        tier = finished.parts[-1].tier if request.adapter is None else request.tier
        self.metrics.answered(finished, tier)
        self._signals.finished(finished, tier, now, decode_base)
        self.rolling.answered(finished, now)
        self.sessions.answered(request, finished.usage)

    def ended(self, request: Job, failure: BaseException | None) -> None:
        """Counts the end of a request; ``failure`` is None if it was answered."""
        self.metrics.ended(failure, request.tier, request.api)


def _adapter(request: Job) -> str:
    return "" if request.adapter is None else request.adapter.name
