"""Runs the scaling policy on one router's own signals, so that its metrics show the recommended pool sizes.

On Ray the application's policy adds up all routers and decides (``overfill.cluster.policy``); with one router both see
the same signals. Without Ray, operators read the recommendation and size the pools themselves.
"""

from __future__ import annotations

from overfill.routing.scaling import Scaler, ScalingConfig, Targets
from overfill.routing.signals import SignalReader, Signals

INTERVAL = 1.0
"""Seconds between recommendations; the same as in the policy on Ray."""


class ScalingAdvisor:
    """Feeds a ``Scaler`` with ``signals``, as the policy on Ray does."""

    def __init__(self, signals: Signals, config: ScalingConfig) -> None:
        self._signals = signals
        self._reader = SignalReader(Scaler(config), {})

    def expected_itl(self, tier: str, batch: float) -> float:
        """Predicts the mean time between tokens, in seconds, of a sequence of ``tier`` in a batch of this size."""
        return self._reader.scaler.expected_itl(batch)

    def recommend(self, now: float) -> Targets:
        """Returns the recommended pool sizes. Call it about every ``INTERVAL``; ``now`` is in seconds, monotonic."""
        prefill, decode = self._reader.read(now, {"": self._signals.read(now)})
        return self._reader.scaler.targets(now, prefill, decode)
