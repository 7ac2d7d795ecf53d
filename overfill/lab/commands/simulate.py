"""``overfill simulate``: plays a trace on modelled workers, placed and scaled by the real router's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from math import inf
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from overfill.cli.options import TIER, Number, option_errors
from overfill.lab.commands.bench_options import Counts, json_option
from overfill.lab.simulate.load import Load
from overfill.lab.simulate.options import DEFAULT_POLICY, POLICY_NAMES
from overfill.settings.tiers import TierSpec

if TYPE_CHECKING:
    from overfill.lab.simulate.options import SimTier
    from overfill.lab.simulate.profiles import Profile
    from overfill.lab.traffic.outcome import Objective
    from overfill.routing.scaling import ScalingConfig

_POSITIVE = Number(0, min_open=True)
_COUNT = click.IntRange(1)
_TIER_SETTINGS = ("share", "weights")


def _size_in_bytes(_context: click.Context, _option: click.Parameter, text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise click.BadParameter(f"must be a size such as 50GiB, got {text!r}") from None


@click.command("simulate", context_settings={"show_default": True})
@click.option(
    "--trace",
    multiple=True,
    default=("synthetic",),
    help="Trace to play: FILE, azure:FILE, mooncake:FILE, synthetic, synthetic:RATE:REQUESTS with its own rate and "
    "number of requests, or sessions:CHATS:TURNS:TOKENS, chats that share a system prompt of TOKENS. Repeat it to play "
    "several one after another.",
)
@click.option(
    "--requests", type=_COUNT, help="Play the first N requests of each trace.  [default: all; synthetic: 1000]"
)
@click.option(
    "--rate", type=_POSITIVE, help="Mean requests per second of each trace.  [default: the trace's; synthetic: 1]"
)
@click.option("--rate-scale", type=_POSITIVE, default=1.0, help="Factor for the rate of all requests.")
@click.option("--length-scale", type=_POSITIVE, default=1.0, help="Factor for the lengths of prompts and answers.")
@click.option(
    "--longest", type=click.IntRange(2), help="Maximum tokens of a prompt and its answer; longer prompts are cut."
)
@click.option("--prompt-tokens", type=_COUNT, default=512, help="Length of a synthetic prompt; in chats, of a turn's.")
@click.option("--output-tokens", type=_COUNT, default=128, help="Length of a synthetic answer.")
@click.option("--seed", default=0, help="Random seed for synthetic arrivals, policies and failures.")
@click.option(
    "--profile",
    "profile_name",
    default="cpu",
    help="Speed of the workers: cpu (measured), h100, h100-l4, h100-l4-full, l4 (estimated from datasheets), a JSON "
    "file with a profile, or a file with the output of `overfill bench prefill --json` and `decode --json`.",
)
@click.option(
    "--prefill", type=click.IntRange(0), default=1, help="Number of prefill workers; with --autoscale at the start."
)
@click.option(
    "--decode", type=click.IntRange(0), default=1, help="Number of decode workers; with --autoscale at the start."
)
@click.option(
    "--colocated",
    type=click.IntRange(0),
    default=0,
    help="Number of workers with both stages. With them, --prefill and --decode are 0 by default.",
)
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
    "--brownout-share", type=Number(0, 1), default=1.0, help="With --brownout: share of the requests that allow it."
)
@click.option("--policy", type=click.Choice(POLICY_NAMES), default=DEFAULT_POLICY, help="Routing policy.")
@click.option("--kv-peers/--no-kv-peers", default=True, help="Whether workers lend each other KV of prompts.")
@click.option(
    "--kv-disk-size",
    default="0",
    metavar="SIZE",
    callback=_size_in_bytes,
    help="KV that each prefill worker keeps on disk, such as 50GiB.",
)
@click.option(
    "--max-wait", type=_POSITIVE, help="Refuse requests that would wait longer, in seconds.  [default: no limit]"
)
@click.option(
    "--objective",
    default="ttft=2,itl=0.1",
    help="Objective of each request, in seconds: one or more of ttft, itl, e2e.",
)
@click.option(
    "--startup", type=Number(0), help="Seconds from starting a worker until it is ready.  [default: the profile's]"
)
@click.option("--mtbf", type=_POSITIVE, help="Mean seconds until a worker dies and is replaced.  [default: never]")
@click.option("--autoscale", is_flag=True, help="Let the scaling policy add and drain workers.")
@click.option("--max-workers", type=click.IntRange(2), help="With --autoscale: maximum workers of both kinds together.")
@click.option("--size", is_flag=True, help="Search how many workers of each kind the objective needs.")
@click.option(
    "--attainment", type=Number(0.5, 1), default=0.95, help="With --size: share of requests that must meet --objective."
)
@click.option("--costs", type=Counts(), default="1,1", help="With --size: costs of a prefill and of a decode worker.")
@click.option(
    "--check",
    is_flag=True,
    help="After every event, check all counters, and that no request waits while a worker could serve it; slow.",
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
    costs: tuple[int, ...],
    as_json: bool,
    **given: Any,
) -> int:
    """Play a trace on modelled workers: print latencies and goodput, or size the pools. Time is virtual.

    The router's own code places, queues and scales. A profile says how long a worker takes for its work.
    """
    from overfill.cli.progress import show_progress
    from overfill.lab.measurement import print_measurements
    from overfill.lab.simulate.options import SimulationOptions
    from overfill.lab.simulate.profiles import load_profile
    from overfill.lab.simulate.result import PERCENTILES
    from overfill.lab.simulate.sizing import COLUMNS, SizeSearch
    from overfill.lab.simulate.stack import Simulation
    from overfill.lab.traffic.outcome import Objective

    _check_combination(given, tiers, size=size, autoscale=autoscale, max_workers=max_workers)
    goal = Objective.parse(objective)
    made, order = _tiers(tiers, brownout)
    profile = load_profile(profile_name)
    if startup is not None:
        profile = replace(profile, startup=startup)
    seed = given.pop("seed")
    load = Load(seed=seed, **{f.name: given.pop(f.name) for f in fields(Load) if f.name in given})
    requests = load.read()
    scaling = _scaling(profile, goal, max_workers) if autoscale else None
    options = SimulationOptions(tiers=made, brownout=order, objective=goal, scaling=scaling, seed=seed, **given)
    with show_progress() as report:
        if size:
            if len(costs) != 2:
                raise click.UsageError(f"--costs: must be two numbers such as 3,1, got {','.join(map(str, costs))}")
            search = SizeSearch(
                requests, profile, options, attainment, costs, on_run=lambda one, n: report(f"Tried {one}", n, n + 1)
            )
            sizes = search.frontier()
        else:
            result = Simulation(requests, profile, options).run(lambda done, total: report("Simulating", done, total))
    if size:
        return print_measurements(sizes, as_json, COLUMNS)
    return print_measurements(result.measurements(), as_json, PERCENTILES)


def _check_combination(
    given: dict[str, Any], tiers: Sequence[TierSpec], *, size: bool, autoscale: bool, max_workers: int | None
) -> None:
    """Raises UsageError for options that exclude each other. With colocated workers, sets the defaults of others."""
    source = click.get_current_context().get_parameter_source
    if size and autoscale:
        raise click.UsageError("--size and --autoscale exclude each other: give only one of them")
    if max_workers is not None and not autoscale:
        raise click.UsageError("--max-workers needs --autoscale; without it, pools have --prefill and --decode workers")
    if tiers and size:
        raise click.UsageError("--tier: leave out --size")
    if given["colocated"]:
        if size or autoscale or tiers:
            raise click.UsageError(
                "--colocated: leave out --size, --autoscale and --tier; the number of workers is fixed"
            )
        given |= {name: 0 for name in ("prefill", "decode") if source(name) is ParameterSource.DEFAULT}
    elif not (given["prefill"] and given["decode"]):
        raise click.UsageError("--prefill and --decode: each stage needs a worker; 0 needs --colocated")
    if tiers and source("decode") is not ParameterSource.DEFAULT:
        raise click.UsageError("--decode: each --tier has its number of decode workers; leave out --decode")


def _scaling(profile: Profile, objective: Objective, max_workers: int | None) -> ScalingConfig:
    from overfill.routing.scaling import Bounds, ScalingConfig

    given: dict[str, Any] = {name: limit for name in ("ttft", "itl") if (limit := getattr(objective, name)) is not None}
    bounds = Bounds(1, max_workers - 1 if max_workers is not None else 1024)
    return ScalingConfig(
        **given,
        prefill=bounds,
        decode=bounds,
        max_total=max_workers,
        prefill_rate=profile.prefill_rate,
        step=profile.decode.cost,
        max_batch=profile.decode.max_num_seqs,
    )


def _tiers(specs: Sequence[TierSpec], brownout: str) -> tuple[tuple[SimTier, ...], tuple[str, ...]]:
    """Makes the tiers of ``--tier`` and the order of ``--brownout``. Raises UsageError if one is wrong."""
    from overfill.lab.simulate.options import SimTier
    from overfill.lab.simulate.profiles import load_profile
    from overfill.settings.tiers import check_tiers, parse_order

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
            goals = (spec.ttft_objective, spec.itl_objective)
            tiers.append(SimTier(spec.name, profile, spec.replicas, spec.max_replicas, share, *goals))
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
