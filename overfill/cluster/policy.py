"""The application-level autoscaling policy: Serve's contexts in, the library's ``Scaler`` asked, targets out.

Runs in Serve's controller, which calls it in every turn of its loop. Imports no Ray: contexts are read by attribute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from overfill.cluster.spec import DECODE, PREFILL, ROUTER
from overfill.routing.capacity import StepCost
from overfill.routing.scaling import Bounds, PoolState, Scaler, ScalingConfig
from overfill.routing.signals import SignalReader

INTERVAL = 1.0
"""Seconds between decisions."""


class ScalingPolicy:
    """Decides the size of the prefill and decode deployments from what the router deployment reports.

    Args:
        clock: seconds, monotonic.
        settings: fields of ``ScalingConfig``, but for the bounds, which are the deployments' own; ``step`` is a list:
            seconds per step, per sequence and per KV token.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, **settings: Any) -> None:
        self._clock = clock
        self._config = scaling_config(settings)
        self._reader: SignalReader | None = None
        self._bounds: tuple[Bounds, Bounds] | None = None
        self._decided_at = -INTERVAL
        self._decision: dict[str, int] = {}

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Serve's interface: deployments' contexts by id; the replicas wanted by id, and no state."""
        pools = {context.deployment_name: context for context in contexts.values()}
        now = self._clock()
        if now - self._decided_at >= INTERVAL and {ROUTER, PREFILL, DECODE} <= pools.keys():
            self._decided_at = now
            self._decide(now, pools)
        wanted = {
            id: self._decision[context.deployment_name]
            for id, context in contexts.items()
            if context.deployment_name in self._decision
        }
        return wanted, {}

    def _decide(self, now: float, pools: Mapping[str, Any]) -> None:
        routers = latest(pools[ROUTER].raw_metrics or {})
        if not routers:
            return  # none has reported yet, or the only one is being replaced: what was decided holds
        reader = self._reader_for(pools)
        prefill, decode = reader.read(now, routers)
        targets = reader.scaler.targets(
            now, _with_starting(prefill, pools[PREFILL]), _with_starting(decode, pools[DECODE])
        )
        self._decision = {PREFILL: targets.prefill, DECODE: targets.decode}

    def _reader_for(self, pools: Mapping[str, Any]) -> SignalReader:
        bounds = (_bounds(pools[PREFILL]), _bounds(pools[DECODE]))
        if self._reader is None or bounds != self._bounds:
            self._bounds = bounds
            self._reader = SignalReader(Scaler(replace(self._config, prefill=bounds[0], decode=bounds[1])), {})
        return self._reader


def scaling_config(settings: Mapping[str, Any]) -> ScalingConfig:
    """The scaler's configuration, without bounds. Raises ValueError naming what is wrong."""
    known = ScalingConfig.__dataclass_fields__.keys() - {"prefill", "decode"}
    if unknown := sorted(settings.keys() - known):
        raise ValueError(
            f"{', '.join(unknown)}: no such setting of the scaling policy; there are {', '.join(sorted(known))}"
        )
    step = {"step": StepCost(*settings["step"])} if "step" in settings else {}
    return ScalingConfig(**{**settings, **step})


def latest(metrics: Mapping[str, Mapping[Any, Any]]) -> dict[str, dict[str, float]]:
    """Each replica's newest numbers, complete ones only, from Serve's time series: metric -> replica -> points."""
    replicas: dict[str, dict[str, float]] = {}
    for name, series in metrics.items():
        for replica, points in series.items():
            if points:
                replicas.setdefault(str(replica), {})[name] = points[-1].value
    return {replica: numbers for replica, numbers in replicas.items() if "arrivals" in numbers}


def _bounds(context: Any) -> Bounds:
    return Bounds(context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas)


def _with_starting(state: PoolState, context: Any) -> PoolState:
    """Replicas that Serve has asked for and that no router knows yet are starting."""
    return replace(state, starting=max(0, context.target_num_replicas - state.ready))
