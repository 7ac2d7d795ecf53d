"""Tests the policy in Serve's controller: the numbers that it reads, and the targets that it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import cloudpickle

from overfill.routing.signals import COUNTS
from overfill.stack.ray import policy as policy_module
from overfill.stack.ray.policy import ScalingPolicy, latest, name_signals

STATE = ("ready", "colocated", "draining", "waiting_jobs", "waiting_tokens", "running", "kv_tokens", "max_num_seqs")
ZERO = dict.fromkeys(
    [
        *COUNTS,
        *(f"{s}_{f}" for s in ("prefill", "decode") for f in STATE),
        "queued_jobs",
        "queued_for_decode",
        "queued_tokens",
    ],
    0.0,
)


@dataclass
class App:
    """Stands in for Serve: three deployments and ``others``, and the last report of each router."""

    routers: dict[str, dict[str, float]] = field(default_factory=dict)
    decode_target: int = 1
    tiers: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    now: float = 100.0

    def contexts(self) -> dict[str, Any]:
        def context(name: str, most: int, target: int, metrics: Any = None) -> Any:
            return SimpleNamespace(
                deployment_name=name,
                capacity_adjusted_min_replicas=1,
                capacity_adjusted_max_replicas=most,
                target_num_replicas=target,
                raw_metrics=metrics,
            )

        series: dict[str, dict[str, list[Any]]] = {}
        for router, numbers in self.routers.items():
            for name, value in numbers.items():
                points = [SimpleNamespace(value=-1.0), SimpleNamespace(value=value)]
                series.setdefault(name, {})[router] = points
        return {
            "id-r": context("router", 1, 1, series),
            "id-p": context("prefill", 4, 1),
            **{f"id-d-{tier}": context(f"decode-{tier}", 6, 1) for tier in self.tiers},
            **({} if self.tiers else {"id-d": context("decode", 6, self.decode_target)}),
            **{f"id-{name}": context(name, 5, 1) for name in self.others},
        }


def make(app: App, **settings: Any) -> ScalingPolicy:
    return ScalingPolicy(clock=lambda: app.now, **settings)


def busy(running: int, **changes: float) -> dict[str, float]:
    return ZERO | {"prefill_ready": 1, "decode_ready": 1, "decode_running": running} | changes


def test_nothing_is_decided_before_a_router_has_reported() -> None:
    app = App()
    assert make(app)(app.contexts()) == ({}, {})


def test_only_the_two_pools_are_decided_on_and_by_the_routers_numbers() -> None:
    app = App({"r1": busy(0)})
    decide = make(app, step=[0.05, 0.01, 0.0], itl=0.1, stabilise=10)
    assert decide(app.contexts())[0] == {"id-p": 1, "id-d": 1}
    app.now += 1
    app.routers["r1"] = busy(16)  # a batch of 4 meets the objective: (0.1 * 0.9 - 0.05) / 0.01
    assert decide(app.contexts())[0] == {"id-p": 1, "id-d": 4}
    app.routers["r1"] = busy(0)
    app.decode_target = 4
    for _ in range(9):
        app.now += 1
        assert decide(app.contexts())[0]["id-d"] == 4
    app.now += 5
    assert decide(app.contexts())[0]["id-d"] == 1


def test_workers_with_both_stages_are_none_of_a_deployments_replicas() -> None:
    app = App({"r1": busy(0, decode_ready=2, decode_colocated=2)}, decode_target=2)
    decide = make(app, step=[0.05, 0.01, 0.0], itl=0.1)
    assert decide(app.contexts())[0]["id-d"] == 2, "both replicas start"
    app.now += 1
    app.routers["r1"] = busy(24, decode_ready=4, decode_colocated=2)
    assert decide(app.contexts())[0]["id-d"] == 4, "of six workers that 24 sequences need"


def of_tier(tier: str, numbers: dict[str, float]) -> dict[str, float]:
    return {f"{name}.{tier}": value for name, value in numbers.items() if not name.startswith(("prefill", "queued_t"))}


def test_each_tiers_deployment_follows_its_own_load_and_prefill_the_sum() -> None:
    app = App(tiers=("full", "fast"))
    decide = make(app, step=[0.05, 0.01, 0.0], tiers={"fast": {"step": [0.01, 0.005, 0.0]}})
    app.routers["r1"] = busy(32, decode_ready=2) | of_tier("full", busy(16)) | of_tier("fast", busy(16))
    assert decide(app.contexts())[0] == {"id-p": 1, "id-d-full": 4, "id-d-fast": 1}, "16 fit into one step of fast"
    app.now += 1
    counts = {"arrivals": 10.0, "arrived_tokens": 10_000.0, "arrived_tokens_squared": 1e7}
    idle = dict.fromkeys(counts, 0.0)
    app.routers["r1"] |= counts | of_tier("full", counts) | of_tier("fast", idle)
    assert decide(app.contexts())[0] == {"id-p": 2, "id-d-full": 5, "id-d-fast": 1}


def test_a_single_named_tier_has_the_numbers_without_a_name() -> None:
    app = App({"r1": busy(16)}, tiers=("full",))
    assert make(app, step=[0.05, 0.01, 0.0])(app.contexts())[0] == {"id-p": 1, "id-d-full": 4}


def test_each_revisions_deployments_follow_its_own_load() -> None:
    app = App({"r1": busy(16)}, others=("prefill-r2", "decode-r2"))
    decide = make(app, step=[0.05, 0.01, 0.0])
    assert decide(app.contexts())[0] == {"id-p": 1, "id-d": 4}, "no router knows the new revision yet"
    app.now += 1
    app.routers["r1"] = busy(4) | name_signals(busy(20), "r2")
    assert decide(app.contexts())[0] == {"id-p": 1, "id-d": 4, "id-prefill-r2": 1, "id-decode-r2": 5}
    app.now += 1
    app.routers["r1"] = busy(4)  # a router without the new revision took its place
    assert decide(app.contexts())[0]["id-decode-r2"] == 5


def test_a_tier_has_other_settings_in_one_revision_if_they_are_given() -> None:
    app = App(others=("prefill-r2", "decode-full-r2", "decode-fast-r2"), tiers=("full", "fast"))
    fast: dict[str, Any] = {"step": [0.01, 0.005, 0.0]}
    decide = make(app, step=[0.05, 0.01, 0.0], tiers={"fast": fast, "fast-r2": {}})
    load = busy(32) | of_tier("full", busy(16)) | of_tier("fast", busy(16))
    app.routers["r1"] = load | name_signals(load, "r2")
    expected = {"decode-full": 4, "decode-fast": 1, "decode-full-r2": 4, "decode-fast-r2": 4}
    sizes = {app.contexts()[id].deployment_name: size for id, size in decide(app.contexts())[0].items()}
    assert sizes == {"prefill": 1, "prefill-r2": 1} | expected


def test_bounds_are_the_deployments() -> None:
    app = App({"r1": busy(500)})
    assert make(app, step=[0.05, 0.01, 0.0])(app.contexts())[0] == {"id-p": 1, "id-d": 6}


def test_targets_hold_between_decisions_and_while_no_router_reports() -> None:
    app = App({"r1": busy(16)})
    decide = make(app, step=[0.05, 0.01, 0.0])
    wanted = decide(app.contexts())[0]
    app.routers["r1"] = busy(500)
    app.now += 0.1
    assert decide(app.contexts())[0] == wanted
    app.routers.clear()
    app.now += 10
    assert decide(app.contexts())[0] == wanted


def test_two_routers_see_the_same_workers_and_different_queues() -> None:
    app = App({"r1": busy(8, queued_for_decode=4, queued_jobs=4), "r2": busy(8, queued_for_decode=4, queued_jobs=4)})
    assert make(app, step=[0.05, 0.01, 0.0])(app.contexts())[0]["id-d"] == 4  # 8 running and 8 queued, 4 per worker


def test_the_newest_complete_numbers_of_each_router_count() -> None:
    def points(*values: float) -> list[Any]:
        return [SimpleNamespace(value=value) for value in values]

    metrics = {
        "arrivals": {"a": points(1, 2)},
        "running_requests": {"a": points(0), "b": points(0)},
        "empty": {"a": []},
    }
    assert latest(metrics) == {"a": {"arrivals": 2, "running_requests": 0}}


def test_serve_can_ship_the_policy_to_its_controller_by_value() -> None:
    cloudpickle.register_pickle_by_value(policy_module)
    try:
        shipped = cloudpickle.loads(cloudpickle.dumps(ScalingPolicy))
    finally:
        cloudpickle.unregister_pickle_by_value(policy_module)
    app = App({"r1": busy(0)})
    assert shipped(clock=lambda: app.now, ttft=1.0)(app.contexts())[0] == {"id-p": 1, "id-d": 1}
