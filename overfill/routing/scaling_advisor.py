"""What the scaling policy makes of one router's numbers, for its metrics: whether or not somebody follows it.

On Ray the application's own policy adds up all routers and decides (``overfill.cluster.policy``); with one router the
two see the same. Elsewhere it tells whoever sizes the pools what they should be.
"""

from __future__ import annotations

from overfill.routing.scaling import Scaler, ScalingConfig, Targets
from overfill.routing.signals import SignalReader, Signals

INTERVAL = 1.0
"""Seconds between looks, as the policy's own."""


class ScalingAdvisor:
    """Feeds a ``Scaler`` with ``signals``, as the policy would."""

    def __init__(self, signals: Signals, config: ScalingConfig) -> None:
        self._signals = signals
        self._reader = SignalReader(Scaler(config), {})

    def recommend(self, now: float) -> Targets:
        """The pools as they should be. ``now`` is in seconds, monotonic; to be called about every ``INTERVAL``."""
        prefill, decode = self._reader.read(now, {"": self._signals.read(now)})
        return self._reader.scaler.targets(now, prefill, decode)
