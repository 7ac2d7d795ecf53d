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
from overfill.stack.spec import DECODE, PREFILL, ROUTER, pool_name


class ScalingPolicy:
    """Decides the sizes of the prefill deployment and of each tier's decode deployment from the routers' signals.

    It decides for each revision alone, from the signals of that revision.

    Args:
        clock: monotonic clock, in seconds.
        tiers: tier -> settings that differ for its decode workers; TIER-REVISION for those of one revision.
        settings: fields of ``ScalingConfig`` except the bounds, which come from the deployments. ``step`` is a list of
            seconds per step, per sequence and per KV token. ``max_total`` is for each revision.
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
        self._readers: dict[str, SignalReader] = {}  # by revision
        self._bounds: dict[str, dict[str, Bounds]] = {}  # of each revision's deployments
        self._decided_at = -INTERVAL
        self._decision: dict[str, int] = {}

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Implements Serve's interface: takes contexts by deployment id, returns target replicas by id and no state."""
        pools = {context.deployment_name: context for context in contexts.values()}
        now = self._clock()
        if now - self._decided_at >= INTERVAL and ROUTER in pools:
            self._decided_at = now
            for revision, decode in _decode_pools(pools).items():
                self._decide(now, pools, revision, decode)
        targets = {
            id: self._decision[context.deployment_name]
            for id, context in contexts.items()
            if context.deployment_name in self._decision
        }
        return targets, {}

    def _decide(self, now: float, pools: Mapping[str, Any], revision: str, decode: Mapping[str, str]) -> None:
        """Decides for a revision. ``decode``: tier -> name of its deployment."""
        routers = latest(pools[ROUTER].raw_metrics or {}, revision)
        if not routers:
            return  # no router has reported yet, or the only one is being replaced: keep the last decision
        prefill = pool_name(PREFILL, "", revision)
        reader = self._reader_for(pools, revision, decode)
        of_prefill, of_tiers = reader.read(now, routers)
        targets = reader.scaler.targets(
            now,
            _with_starting(of_prefill, pools[prefill]),
            {tier: _with_starting(of_tiers[tier], pools[name]) for tier, name in decode.items()},
        )
        self._decision[prefill] = targets.prefill
        self._decision |= {name: targets.decode_pools[tier].workers for tier, name in decode.items()}

    def _reader_for(self, pools: Mapping[str, Any], revision: str, decode: Mapping[str, str]) -> SignalReader:
        prefill = pool_name(PREFILL, "", revision)
        bounds = {name: _bounds(pools[name]) for name in (prefill, *decode.values())}
        if revision not in self._readers or bounds != self._bounds[revision]:
            self._bounds[revision] = bounds
            tiers = {
                tier: replace(
                    self._tiers.get(f"{tier}-{revision}") or self._tiers.get(tier, self._config), decode=bounds[name]
                )
                for tier, name in decode.items()
            }
            scaler = Scaler(replace(self._config, prefill=bounds[prefill]), tiers)
            self._readers[revision] = SignalReader(scaler, {})
        return self._readers[revision]


def name_signals(numbers: Mapping[str, float], revision: str) -> dict[str, float]:
    """Returns a revision's signals under names that say it, as routers report them to Serve."""
    return {f"{name}@{revision}" if revision else name: value for name, value in numbers.items()}


def scaling_config(settings: Mapping[str, Any]) -> ScalingConfig:
    """Returns the scaler's configuration, without bounds. Raises ValueError naming a wrong setting."""
    known = ScalingConfig.__dataclass_fields__.keys() - {"prefill", "decode"}
    if unknown := sorted(settings.keys() - known):
        raise ValueError(
            f"{', '.join(unknown)}: no such setting of the scaling policy; allowed are {', '.join(sorted(known))}"
        )
    step = {"step": StepCost(*settings["step"])} if "step" in settings else {}
    return ScalingConfig(**{**settings, **step})


def latest(metrics: Mapping[str, Mapping[Any, Any]], revision: str = "") -> dict[str, dict[str, float]]:
    """Returns the newest numbers of each router that reports a revision's, if they are complete.

    Args:
        metrics: Serve's series: metric, as ``name_signals`` names it -> replica -> points.
    """
    replicas: dict[str, dict[str, float]] = {}
    for metric, series in metrics.items():
        name, _, of = metric.partition("@")
        for replica, points in series.items() if of == revision else ():
            if points:
                replicas.setdefault(str(replica), {})[name] = points[-1].value
    return {replica: numbers for replica, numbers in replicas.items() if "arrivals" in numbers}


def _decode_pools(pools: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Returns revision -> tier -> name of its decode deployment. Each revision has one prefill deployment too.

    A stack has no tier and no revision that ends like another revision.
    """
    ends = [name.removeprefix(PREFILL) for name in pools if name == PREFILL or name.startswith(f"{PREFILL}-")]
    decode: dict[str, dict[str, str]] = {end[1:]: {} for end in ends}
    for name in pools:
        if name != DECODE and not name.startswith(f"{DECODE}-"):
            continue
        end = next((end for end in ends if end and name.endswith(end)), "")
        if end[1:] in decode:
            tier = name.removeprefix(DECODE).removesuffix(end)[1:]
            decode[end[1:]][tier or DEFAULT_TIER] = name
    return {revision: by_tier for revision, by_tier in decode.items() if by_tier}


def _bounds(context: Any) -> Bounds:
    return Bounds(context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas)


def _with_starting(state: PoolState, context: Any) -> PoolState:
    """Returns ``state`` with the replicas that Serve has requested but no router knows yet counted as starting."""
    return replace(state, starting=max(0, context.target_num_replicas - round(state.ready - state.colocated)))
