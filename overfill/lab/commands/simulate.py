"""``overfill simulate``: plays a trace on modelled workers, placed and scaled by the real router's code."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.core import ParameterSource

from overfill.cli.options import Number, OutPath, option_errors
from overfill.cli.output import console, print_json
from overfill.lab.simulate.policies import DEFAULT, NAMES
from overfill.lab.traffic.traces import Arrivals, TraceKind, TraceRequest

if TYPE_CHECKING:
    from overfill.lab.simulate.options import SimTier, SimulationOptions
    from overfill.lab.simulate.profiles import Profile
    from overfill.lab.traffic.outcome import Objective
    from overfill.routing.scaling import ScalingConfig
    from overfill.settings.tiers import TierSpec

_POSITIVE = Number(0, min_open=True)
_TIER_SETTINGS = ("share", "weights")


@dataclass(frozen=True, slots=True)
class _Load:
    """The requests of a simulation: one or more traces, one after another."""

    traces: tuple[str, ...]
    count: int | None
    rate: float | None
    rate_scale: float
    length_scale: float
    longest: int | None
    arrivals: Arrivals
    prompt_tokens: int
    output_tokens: int
    seed: int

    def requests(self) -> list[TraceRequest]:
        from overfill.lab.traffic.traces import concatenate, scale_lengths, scale_rate, set_rate

        parts = []
        for name in self.traces:
            part = self._read(name)
            if self.rate is not None and not name.startswith(("synthetic", "sessions:")):
                part = set_rate(part, self.rate)
            parts.append(scale_lengths(part, self.length_scale, self.longest))
        return scale_rate(concatenate(parts), self.rate_scale)

    def _read(self, name: str) -> list[TraceRequest]:
        from overfill.lab.traffic.traces import read_trace, sessions, synthetic

        kind, _, path = name.partition(":")
        if kind == "sessions":
            chats, turns, system = map(int, path.split(":"))
            lengths = self.prompt_tokens, self.output_tokens
            return sessions(chats, turns, system, self.rate or 1.0, *lengths, self.seed)[: self.count]
        if kind == "synthetic":
            rate, _, count = path.partition(":")
            size, speed = int(count or self.count or 1000), float(rate or self.rate or 1.0)
            return synthetic(size, self.arrivals, speed, self.prompt_tokens, self.output_tokens, self.seed)
        if kind in get_args(TraceKind):
            return read_trace(Path(path), self.count, kind)  # type: ignore[arg-type]
        return read_trace(Path(name), self.count)


@click.command("simulate")
@click.option(
    "--trace",
    "traces",
    multiple=True,
    default=("synthetic",),
    show_default=True,
    callback=lambda _context, _option, names: _check_traces(names),
    help="Trace to play: FILE, azure:FILE, mooncake:FILE, synthetic, synthetic:RATE:REQUESTS with its own rate and "
    "number of requests, or sessions:CHATS:TURNS:TOKENS, chats that share a system prompt of TOKENS. Repeat it to play "
    "several one after another.",
)
@click.option(
    "--requests",
    "count",
    type=click.IntRange(1),
    help="Play the first N requests of each trace.  [default: all; synthetic: 1000]",
)
@click.option(
    "--rate", type=_POSITIVE, help="Mean requests per second of each trace.  [default: the trace's; synthetic: 1]"
)
@click.option(
    "--rate-scale", type=_POSITIVE, default=1.0, show_default=True, help="Factor for the rate of all requests."
)
@click.option(
    "--length-scale",
    type=_POSITIVE,
    default=1.0,
    show_default=True,
    help="Factor for the lengths of prompts and answers.",
)
@click.option(
    "--longest", type=click.IntRange(2), help="Maximum tokens of a prompt and its answer; longer prompts are cut."
)
@click.option(
    "--arrivals",
    type=click.Choice(get_args(Arrivals)),
    default="poisson",
    show_default=True,
    help="Arrivals of synthetic requests.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Length of a synthetic prompt, or new tokens of each turn.",
)
@click.option(
    "--output-tokens", type=click.IntRange(1), default=128, show_default=True, help="Length of a synthetic answer."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Random seed for synthetic arrivals, policies and failures."
)
@click.option(
    "--profile",
    "profile_name",
    default="cpu",
    show_default=True,
    help="Speed of the workers: cpu (measured), h100, h100-l4, h100-l4-full, l4 (estimated from datasheets), a JSON "
    "file with a profile, or a file with the output of `overfill bench prefill --json` and `decode --json`.",
)
@click.option(
    "--prefill",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Number of prefill workers; with --autoscale at the start.",
)
@click.option(
    "--decode",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Number of decode workers; with --autoscale at the start.",
)
@click.option(
    "--colocated",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of workers with both stages. With them, --prefill and --decode are 0 by default.",
)
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    metavar="NAME=PROFILE[:N][,SETTING=VALUE...]",
    help="A tier with N decode workers of this profile; repeat it for each tier. Settings: share (weight of the "
    "requests that ask for it; 1), weights (bytes of its decoder's weights, as a multiple of the profile's; the parts "
    "of a step that do not read KV take that much longer), ttft-objective, itl-objective, max (with --autoscale).",
)
@click.option(
    "--brownout",
    default="",
    metavar="'TIER > TIER...'",
    help="With --tier: tiers from the best to the cheapest; the next answers when one would miss an objective.",
)
@click.option(
    "--brownout-share",
    type=Number(0, 1),
    default=1.0,
    show_default=True,
    help="With --brownout: share of the requests that allow it.",
)
@click.option("--policy", type=click.Choice(NAMES), default=DEFAULT, show_default=True, help="Routing policy.")
@click.option(
    "--prefix-cache",
    type=click.Choice(["on", "off"]),
    default="on",
    show_default=True,
    help="Whether prefill workers cache prompts.",
)
@click.option(
    "--kv-peers/--no-kv-peers", default=True, show_default=True, help="Whether workers lend each other KV of prompts."
)
@click.option(
    "--kv-disk-size",
    default="0",
    show_default=True,
    metavar="SIZE",
    callback=lambda _context, _option, text: _size_in_bytes(text),
    help="KV that each prefill worker keeps on disk, such as 50GiB.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Maximum requests in the router's queue for a tier; further ones are refused.",
)
@click.option(
    "--max-wait", type=_POSITIVE, help="Refuse requests that would wait longer, in seconds.  [default: no limit]"
)
@click.option(
    "--objective",
    default="ttft=2,itl=0.1",
    show_default=True,
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
    "--attainment",
    type=Number(0.5, 1),
    default=0.95,
    show_default=True,
    help="With --size: share of requests that must meet --objective.",
)
@click.option(
    "--costs", default="1,1", show_default=True, help="With --size: costs of a prefill and of a decode worker."
)
@click.option("--compare-policies", is_flag=True, help="Run the trace with every policy and print a table.")
@click.option(
    "--check",
    is_flag=True,
    help="After every event, check all counters, and that no request waits while a worker could serve it; slow.",
)
@click.option(
    "--plot",
    type=OutPath("picture"),
    help="Plot the timeline to this file: .png, .svg or .pdf.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@option_errors()
def simulate_command(
    traces: tuple[str, ...],
    count: int | None,
    rate: float | None,
    rate_scale: float,
    length_scale: float,
    longest: int | None,
    arrivals: Arrivals,
    prompt_tokens: int,
    output_tokens: int,
    seed: int,
    profile_name: str,
    prefill: int,
    decode: int,
    colocated: int,
    tiers: tuple[str, ...],
    brownout: str,
    brownout_share: float,
    policy: str,
    prefix_cache: str,
    kv_peers: bool,
    kv_disk_size: int,
    max_queue: int,
    max_wait: float | None,
    objective: str,
    startup: float | None,
    mtbf: float | None,
    autoscale: bool,
    max_workers: int | None,
    size: bool,
    attainment: float,
    costs: str,
    compare_policies: bool,
    check: bool,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Play a trace on modelled workers: print latencies and goodput, or size the pools. Time is virtual.

    The router's own code places, queues and scales. A profile says how long a worker takes for its work.
    """
    from overfill.lab.simulate.options import SimulationOptions
    from overfill.lab.simulate.profiles import load_profile
    from overfill.lab.traffic.outcome import Objective

    if sum((size, compare_policies, autoscale)) > 1:
        raise click.UsageError("--size, --compare-policies and --autoscale exclude each other: give only one of them")
    if max_workers is not None and not autoscale:
        raise click.UsageError("--max-workers needs --autoscale; without it, pools have --prefill and --decode workers")
    if plot is not None and (size or compare_policies):
        raise click.UsageError("--plot draws the timeline of one run; leave out --size and --compare-policies")
    if tiers and (size or compare_policies):
        raise click.UsageError("--tier: leave out --size and --compare-policies")
    prefill, decode = _single_stage_workers(prefill, decode, colocated)
    if colocated and (size or autoscale or tiers):
        raise click.UsageError("--colocated: leave out --size, --autoscale and --tier; the number of workers is fixed")
    if tiers and _given("decode"):
        raise click.UsageError("--decode: each --tier has its number of decode workers; leave out --decode")
    goal = Objective.parse(objective)
    made, order = _tiers(tiers, brownout)
    profile = load_profile(profile_name)
    if startup is not None:
        profile = replace(profile, startup=startup)
    load = _Load(traces, count, rate, rate_scale, length_scale, longest, arrivals, prompt_tokens, output_tokens, seed)
    requests = load.requests()
    options = SimulationOptions(
        prefill=prefill,
        decode=decode,
        colocated=colocated,
        tiers=made,
        brownout=order,
        brownout_share=brownout_share,
        goal=goal,
        policy=policy,
        scaling=_scaling(profile, goal, max_workers) if autoscale else None,
        prefix_cache=prefix_cache == "on",
        kv_peers=kv_peers,
        kv_disk_size=kv_disk_size,
        max_queue=max_queue,
        max_wait=max_wait,
        mtbf=mtbf,
        check=check,
        seed=seed,
    )
    if size:
        return _size(requests, profile, options, goal, attainment, _costs(costs), as_json)
    if compare_policies:
        return _compare(requests, profile, options, goal, as_json)
    return _run(requests, profile, options, goal, plot, as_json)


