"""Application-level autoscaling policy: adapts Serve's contexts to ``routing.scaling.Scaler``.

Serve's controller calls it in every turn of its loop. The module reads contexts by attribute and imports no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from overfill.routing.capacity import StepCost
from overfill.routing.scaling import INTERVAL, Bounds, PoolState, Scaler, ScalingConfig
from overfill.routing.signals import SignalReader
from overfill.routing.tier import DEFAULT_TIER
from overfill.stack.spec import PREFILL, ROUTER, decode_tier


class ScalingPolicy:
    """Decides the sizes of the prefill deployment and of each tier's decode deployment from the routers' signals.

    Args:
        clock: monotonic clock, in seconds.
        tiers: tier -> settings that differ for its decode workers.
        settings: fields of ``ScalingConfig`` except the bounds, which come from the deployments. ``step`` is a list of
            seconds per step, per sequence and per KV token.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        tiers: Mapping[str, Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        self._clock = clock
        self._config = scaling_config(settings)
        self._tiers = {name: scaling_config({**settings, **own}) for name, own in (tiers or {}).items()}
        self._reader: SignalReader | None = None
        self._bounds: dict[str, Bounds] = {}
        self._decided_at = -INTERVAL
        self._decision: dict[str, int] = {}

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Implements Serve's interface: takes contexts by deployment id, returns target replicas by id and no state."""
        pools = {context.deployment_name: context for context in contexts.values()}
        now = self._clock()
        if now - self._decided_at >= INTERVAL and {ROUTER, PREFILL} <= pools.keys() and _decode_pools(pools):
            self._decided_at = now
            self._decide(now, pools)
        targets = {
            id: self._decision[context.deployment_name]
            for id, context in contexts.items()
            if context.deployment_name in self._decision
        }
        return targets, {}

    def _decide(self, now: float, pools: Mapping[str, Any]) -> None:
        routers = latest(pools[ROUTER].raw_metrics or {})
        if not routers:
            return  # no router has reported yet, or the only one is being replaced: keep the last decision
        reader = self._reader_for(pools)
        prefill, decode = reader.read(now, routers)
        deployments = _decode_pools(pools)
        targets = reader.scaler.targets(
            now,
            _with_starting(prefill, pools[PREFILL]),
            {tier: _with_starting(decode[tier], pools[name]) for tier, name in deployments.items()},
        )
        self._decision = {PREFILL: targets.prefill}
        self._decision |= {name: targets.decode_pools[tier].workers for tier, name in deployments.items()}

    def _reader_for(self, pools: Mapping[str, Any]) -> SignalReader:
        deployments = _decode_pools(pools)
        bounds = {name: _bounds(pools[name]) for name in (PREFILL, *deployments.values())}
        if self._reader is None or bounds != self._bounds:
            self._bounds = bounds
            tiers = {
                tier: replace(self._tiers.get(tier, self._config), decode=bounds[name])
                for tier, name in deployments.items()
            }
            self._reader = SignalReader(Scaler(replace(self._config, prefill=bounds[PREFILL]), tiers), {})
        return self._reader


def scaling_config(settings: Mapping[str, Any]) -> ScalingConfig:
    """Returns the scaler's configuration, without bounds. Raises ValueError naming a wrong setting."""
    known = ScalingConfig.__dataclass_fields__.keys() - {"prefill", "decode"}
    if unknown := sorted(settings.keys() - known):
        raise ValueError(
            f"{', '.join(unknown)}: no such setting of the scaling policy; allowed are {', '.join(sorted(known))}"
        )
    step = {"step": StepCost(*settings["step"])} if "step" in settings else {}
    return ScalingConfig(**{**settings, **step})


def latest(metrics: Mapping[str, Mapping[Any, Any]]) -> dict[str, dict[str, float]]:
    """Returns the newest numbers of each replica, if complete, from Serve's series: metric -> replica -> points."""
    replicas: dict[str, dict[str, float]] = {}
    for name, series in metrics.items():
        for replica, points in series.items():
            if points:
                replicas.setdefault(str(replica), {})[name] = points[-1].value
    return {replica: numbers for replica, numbers in replicas.items() if "arrivals" in numbers}


def _decode_pools(pools: Mapping[str, Any]) -> dict[str, str]:
    """Returns tier -> name of its deployment: ``decode``, or ``decode-TIER`` where tiers are named."""
    return {tier or DEFAULT_TIER: name for name in pools if (tier := decode_tier(name)) is not None}


def _bounds(context: Any) -> Bounds:
    return Bounds(context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas)


def _with_starting(state: PoolState, context: Any) -> PoolState:
    """Returns ``state`` with the replicas that Serve has requested but no router knows yet counted as starting."""
    return replace(state, starting=max(0, context.target_num_replicas - round(state.ready - state.colocated)))
