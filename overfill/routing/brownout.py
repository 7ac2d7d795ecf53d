"""Brownout: under overload, a cheaper tier writes the answers of requests that allow it, instead of a refusal.

Plain arithmetic on predictions, no I/O. ``now`` is in seconds, monotonic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from overfill.routing.dispatcher import Dispatcher
from overfill.routing.pool import Roster
from overfill.routing.tier import Objectives

RECOVERED = 0.7
"""Largest load of a tier in brownout at which it still takes requests. See ``Prediction.load``."""

HOLD = 5.0
"""Seconds for which the load must stay below that before the brownout ends."""


_LEAST_SLACK = 0.1
"""Smallest slack of an objective, as a fraction of it."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a new request of a tier would get now, in seconds.

    Attributes:
        ttft: time to first token; None means unknown.
        itl: mean time between tokens; None means unknown.
        idle_ttft, idle_itl: the same without any other request.
        available: False if no worker of the tier is ready.
    """

    ttft: float | None
    itl: float | None
    idle_ttft: float = 0.0
    idle_itl: float = 0.0
    available: bool = True

    def load(self, objectives: Objectives) -> float:
        """Returns the larger share of an objective's slack that other requests use; above 1 the tier misses it.

        The slack is what an idle tier leaves of the objective. Without it, a tier whose steps take long even when it is
        idle would never be seen to recover. A tier with an idle worker and no queue has no load, because the prediction
        is then that of an idle tier.
        """
        ttft = _slack_used(self.ttft, self.idle_ttft, objectives.ttft)
        return max(ttft, _slack_used(self.itl, self.idle_itl, objectives.itl))


def _slack_used(value: float | None, idle: float, objective: float) -> float:
    slack = max(objective - idle, _LEAST_SLACK * objective)
    return 0.0 if value is None else max(0.0, value - idle) / slack


def predict(
    roster: Roster, dispatcher: Dispatcher, tier: str, now: float, expected_itl: Callable[[str, float], float]
) -> Prediction:
    """Predicts what a new request of ``tier`` would get now.

    Args:
        expected_itl: returns the mean time between tokens of a sequence of a tier in a batch of some size.
    """
    pool = roster.decode[tier]
    # Where the prefill workers are the bottleneck, another decoder would not help.
    ttft = dispatcher.expected_ttft(tier, now) if dispatcher.prefill_is_free() else None
    ready = [worker for worker in pool if pool.index.is_alive(worker)]
    batch = min((worker.requests for worker in ready), default=0) + 1
    itl, idle_itl = expected_itl(tier, batch), expected_itl(tier, 1)
    return Prediction(ttft, itl, dispatcher.idle_ttft(tier), idle_itl, available=bool(ready))


class Brownout:
    """Chooses the tiers of new requests.

    A tier's brownout begins when it is predicted to miss an objective. It then takes only requests for which it is
    predicted to keep both with a margin (``RECOVERED``), so that its workers stay in use. The brownout ends when the
    tier has had that margin for ``HOLD`` seconds.

    Args:
        order: tiers from the best to the cheapest.
        objectives: objectives of each of them.
        predict: returns what a new request of a tier would get now.
    """

    def __init__(
        self, order: Sequence[str], objectives: Mapping[str, Objectives], predict: Callable[[str], Prediction]
    ) -> None:
        self._order = tuple(order)
        self._objectives = objectives
        self._predict = predict
        self._began: dict[str, float] = {}  # tier in brownout -> last time when it was not predicted to keep the margin

    @property
    def active(self) -> frozenset[str]:
        """The tiers in brownout, as of the last call of ``update`` or ``choose``."""
        return frozenset(self._began)

    def update(self, now: float) -> None:
        """Looks at every tier. Call it about once a second, so that brownouts end without requests too."""
        for tier in self._order:
            self._overloaded(tier, now)

    def cheaper(self, tier: str) -> tuple[str, ...]:
        """Returns the tiers with a ready worker to which a request of ``tier`` may go, the best first."""
        others = self._order[self._order.index(tier) + 1 :] if tier in self._order else ()
        return tuple(other for other in others if self._predict(other).available)

    def choose(self, tier: str, may_use: Callable[[str], bool], now: float) -> str:
        """Returns the tier that should write the answer of a request that asks for ``tier`` and allows others.

        It is the best one that is not overloaded, or the cheapest if all are.

        Args:
            may_use: tells whether the request may use a tier; it may use ``tier``.
        """
        if tier not in self._order:
            return tier
        allowed = [tier, *filter(may_use, self.cheaper(tier))]
        return next((name for name in allowed if not self._overloaded(name, now)), allowed[-1])

    def _overloaded(self, tier: str, now: float) -> bool:
        """True if a request should not go to the tier now; notes whether the tier's brownout begins or ends."""
        prediction = self._predict(tier)
        if not prediction.available:
            self._began.pop(tier, None)  # a loss is no overload: it takes requests as soon as it has a worker
            return True
        load = prediction.load(self._objectives[tier])
        overloaded = load > (RECOVERED if tier in self._began else 1.0)
        if overloaded or (prediction.ttft is None and tier in self._began):  # unknown is not recovered
            self._began[tier] = now
        elif tier in self._began and now - self._began[tier] >= HOLD:
            del self._began[tier]
        return overloaded
