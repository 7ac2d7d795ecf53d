"""Runs the scaling policy on one router's own traffic, so that its metrics show how many workers that traffic needs.

Needs of several routers add up. On Ray the application's policy adds up the signals instead, and decides
(``overfill.cluster.policy``). Without Ray, KEDA or operators size the pools by the sum of the routers' needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from overfill.routing.scaling import Scaler, ScalingConfig, Targets
from overfill.routing.signals import SignalReader, Signals
from overfill.routing.tier import Objectives


class ScalingAdvisor:
    """Feeds a ``Scaler`` with one router's ``signals``.

    Args:
        objectives: objectives of each tier.
    """

    def __init__(self, signals: Signals, objectives: Mapping[str, Objectives]) -> None:
        config = ScalingConfig()
        tiers = {tier: replace(config, ttft=goal.ttft, itl=goal.itl) for tier, goal in objectives.items()}
        self._signals = signals
        self._reader = SignalReader(Scaler(config, tiers), {})

    def expected_itl(self, tier: str, batch: float) -> float:
        """Predicts the mean time between tokens, in seconds, of a sequence of ``tier`` in a batch of this size."""
        return self._reader.scaler.expected_itl(tier, batch)

    def recommend(self, now: float) -> Targets:
        """Returns the pool sizes for this router's requests. Call it about every ``scaling.INTERVAL``.

        ``now`` is in seconds, monotonic.
        """
        self._reader.read(now, {"": self._signals.read(now)})
        return self._reader.scaler.targets(now, *self._signals.own_pools(now))
