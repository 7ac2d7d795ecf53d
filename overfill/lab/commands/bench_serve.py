"""``overfill bench serve``: plays the same load on one or more servers, and measures as a client."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from overfill.cli.options import Number, client_tls, option_errors, tls_options
from overfill.cli.output import console
from overfill.errors import Unavailable
from overfill.lab.commands.bench_options import install_option, json_option, plot_option
from overfill.lab.traffic.traces import Arrivals, TraceRequest

if TYPE_CHECKING:
    from overfill.lab.bench.serve.compare import Play, TargetSpec
    from overfill.lab.bench.serve.report import LoadShape
    from overfill.lab.bench.serve.saturation import RateStep
    from overfill.lab.traffic.outcome import Objective, Outcome
    from overfill.telemetry.progress import Report


class _Rate(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """A positive number, or ``saturate=NAME``."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if isinstance(value, str) and value.startswith(_SATURATE):
            return value
        return Number(0, min_open=True).convert(value, param, ctx)


_SATURATE = "saturate="
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("serve", short_help="Latency, throughput and goodput of servers under load.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("grpc://127.0.0.1:7600",),
    show_default=True,
    help="Server to measure; repeat it to compare several: NAME=http://HOST:PORT/v1, NAME=grpc://HOST:PORT, or an "
    "engine to start: colocated, openvino, vllm.",
)
@click.option("--trace", type=_FILE, help="Trace to play: Azure's CSV or Mooncake's JSON lines.  [default: synthetic]")
@click.option(
    "--requests",
    "count",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Number of requests: the first ones of a trace.",
)
@click.option(
    "--rate",
    type=_Rate(),
    help="Mean requests per second, or saturate=NAME to search the lowest rate at which fewer than 90 % of that "
    "target's requests meet --objective.  [default: the trace's; 1]",
)
@click.option(
    "--length-scale",
    type=Number(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Factor for the lengths of a trace's prompts and answers.",
)
@click.option(
    "--longest",
    type=click.IntRange(2),
    help="Maximum tokens of a prompt and its answer; longer prompts of a trace are cut.",
)
@click.option("--arrivals", type=click.Choice(get_args(Arrivals)), help="Synthetic arrivals.  [default: poisson]")
@click.option(
    "--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="Length of a synthetic prompt."
)
@click.option(
    "--output-tokens", type=click.IntRange(1), default=128, show_default=True, help="Length of a synthetic answer."
)
@click.option("--concurrency", type=click.IntRange(1), help="Maximum concurrent requests (a closed loop).")
@click.option("--objective", help="Objective for goodput, in seconds: one or more of ttft=2,itl=0.2,e2e=30.")
@click.option(
    "--timeout", type=Number(0, min_open=True), default=600, show_default=True, help="Timeout of one request, seconds."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed for synthetic arrivals.")
@click.option(
    "--vocab-size",
    type=click.IntRange(2),
    default=32_000,
    show_default=True,
    help="Prompts consist of random token ids below this number.",
)
@click.option("--model", help="Model name for OpenAI endpoints.  [default: the first that the endpoint lists]")
@click.option(
    "--api-key",
    help="API key.  [default: OPENAI_API_KEY for OpenAI endpoints, OVERFILL_API_KEY for stacks over gRPC]",
)
@tls_options
@click.option(
    "--extensions/--no-extensions",
    default=True,
    show_default=True,
    help="Use ignore_eos and token counts per message, which vLLM and our OpenAI endpoint support.",
)
@click.option(
    "--pair",
    default="identity",
    show_default=True,
    help="Model pair of engines to start; openvino and vllm run its full model.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads of engines to start.  [default: the cores]")
@install_option
@plot_option
@json_option
@option_errors()
def serve_command(
    targets: tuple[str, ...],
    trace: Path | None,
    count: int,
    rate: float | str | None,
    length_scale: float,
    longest: int | None,
    arrivals: Arrivals | None,
    prompt_tokens: int,
    output_tokens: int,
    concurrency: int | None,
    objective: str | None,
    timeout: float,
    seed: int,
    vocab_size: int,
    model: str | None,
    api_key: str | None,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_name: str | None,
    extensions: bool,
    pair: str,
    threads: int | None,
    install_peers: bool,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Measure latency, throughput and goodput of servers under load, and compare the first target with the others.

    Use it to compare servers under the same load, or to find the rate that saturates one. To test one server against
    limits, with users that come and go, use `overfill loadtest`.

    Requests are sent when they are due, without waiting for earlier ones. Targets run one after the other. Three of
    them are started here: `colocated` is our engine in one process with both halves of --pair, `openvino` is OpenVINO
    GenAI in a process, `vllm` is vLLM's OpenAI server. `colocated:fast` names another pair. The --tls options are for
    stacks over gRPC. Exits with 1 when a request failed.
    """
    from overfill.cli.progress import show_progress
    from overfill.lab.bench.serve.compare import LoadSettings, TargetSpec, open_target
    from overfill.lab.bench.serve.report import serve_rows, serve_table
    from overfill.lab.traffic.outcome import Objective
    from overfill.lab.traffic.traces import set_rate

    if trace is not None and arrivals is not None:
        raise click.UsageError("--arrivals cannot be used with --trace, which has its own arrivals; leave one out")
    specs = [TargetSpec.parse(text) for text in targets]
    if len({spec.name for spec in specs}) < len(specs):
        raise click.UsageError("two targets have the same name; name them, as in --target a=http://…")
    goal = None if objective is None else Objective.parse(objective)
    to_saturate = _target_to_saturate(rate, specs, goal, concurrency)
    number = rate if isinstance(rate, float) else None
    if trace is None:
        requests = _synthetic(count, arrivals, number, concurrency, prompt_tokens, output_tokens, seed)
    else:
        requests = _traced(trace, count, number, length_scale, longest)
    if install_peers:
        from overfill.lab.bench.engine.peers.environment import install_missing

        with show_progress() as report:
            install_missing([spec.location.partition(":")[0] for spec in specs], report)
    if plot is not None:  # before the measurement, so that a missing matplotlib is reported at once
        from overfill.lab.bench.serve.plot import save_latencies
    cores = len(os.sched_getaffinity(0))
    settings = LoadSettings(
        vocab_size,
        model,
        api_key or os.environ.get("OPENAI_API_KEY"),
        extensions,
        concurrency,
        timeout,
        pair,
        threads or cores,
        stack_key=api_key or os.environ.get("OVERFILL_API_KEY"),
        tls=client_tls(tls_ca, tls_cert, tls_key, tls_name),
    )
    max_model_len = max(r.prompt_tokens + r.output_tokens for r in requests)
    found: dict[str, list[Outcome]] = {}
    chosen: RateStep | None = None
    with show_progress() as report:

        def run(spec: TargetSpec, play: Play) -> None:
            found[spec.name] = _played(f"Load on {spec.name}", play, requests, report)

        if to_saturate is not None and goal is not None:
            with open_target(to_saturate, max_model_len, settings) as play:
                chosen = _search_rate(to_saturate.name, play, requests, goal, report)
                requests = set_rate(requests, chosen.rate)
                run(to_saturate, play)  # while it is open, because some engines take a minute to start
        for spec in specs:
            if spec.name not in found:
                with open_target(spec, max_model_len, settings) as play:
                    run(spec, play)
    outcomes = {spec.name: found[spec.name] for spec in specs}
    load = _shape(requests, trace, arrivals, concurrency, None if goal is None else str(goal))
    if to_saturate is not None and chosen is not None:
        name = to_saturate.name
        load = replace(load, saturates=name) if chosen.saturated else replace(load, not_saturated=name)
    if plot is not None:
        save_latencies(plot, _title(load), outcomes, goal)
    rows = serve_rows(outcomes, goal, load)
    if as_json:
        for row in rows:
            click.echo(row.to_json())
    else:
        console().print(_title(load))
        console().print(serve_table(rows))
    return 1 if _print_failures(outcomes) else 0


def _target_to_saturate(
    rate: float | str | None, specs: list[TargetSpec], objective: Objective | None, concurrency: int | None
) -> TargetSpec | None:
    """Target that ``rate`` names as saturate=NAME. None means that ``rate`` is a number or not given."""
    if not isinstance(rate, str):
        return None
    name = rate.removeprefix(_SATURATE)
    found = next((spec for spec in specs if spec.name == name), None)
    if found is None:
        raise click.UsageError(f"--rate {rate} names no target; choose from {', '.join(spec.name for spec in specs)}")
    if objective is None:
        raise click.UsageError(
            f"--rate {rate} needs --objective: a target is saturated when fewer than 90 % of its requests meet it"
        )
    if concurrency is not None:
        raise click.UsageError(f"--rate {rate} cannot be used with --concurrency, where the server sets the pace")
    return found


def _played(step: str, play: Play, requests: list[TraceRequest], report: Report) -> list[Outcome]:
    report(step, 0, len(requests))
    found = play(requests, partial(report, step))
    report(step, len(requests), len(requests))
    return found


def _search_rate(name: str, play: Play, requests: list[TraceRequest], objective: Objective, report: Report) -> RateStep:
    """Runs ``find_saturation`` on an open server. Every step shows a progress bar, then a line on stderr."""
    from overfill.lab.bench.serve.saturation import find_saturation
    from overfill.lab.traffic.outcome import figures
    from overfill.lab.traffic.traces import set_rate

    def attainment(rate: float) -> float:
        found = _played(f"{name} at {rate:.2f} per second", play, set_rate(requests, rate), report)
        return sum(objective.met(outcome) for outcome in found) / len(found)

    # The throughput when all requests arrive at once is close to the rate to find.
    burst = _played(f"{name}, all at once", play, [replace(r, arrival=0.0) for r in requests], report)
    first = next(figure.value for figure in figures(burst, None) if figure.name == "requests")
    if not first:
        raise Unavailable(f"{name} did not answer any request when all were sent at once")
    return find_saturation(first, attainment, lambda step: click.echo(f"{name}, {step}", err=True))


def _synthetic(
    count: int,
    arrivals: Arrivals | None,
    rate: float | None,
    concurrency: int | None,
    prompt_tokens: int,
    output_tokens: int,
    seed: int,
) -> list[TraceRequest]:
    from overfill.lab.traffic.traces import synthetic

    # In a closed loop the server sets the pace, so all requests are due at once.
    kind = arrivals or ("burst" if concurrency is not None and rate is None else "poisson")
    return synthetic(count, kind, rate or 1.0, prompt_tokens, output_tokens, seed)


def _traced(
    trace: Path, count: int, rate: float | None, length_scale: float, longest: int | None
) -> list[TraceRequest]:
    from overfill.lab.traffic.traces import read_trace, scale_lengths, set_rate

    requests = scale_lengths(read_trace(trace, count), length_scale, longest)
    return requests if rate is None else set_rate(requests, rate)


def _shape(
    requests: list[TraceRequest],
    trace: Path | None,
    arrivals: Arrivals | None,
    concurrency: int | None,
    objective: str | None,
) -> LoadShape:
    from overfill.lab.bench.serve.report import LoadShape

    span = requests[-1].arrival
    return LoadShape(
        source=trace.name if trace is not None else arrivals or "synthetic",
        requests=len(requests),
        rate=(len(requests) - 1) / span if span > 0 else None,
        concurrency=concurrency,
        prompt_tokens=sum(r.prompt_tokens for r in requests) / len(requests),
        output_tokens=sum(r.output_tokens for r in requests) / len(requests),
        objective=objective,
    )


def _title(load: LoadShape) -> str:
    pace = "at once" if load.rate is None else f"{load.rate:.2f} per second"
    if load.saturates is not None:
        pace += f", the lowest rate tried that saturates {load.saturates}"
    if load.not_saturated is not None:
        pace += f", up to which {load.not_saturated} was not saturated"
    if load.concurrency is not None:
        pace += f", at most {load.concurrency} concurrent"
    return (
        f"{load.requests} requests ({load.source}), {pace}; on average {load.prompt_tokens:.0f} tokens in, "
        f"{load.output_tokens:.0f} out" + (f"; objective: {load.objective}" if load.objective else "")
    )


def _print_failures(outcomes: dict[str, list[Outcome]]) -> bool:
    """Prints the first failure of each target on stderr. Returns True if any request failed."""
    failed = {name: [o.error for o in of_one if not o.ok] for name, of_one in outcomes.items()}
    for name, errors in failed.items():
        if errors:
            click.echo(f"{name}: {len(errors)} requests failed; the first: {errors[0]}", err=True)
    return any(failed.values())