def _given(option: str) -> bool:
    return click.get_current_context().get_parameter_source(option) is not ParameterSource.DEFAULT


def _single_stage_workers(prefill: int, decode: int, colocated: int) -> tuple[int, int]:
    """Returns the numbers of workers with one stage. Raises UsageError when a stage has no worker."""
    if colocated:
        return prefill if _given("prefill") else 0, decode if _given("decode") else 0
    if not (prefill and decode):
        raise click.UsageError("--prefill and --decode: each stage needs a worker; 0 needs --colocated")
    return prefill, decode


def _run(
    requests: list[TraceRequest],
    profile: Profile,
    options: SimulationOptions,
    objective: Objective,
    plot: Path | None,
    as_json: bool,
) -> int:
    from overfill.cli.progress import show_progress
    from overfill.lab.simulate.stack import Simulation
    from overfill.lab.simulate.tables import errors_text, run_table, tier_table, title

    with show_progress() as report:
        simulation = Simulation(requests, profile, options)
        result = simulation.run(lambda done, total: report("Simulating", done, total))
    if plot is not None:
        from overfill.lab.simulate.plot import save_timeline

        save_timeline(plot, title(result), result)
    if as_json:
        print_json(result.to_json(objective))
    else:
        console().print(run_table(result, objective))
        if options.tiers:
            console().print(tier_table(result, objective))
        if failures := errors_text(result):
            console().print(failures)
    return 0


