"""``overfill bench serve``: the same load on one or more servers, as clients see it."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from overfill.cli.output import console
from overfill.simulate.traces import Arrivals, TraceRequest

if TYPE_CHECKING:
    from overfill.bench.serve.outcome import Outcome
    from overfill.bench.serve.report import LoadShape

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("serve")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("grpc://127.0.0.1:7600",),
    show_default=True,
    help="NAME=http://HOST:PORT/v1, NAME=grpc://HOST:PORT, or openvino, vllm in process; several are compared.",
)
@click.option("--trace", type=_FILE, help="Azure's CSV or Mooncake's JSON lines.  [default: synthetic arrivals]")
@click.option("--requests", "count", type=click.IntRange(1), default=100, show_default=True, help="The first so many.")
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), help="Mean requests per second.  [default: the trace's; 1]"
)
@click.option(
    "--length-scale", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="Of a trace."
)
@click.option("--longest", type=click.IntRange(2), help="Most tokens of a prompt with its answer; prompts are cut.")
@click.option("--arrivals", type=click.Choice(get_args(Arrivals)), help="Synthetic.  [default: poisson]")
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="Synthetic.")
@click.option("--output-tokens", type=click.IntRange(1), default=128, show_default=True, help="Synthetic.")
@click.option("--concurrency", type=click.IntRange(1), help="Most requests at once: a closed loop.")
@click.option("--slo", help="Count requests that meet it: ttft=2,itl=0.2,e2e=30 in seconds, any of them.")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=600, show_default=True, help="Of a request, in s."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of synthetic arrivals.")
@click.option("--vocab-size", type=click.IntRange(2), default=32_000, show_default=True, help="Prompts hold ids below.")
@click.option("--model", help="Name for OpenAI endpoints.  [default: the first they list]")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="For OpenAI endpoints.  [env: OPENAI_API_KEY]")
@click.option(
    "--extensions/--no-extensions",
    default=True,
    show_default=True,
    help="Ask OpenAI endpoints for answers of full length, as vLLM and ours know it.",
)
@click.option("--pair", default="identity", show_default=True, help="Whose full model engines in process run.")
@click.option("--threads", type=click.IntRange(1), help="Of engines in process.  [default: the cores]")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw latencies to this file.")
@click.option("--json", "as_json", is_flag=True, help="A JSON line per figure on stdout.")
def serve_command(
    targets: tuple[str, ...],
    trace: Path | None,
    count: int,
    rate: float | None,
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
    extensions: bool,
    pair: str,
    threads: int | None,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Latency, throughput and goodput of servers under load; the first target is compared with the others.

    Requests are sent when they are due, whatever becomes of earlier ones. Exit code 1 when a request failed.
    """
    from overfill.bench.serve.compare import LoadSettings, TargetSpec, play
    from overfill.bench.serve.outcome import Objective
    from overfill.bench.serve.report import serve_rows, serve_table
    from overfill.pair.progress import progress_bars

    if trace is not None and arrivals is not None:
        raise click.UsageError("--arrivals contradicts --trace, which has its own; leave one out")
    specs = [TargetSpec.parse(text) for text in targets]
    if len({spec.name for spec in specs}) < len(specs):
        raise click.UsageError("two targets have the same name; give each its own, as in --target a=http://…")
    objective = None if slo is None else Objective.parse(slo)
    if trace is None:
        requests = _synthetic(count, arrivals, rate, concurrency, prompt_tokens, output_tokens, seed)
    else:
        requests = _traced(trace, count, rate, length_scale, longest)
    cores = len(os.sched_getaffinity(0))
    settings = LoadSettings(vocab_size, model, api_key, extensions, concurrency, timeout, pair, threads or cores)
    outcomes = {}
    with progress_bars() as report:
        for spec in specs:
            step = f"Load on {spec.name}"
            report(step, 0, len(requests))
            outcomes[spec.name] = play(spec, requests, settings, partial(report, step))
            report(step, len(requests), len(requests))
    load = _shape(requests, trace, arrivals, concurrency, None if objective is None else str(objective))
    if plot is not None:
        from overfill.bench.serve.plot import save_latencies

        save_latencies(plot, _title(load), outcomes, objective)
    rows = serve_rows(outcomes, objective, load)
    if as_json:
        for row in rows:
            click.echo(row.to_json())
    else:
        console().print(_title(load))
        console().print(serve_table(rows))
    return 1 if _print_failures(outcomes) else 0


def _synthetic(
    count: int,
    arrivals: Arrivals | None,
    rate: float | None,
    concurrency: int | None,
    prompt_tokens: int,
    output_tokens: int,
    seed: int,
) -> list[TraceRequest]:
    from overfill.simulate.traces import synthetic

    # In a closed loop the server sets the pace.
    kind = arrivals or ("burst" if concurrency is not None and rate is None else "poisson")
    return synthetic(count, kind, rate or 1.0, prompt_tokens, output_tokens, seed)


def _traced(
    trace: Path, count: int, rate: float | None, length_scale: float, longest: int | None
) -> list[TraceRequest]:
    from overfill.simulate.traces import read_trace, scale_lengths, set_rate

    requests = scale_lengths(read_trace(trace, count), length_scale, longest)
    return requests if rate is None else set_rate(requests, rate)


def _shape(
    requests: list[TraceRequest],
    trace: Path | None,
    arrivals: Arrivals | None,
    concurrency: int | None,
    slo: str | None,
) -> LoadShape:
    from overfill.bench.serve.report import LoadShape

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
