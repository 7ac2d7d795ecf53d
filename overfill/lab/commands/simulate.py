"""``overfill simulate``: a trace on modelled workers, placed and scaled by the real router's code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from overfill.cli.options import Number
from overfill.cli.output import console, print_json
from overfill.lab.traffic.traces import Arrivals, TraceKind, TraceRequest

if TYPE_CHECKING:
    from overfill.lab.simulate.options import Options
    from overfill.lab.simulate.profiles import Profile
    from overfill.lab.traffic.outcome import Objective
    from overfill.routing.scaling import ScalingConfig

_POSITIVE = Number(0, min_open=True)


@dataclass(frozen=True, slots=True)
class _Load:
    """What is asked of the stack: one or more traces in a row."""

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
            if self.rate is not None and name != "synthetic":
                part = set_rate(part, self.rate)
            parts.append(scale_lengths(part, self.length_scale, self.longest))
        return scale_rate(concatenate(parts), self.rate_scale)

    def _read(self, name: str) -> list[TraceRequest]:
        from overfill.lab.traffic.traces import read_trace, synthetic

        if name == "synthetic":
            size = self.count or 1000
            return synthetic(size, self.arrivals, self.rate or 1.0, self.prompt_tokens, self.output_tokens, self.seed)
        kind, _, path = name.partition(":")
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
    help="FILE, azure:FILE, mooncake:FILE or synthetic; several are played one after the other.",
)
@click.option("--requests", "count", type=click.IntRange(1), help="The first so many of each.  [default: all; 1000]")
@click.option("--rate", type=_POSITIVE, help="Mean requests per second of each trace.  [default: the trace's; 1]")
@click.option("--rate-scale", type=_POSITIVE, default=1.0, show_default=True, help="Times as many per second.")
@click.option("--length-scale", type=_POSITIVE, default=1.0, show_default=True, help="Times as long.")
@click.option("--longest", type=click.IntRange(2), help="Most tokens of a prompt with its answer; prompts are cut.")
@click.option("--arrivals", type=click.Choice(get_args(Arrivals)), default="poisson", help="Synthetic.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="Synthetic.")
@click.option("--output-tokens", type=click.IntRange(1), default=128, show_default=True, help="Synthetic.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of synthetic arrivals, policies and failures.")
@click.option(
    "--profile",
    "profile_name",
    default="cpu",
    show_default=True,
    help="Of the workers: cpu (measured), h100, h100-l4, l4 (from datasheets), a JSON file of a profile, or the output "
    "of `overfill bench prefill --json` and `decode --json`.",
)
@click.option(
    "--prefill", type=click.IntRange(1), default=1, show_default=True, help="Workers; with --autoscale at first."
)
@click.option(
    "--decode", type=click.IntRange(1), default=1, show_default=True, help="Workers; with --autoscale at first."
)
@click.option("--policy", default="default", show_default=True, help="Who gets a request.")
@click.option(
    "--prefix-cache", type=click.Choice(["on", "off"]), default="on", show_default=True, help="Of prefill workers."
)
@click.option(
    "--max-queue", type=click.IntRange(1), default=1024, show_default=True, help="Requests; more are refused."
)
@click.option("--slo", default="ttft=2,itl=0.1", show_default=True, help="The objective, in seconds: ttft, itl, e2e.")
@click.option("--startup", type=Number(0), help="Seconds until a new worker takes work.  [default: the profile's]")
@click.option("--mtbf", type=_POSITIVE, help="Workers die after so many seconds on average and are replaced.")
@click.option("--autoscale", is_flag=True, help="The scaling policy adds and drains workers.")
@click.option("--max-workers", type=click.IntRange(2), help="With --autoscale: most of both kinds together.")
@click.option("--use-all", is_flag=True, help="With --max-workers: always run them all, and only divide them.")
@click.option("--size", is_flag=True, help="Search how many of each kind the objective needs.")
@click.option("--attainment", type=Number(0.5, 1), default=0.95, show_default=True, help="Of requests, for --size.")
@click.option("--costs", default="1,1", show_default=True, help="Of a prefill and a decode worker, for --size.")
@click.option("--compare-policies", is_flag=True, help="A table of all policies.")
@click.option("--check", is_flag=True, help="Hold the books and the waiting rule after every event; slow.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the timeline to this file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
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
    policy: str,
    prefix_cache: str,
    max_queue: int,
    slo: str,
    startup: float | None,
    mtbf: float | None,
    autoscale: bool,
    max_workers: int | None,
    use_all: bool,
    size: bool,
    attainment: float,
    costs: str,
    compare_policies: bool,
    check: bool,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Play a trace on modelled workers under a virtual clock: latencies, goodput, and how many workers it takes.

    Placement, queueing and scaling are the router's own code; what a worker takes for its work comes from a profile.
    """
    from overfill.lab.simulate.options import Options
    from overfill.lab.simulate.profiles import load_profile
    from overfill.lab.traffic.outcome import Objective

    if sum((size, compare_policies, autoscale)) > 1:
        raise click.UsageError("--size, --compare-policies and --autoscale exclude each other")
    if max_workers is not None and not autoscale:
        raise click.UsageError("--max-workers is for --autoscale; fixed pools have --prefill and --decode workers")
    if plot is not None and (size or compare_policies):
        raise click.UsageError("--plot draws the timeline of one run; leave out --size and --compare-policies")
    if use_all and max_workers is None:
        raise click.UsageError("--use-all needs --max-workers: all of how many")
    objective = Objective.parse(slo)
    profile = load_profile(profile_name)
    if startup is not None:
        profile = replace(profile, startup=startup)
    load = _Load(traces, count, rate, rate_scale, length_scale, longest, arrivals, prompt_tokens, output_tokens, seed)
    requests = load.requests()
    options = Options(
        prefill=prefill,
        decode=decode,
        policy=policy,
        scaling=_scaling(profile, objective, max_workers, use_all) if autoscale else None,
        prefix_cache=prefix_cache == "on",
        max_queue=max_queue,
        mtbf=mtbf,
        check=check,
        seed=seed,
    )
    if size:
        return _size(requests, profile, options, objective, attainment, _costs(costs), as_json)
    if compare_policies:
        return _compare(requests, profile, options, objective, as_json)
    return _run(requests, profile, options, objective, plot, as_json)