def _size(
    requests: list[TraceRequest],
    profile: Profile,
    options: SimulationOptions,
    objective: Objective,
    attainment: float,
    costs: tuple[float, float],
    as_json: bool,
) -> int:
    from overfill.cli.progress import show_progress
    from overfill.lab.simulate.sizing import SizeSearch
    from overfill.lab.simulate.tables import size_json, size_table

    with show_progress() as report:
        runs: list[tuple[int, int]] = []

        def on_run(prefill: int, decode: int, met: bool) -> None:
            runs.append((prefill, decode))
            report(f"Tried {prefill} + {decode} workers", len(runs), len(runs) + 1)

        search = SizeSearch(requests, profile, options, objective, attainment, costs, on_run=on_run)
        sizes = search.frontier()
    if as_json:
        print_json(size_json(sizes, objective, attainment, search.runs))
    else:
        console().print(size_table(sizes, objective, attainment, search.runs))
    return 0


def _compare(
    requests: list[TraceRequest], profile: Profile, options: SimulationOptions, objective: Objective, as_json: bool
) -> int:
    from overfill.cli.progress import show_progress
    from overfill.lab.simulate.stack import Simulation
    from overfill.lab.simulate.tables import policy_table

    results = []
    with show_progress() as report:
        for number, name in enumerate(NAMES):
            report("Policies", number, len(NAMES))
            results.append(Simulation(requests, profile, replace(options, policy=name)).run())
        report("Policies", len(NAMES), len(NAMES))
    if as_json:
        print_json([result.to_json(objective) for result in results])
    else:
        console().print(policy_table(results, objective))
    return 0


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


