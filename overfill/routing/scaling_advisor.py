"""Runs the scaling policy on one router's own traffic, so that its metrics show how many workers that traffic needs.

Needs of several routers add up. On Ray the application's policy adds up the signals instead, and decides
(``overfill.stack.ray.policy``). Without Ray, KEDA or operators size the pools by the sum of the routers' needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from overfill.routing.scaling import PoolState, Scaler, ScalingConfig, Targets
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
        self._decode: Mapping[str, PoolState] = {}  # each tier's pool at the latest ``recommend``

    def expected_itl(self, tier: str, batch: float) -> float:
        """Predicts the mean time between tokens, in seconds, of a sequence of ``tier`` in a batch of this size."""
        return self._reader.scaler.expected_itl(tier, batch)

    def short_prompt(self, tier: str) -> float:
        """Returns the length of a short prompt of ``tier``; see ``Policy.set_short_prompts``.

        It is 0 before the first ``recommend``. Measured times between tokens include the prompts that workers with both
        stages have computed between steps, so the length falls as these workers compute more prompts.
        """
        pool = self._decode.get(tier)
        if pool is None:
            return 0.0
        return self._reader.scaler.short_prompt(tier, pool.running / max(1, pool.ready))

    def recommend(self, now: float) -> Targets:
        """Returns the pool sizes for this router's requests. Call it about every ``scaling.INTERVAL``.

        ``now`` is in seconds, monotonic.
        """
        _, self._decode = self._reader.read(now, {"": self._signals.read(now)})
        return self._reader.scaler.targets(now, *self._signals.own_pools(now))