def _run(
    requests: list[TraceRequest],
    profile: Profile,
    options: Options,
    objective: Objective,
    plot: Path | None,
    as_json: bool,
) -> int:
    from overfill.lab.simulate.stack import Simulation
    from overfill.lab.simulate.tables import errors_text, run_table, title
    from overfill.telemetry.progress import show_progress

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
        if failures := errors_text(result):
            console().print(failures)
    return 0


def _size(
    requests: list[TraceRequest],
    profile: Profile,
    options: Options,
    objective: Objective,
    attainment: float,
    costs: tuple[float, float],
    as_json: bool,
) -> int:
    from overfill.lab.simulate.sizing import SizeSearch
    from overfill.lab.simulate.tables import size_json, size_table
    from overfill.telemetry.progress import show_progress

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
    requests: list[TraceRequest], profile: Profile, options: Options, objective: Objective, as_json: bool
) -> int:
    from overfill.lab.simulate.policies import NAMES
    from overfill.lab.simulate.stack import Simulation
    from overfill.lab.simulate.tables import policy_table
    from overfill.telemetry.progress import show_progress

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


def _scaling(profile: Profile, objective: Objective, max_workers: int | None, use_all: bool) -> ScalingConfig:
    from overfill.routing.scaling import Bounds, ScalingConfig

    given: dict[str, Any] = {name: limit for name in ("ttft", "itl") if (limit := getattr(objective, name)) is not None}
    bounds = Bounds(1, max_workers - 1 if max_workers is not None else 1024)
    return ScalingConfig(
        **given,
        prefill=bounds,
        decode=bounds,
        max_total=max_workers,
        use_all=use_all,
        prefill_rate=profile.prefill_rate,
        step=profile.decode.cost,
        max_batch=profile.decode.max_seqs,
    )


def _costs(text: str) -> tuple[float, float]:
    try:
        prefill, decode = (float(part) for part in text.split(","))
    except ValueError:
        prefill = decode = 0.0
    if not (prefill > 0 and decode > 0):
        raise click.UsageError(f"--costs: two positive numbers such as 3,1, got {text!r}")
    return prefill, decode