def _tiers(texts: tuple[str, ...], brownout: str) -> tuple[tuple[SimTier, ...], tuple[str, ...]]:
    """Reads ``--tier`` and ``--brownout``. Raises UsageError."""
    from overfill.lab.simulate.options import SimTier
    from overfill.lab.simulate.profiles import load_profile
    from overfill.settings.tiers import TierSpec, check_tiers, parse_order

    try:
        specs, order = [TierSpec.parse(text) for text in texts], parse_order(brownout)
        assert isinstance(order, tuple)
        check_tiers(specs, brownout=order)
        tiers = []
        for spec in specs:
            if unknown := sorted({*spec.settings, *(["fallback"] if spec.fallback else [])}.difference(_TIER_SETTINGS)):
                allowed = ", ".join((*_TIER_SETTINGS, "ttft-objective", "itl-objective", "max"))
                raise ValueError(f"tier {spec.name!r}: {unknown[0]} is unknown; allowed are {allowed}")
            own = {name: _setting(spec, name) for name in spec.settings}
            profile = load_profile(spec.pair)
            profile = replace(profile, decode=profile.decode.with_weights(own.get("weights", 1.0)))
            goals = (spec.ttft_objective, spec.itl_objective)
            tiers.append(SimTier(spec.name, profile, spec.replicas, spec.max_replicas, own.get("share", 1.0), *goals))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if tiers and not any(tier.share for tier in tiers):
        raise click.UsageError("--tier: no request asks for any tier; give at least one a share above 0")
    return tuple(tiers), order


def _setting(spec: TierSpec, name: str) -> float:
    """Returns a tier's setting as a number. Raises ValueError if it is none, or too small."""
    try:
        value = float(spec.settings[name])
    except ValueError:
        value = -1.0
    if not (0 < value < inf or (value == 0 and name == "share")):
        raise ValueError(f"tier {spec.name!r}: {name} must be a number above 0, got {spec.settings[name]!r}")
    return value


def _check_traces(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name.startswith("synthetic:") and not re.fullmatch(r"synthetic:[0-9.]*[1-9][0-9.]*(:[1-9][0-9]*)?", name):
            raise click.BadParameter(f"{name!r}: expected synthetic:RATE or synthetic:RATE:REQUESTS, both above 0")
        if name.startswith("sessions:") and not re.fullmatch(r"sessions(:[1-9][0-9]*){2}:[0-9]+", name):
            raise click.BadParameter(f"{name!r}: expected sessions:CHATS:TURNS:TOKENS, the first two above 0")
    return names


def _size_in_bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise click.BadParameter(f"must be a size such as 50GiB, got {text!r}") from None


def _costs(text: str) -> tuple[float, float]:
    try:
        prefill, decode = (float(part) for part in text.split(","))
    except ValueError:
        prefill = decode = 0.0
    if not (prefill > 0 and decode > 0):
        raise click.UsageError(f"--costs: must be two positive numbers such as 3,1, got {text!r}")
    return prefill, decode
