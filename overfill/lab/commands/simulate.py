"""``overfill simulate``: plays a trace on modelled workers, placed and scaled by the real router's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from math import inf
from typing import Any

import click
from click.core import ParameterSource

from overfill.cli.options import TIER, Number, field_options, option_errors
from overfill.lab.commands.bench_options import Listed, json_option
from overfill.lab.simulate.load import Load
from overfill.lab.simulate.options import SimTier, SimulationOptions
from overfill.lab.simulate.profiles import load_profile
from overfill.lab.traffic.outcome import Objective
from overfill.routing.scaling import Bounds, ScalingConfig
from overfill.settings.tiers import TierSpec, check_tiers, parse_order

_TIER_SETTINGS = ("share", "weights")


@click.command("simulate", context_settings={"show_default": True})
@field_options(Load)
@click.option(
    "--profile",
    "profile_name",
    default="cpu",
    help="Speed of the workers: cpu (measured), h100, h100-l4, h100-l4-full, l4 (estimated from datasheets), a JSON "
    "file with a profile, or a file with the output of `overfill bench prefill --json` and `decode --json`.",
)
@field_options(SimulationOptions)
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    type=TIER,
    metavar="NAME=PROFILE[:N][,SETTING=VALUE...]",
    help="A tier with N decode workers of this profile; repeat it for each tier. Settings: share (weight of the "
    "requests that ask for it; 1), weights (bytes of its decoder's weights, as a multiple of the profile's; the parts "
    "of a step that do not read KV take that much longer), ttft-objective, itl-objective, max (with --autoscale).",
)
@click.option(
    "--brownout",
    default="",
    show_default=False,
    metavar="'TIER > TIER...'",
    help="With --tier: tiers from the best to the cheapest; the next answers when one would miss an objective.",
)
@click.option(
    "--objective",
    default="ttft=2,itl=0.1",
    help="Objective of each request, in seconds: one or more of ttft, itl, e2e.",
)
@click.option(
    "--startup", type=Number(0), help="Seconds from starting a worker until it is ready.  [default: the profile's]"
)
@click.option("--autoscale", is_flag=True, help="Let the scaling policy add and drain workers.")
@click.option("--max-workers", type=click.IntRange(2), help="With --autoscale: maximum workers of both kinds together.")
@click.option("--size", is_flag=True, help="Search how many workers of each kind the objective needs.")
@click.option(
    "--attainment", type=Number(0.5, 1), default=0.95, help="With --size: share of requests that must meet --objective."
)
@click.option(
    "--costs",
    type=Listed("numbers", Number(0, min_open=True)),
    default="1,1",
    help="With --size: costs of a prefill and of a decode worker.",
)
@json_option
@option_errors()
def simulate_command(
    profile_name: str,
    startup: float | None,
    tiers: tuple[TierSpec, ...],
    brownout: str,
    objective: str,
    autoscale: bool,
    max_workers: int | None,
    size: bool,
    attainment: float,
    costs: tuple[float, ...],
    as_json: bool,
    **given: Any,
) -> int:
    """Play a trace on modelled workers: print latencies and goodput, or size the pools. Time is virtual.

    The router's own code places, queues and scales. A profile says how long a worker takes for its work.
    """
    from overfill.cli.progress import show_progress
    from overfill.lab.measurement import Measurement, print_measurements
    from overfill.lab.simulate.result import PERCENTILES
    from overfill.lab.simulate.sizing import SIZE_COLUMNS, smallest_sizes
    from overfill.lab.simulate.stack import Simulation

    _check_combination(given, tiers, size=size, autoscale=autoscale, max_workers=max_workers)
    goal = Objective.parse(objective)
    made, order = _tiers(tiers, brownout, goal)
    profile = load_profile(profile_name)
    if startup is not None:
        profile = replace(profile, startup=startup)
    load = Load(**{f.name: given.pop(f.name) for f in fields(Load)})
    requests = load.read()
    scaling = None
    if autoscale:
        bounds = Bounds(1, 1024 if max_workers is None else max_workers - 1)
        scaling = ScalingConfig(prefill=bounds, decode=bounds, max_total=max_workers, prefill_rate=profile.prefill_rate)
    options = SimulationOptions(**given, tiers=made, brownout=order, objective=goal, scaling=scaling, seed=load.seed)
    if len(costs) != 2:
        raise click.UsageError(
            f"--costs: must be two numbers such as 3,1, got {','.join(f'{cost:g}' for cost in costs)}"
        )
    rows: Sequence[Measurement]
    with show_progress() as report:
        if size:
            rows, columns = smallest_sizes(requests, profile, options, attainment, costs, report), SIZE_COLUMNS
        else:
            rows, columns = Simulation(requests, profile, options).run(report).measurements(), PERCENTILES
    return print_measurements(rows, as_json, columns)


def _check_combination(
    given: dict[str, Any], tiers: Sequence[TierSpec], *, size: bool, autoscale: bool, max_workers: int | None
) -> None:
    """Raises UsageError for options that exclude each other. With colocated workers, sets the defaults of others."""
    source = click.get_current_context().get_parameter_source
    modes = {"--size": size, "--colocated": given["colocated"], "--autoscale": autoscale, "--tier": tiers}
    chosen = [flag for flag, on in modes.items() if on]
    if len(chosen) > 1 and chosen != ["--autoscale", "--tier"]:
        raise click.UsageError(f"{' and '.join(chosen)} exclude each other: give only one of them")
    if max_workers is not None and not autoscale:
        raise click.UsageError("--max-workers needs --autoscale; without it, pools have --prefill and --decode workers")
    if given["colocated"]:
        given |= {name: 0 for name in ("prefill", "decode") if source(name) is ParameterSource.DEFAULT}
    elif not (given["prefill"] and given["decode"]):
        raise click.UsageError("--prefill and --decode: each stage needs a worker; 0 needs --colocated")
    if tiers and source("decode") is not ParameterSource.DEFAULT:
        raise click.UsageError("--decode: each --tier has its number of decode workers; leave out --decode")


def _tiers(specs: Sequence[TierSpec], brownout: str, goal: Objective) -> tuple[tuple[SimTier, ...], tuple[str, ...]]:
    """Makes the tiers of ``--tier`` and the order of ``--brownout``. Raises UsageError if one is wrong."""
    tiers = []
    try:
        order = parse_order(brownout)
        assert isinstance(order, tuple)
        check_tiers(specs, brownout=order)
        for spec in specs:
            if unknown := sorted({*spec.settings, *(["fallback"] if spec.fallback else [])}.difference(_TIER_SETTINGS)):
                allowed = ", ".join((*_TIER_SETTINGS, "ttft-objective", "itl-objective", "max"))
                raise ValueError(f"tier {spec.name!r}: {unknown[0]} is unknown; allowed are {allowed}")
            share, weights = (_setting(spec, name) for name in _TIER_SETTINGS)
            profile = load_profile(spec.pair)
            profile = replace(profile, decode=profile.decode.with_weights(weights))
            own = replace(goal, ttft=spec.ttft_objective or goal.ttft, itl=spec.itl_objective or goal.itl)
            tiers.append(SimTier(spec.name, profile, spec.replicas, spec.max_replicas, share, own))
        if specs and not any(tier.share for tier in tiers):
            raise ValueError("--tier: no request asks for any tier; give at least one a share above 0")
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    return tuple(tiers), order


def _setting(spec: TierSpec, name: str) -> float:
    """Returns a tier's setting, or 1. Raises ValueError if it is no number, or too small."""
    text = spec.settings.get(name, "1")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 < value < inf or (value == 0 and name == "share")):
        raise ValueError(f"tier {spec.name!r}: {name} must be a number above 0, got {text!r}")
    return value
