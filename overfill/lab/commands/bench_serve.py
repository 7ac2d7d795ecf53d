"""``overfill bench serve``: the same load on one or more servers, as clients see it."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from overfill.cli.options import Number, client_tls, tls_options
from overfill.cli.output import console
from overfill.errors import Unavailable
from overfill.lab.traffic.traces import Arrivals, TraceRequest

if TYPE_CHECKING:
    from overfill.lab.bench.serve.compare import Play, TargetSpec
    from overfill.lab.bench.serve.report import LoadShape
    from overfill.lab.bench.serve.saturation import Step
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


@click.command("serve")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("grpc://127.0.0.1:7600",),
    show_default=True,
    help="NAME=http://HOST:PORT/v1, NAME=grpc://HOST:PORT, or colocated, openvino, vllm, which are started; several "
    "are compared.",
)
@click.option("--trace", type=_FILE, help="Azure's CSV or Mooncake's JSON lines.  [default: synthetic arrivals]")
@click.option("--requests", "count", type=click.IntRange(1), default=100, show_default=True, help="The first so many.")
@click.option(
    "--rate",
    type=_Rate(),
    help="Mean requests per second, or saturate=NAME: the rate that just saturates that target, so that fewer than "
    "90 % of its requests meet --slo.  [default: the trace's; 1]",
)
@click.option("--length-scale", type=Number(0, min_open=True), default=1.0, show_default=True, help="Of a trace.")
@click.option("--longest", type=click.IntRange(2), help="Most tokens of a prompt with its answer; prompts are cut.")
@click.option("--arrivals", type=click.Choice(get_args(Arrivals)), help="Synthetic.  [default: poisson]")
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="Synthetic.")
@click.option("--output-tokens", type=click.IntRange(1), default=128, show_default=True, help="Synthetic.")
@click.option("--concurrency", type=click.IntRange(1), help="Most requests at once: a closed loop.")
@click.option("--slo", help="Count requests that meet it: ttft=2,itl=0.2,e2e=30 in seconds, any of them.")
@click.option("--timeout", type=Number(0, min_open=True), default=600, show_default=True, help="Of a request, in s.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of synthetic arrivals.")
@click.option("--vocab-size", type=click.IntRange(2), default=32_000, show_default=True, help="Prompts hold ids below.")
@click.option("--model", help="Name for OpenAI endpoints.  [default: the first they list]")
@click.option(
    "--api-key",
    help="Key to show.  [default: OPENAI_API_KEY for OpenAI endpoints, OVERFILL_API_KEY for stacks over gRPC]",
)
@tls_options
@click.option(
    "--extensions/--no-extensions",
    default=True,
    show_default=True,
    help="Ask OpenAI endpoints for answers of full length, as vLLM and ours know it.",
)
@click.option(
    "--pair",
    default="identity",
    show_default=True,
    help="Of engines that are started; all but ours run its full model.",
)
@click.option("--threads", type=click.IntRange(1), help="Of engines that are started.  [default: the cores]")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw latencies to this file.")
@click.option("--json", "as_json", is_flag=True, help="A JSON line per figure on stdout.")
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
    slo: str | None,
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
    plot: Path | None,
    as_json: bool,
) -> int:
    """Latency, throughput and goodput of servers under load; the first target is compared with the others.

    Requests are sent when they are due, whatever becomes of earlier ones. Targets that are started run one after the
    other: `colocated` is one process of ours with both halves of --pair, `openvino` OpenVINO GenAI in a process of its
    own and `vllm` its OpenAI server, both with the full model; `colocated:fast` and so on name another pair. Exit code
    1 when a request failed. The --tls options are for stacks over gRPC.
    """
    from overfill.lab.bench.serve.compare import LoadSettings, TargetSpec, opened
    from overfill.lab.bench.serve.report import serve_rows, serve_table
    from overfill.lab.traffic.outcome import Objective
    from overfill.lab.traffic.traces import set_rate
    from overfill.telemetry.progress import show_progress

    if trace is not None and arrivals is not None:
        raise click.UsageError("--arrivals contradicts --trace, which has its own; leave one out")
    specs = [TargetSpec.parse(text) for text in targets]
    if len({spec.name for spec in specs}) < len(specs):
        raise click.UsageError("two targets have the same name; give each its own, as in --target a=http://…")
    objective = None if slo is None else Objective.parse(slo)
    saturated = _saturated(rate, specs, objective, concurrency)
    number = rate if isinstance(rate, float) else None
    if trace is None:
        requests = _synthetic(count, arrivals, number, concurrency, prompt_tokens, output_tokens, seed)
    else:
        requests = _traced(trace, count, number, length_scale, longest)
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
    most = max(r.prompt_tokens + r.output_tokens for r in requests)
    found: dict[str, list[Outcome]] = {}
    chosen: Step | None = None
    with show_progress() as report:

        def run(spec: TargetSpec, play: Play) -> None:
            found[spec.name] = _played(f"Load on {spec.name}", play, requests, report)

        if saturated is not None and objective is not None:
            with opened(saturated, most, settings) as play:
                chosen = _saturation(saturated.name, play, requests, objective, report)
                requests = set_rate(requests, chosen.rate)
                run(saturated, play)  # while it is open: some take a minute to start
        for spec in specs:
            if spec.name not in found:
                with opened(spec, most, settings) as play:
                    run(spec, play)
    outcomes = {spec.name: found[spec.name] for spec in specs}
    slo_text = None if objective is None else str(objective)
    load = _shape(requests, trace, arrivals, concurrency, slo_text)
    if saturated is not None and chosen is not None:
        name = saturated.name
        load = replace(load, saturates=name) if chosen.saturated else replace(load, not_saturated=name)
    if plot is not None:
        from overfill.lab.bench.serve.plot import save_latencies

        save_latencies(plot, _title(load), outcomes, objective)
    rows = serve_rows(outcomes, objective, load)
    if as_json:
        for row in rows:
            click.echo(row.to_json())
    else:
        console().print(_title(load))
        console().print(serve_table(rows))
    return 1 if _print_failures(outcomes) else 0


def _saturated(
    rate: float | str | None, specs: list[TargetSpec], objective: Objective | None, concurrency: int | None
) -> TargetSpec | None:
    """The target that ``rate`` names, if it names one."""
    if not isinstance(rate, str):
        return None
    name = rate.removeprefix(_SATURATE)
    found = next((spec for spec in specs if spec.name == name), None)
    if found is None:
        raise click.UsageError(f"--rate {rate} names no target; there are {', '.join(spec.name for spec in specs)}")
    if objective is None:
        raise click.UsageError(f"--rate {rate} needs --slo: saturated is who does not meet it")
    if concurrency is not None:
        raise click.UsageError(f"--rate {rate} contradicts --concurrency, where the server sets the pace")
    return found


def _played(step: str, play: Play, requests: list[TraceRequest], report: Report) -> list[Outcome]:
    report(step, 0, len(requests))
    found = play(requests, partial(report, step))
    report(step, len(requests), len(requests))
    return found


def _saturation(name: str, play: Play, requests: list[TraceRequest], objective: Objective, report: Report) -> Step:
    """What ``find_saturation`` finds for an open server; every step is a bar, and a line on stderr."""
    from overfill.lab.bench.serve.saturation import find_saturation
    from overfill.lab.traffic.outcome import figures
    from overfill.lab.traffic.traces import set_rate

    def attainment(rate: float) -> float:
        found = _played(f"{name} at {rate:.2f} per second", play, set_rate(requests, rate), report)
        return sum(objective.met(outcome) for outcome in found) / len(found)

    # What it answers when it never waits for arrivals is near the rate that is looked for.
    burst = _played(f"{name}, all at once", play, [replace(r, arrival=0.0) for r in requests], report)
    first = next(figure.value for figure in figures(burst, None) if figure.name == "requests")
    if not first:
        raise Unavailable(f"{name} has not answered a single request of a burst")
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

    # In a closed loop the server sets the pace.
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
    slo: str | None,
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
        slo=slo,
    )


def _title(load: LoadShape) -> str:
    pace = "at once" if load.rate is None else f"{load.rate:.2f} per second"
    if load.saturates is not None:
        pace += f", the lowest rate tried that saturates {load.saturates}"
    if load.not_saturated is not None:
        pace += f", up to which {load.not_saturated} was not saturated"
    if load.concurrency is not None:
        pace += f", at most {load.concurrency} together"
    return (
        f"{load.requests} requests ({load.source}), {pace}; on average {load.prompt_tokens:.0f} tokens in, "
        f"{load.output_tokens:.0f} out" + (f"; objective: {load.slo}" if load.slo else "")
    )


def _print_failures(outcomes: dict[str, list[Outcome]]) -> bool:
    """The first failure of each target, on stderr."""
    failed = {name: [o.error for o in of_one if not o.ok] for name, of_one in outcomes.items()}
    for name, errors in failed.items():
        if errors:
            click.echo(f"{name}: {len(errors)} requests failed; the first: {errors[0]}", err=True)
    return any(failed.values())
