"""``overfill bench serve``: plays the same load on one or more servers, and measures as a client."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from overfill.cli.options import FILE, Number, client_tls, option_errors, tls_options
from overfill.cli.output import console
from overfill.lab.commands.bench_options import install_option, json_option
from overfill.lab.traffic.traces import Arrivals, TraceRequest

if TYPE_CHECKING:
    from overfill.lab.bench.serve.report import LoadShape
    from overfill.lab.traffic.outcome import Outcome


@click.command("serve", short_help="Latency, throughput and goodput of servers under load.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("grpc://127.0.0.1:7600",),
    show_default=True,
    help="Server to measure; repeat it to compare several: NAME=http://HOST:PORT/v1, NAME=grpc://HOST:PORT, or "
    "vllm:PAIR, which starts vLLM's server with the pair's full model.",
)
@click.option("--trace", type=FILE, help="Trace to play: Azure's CSV or Mooncake's JSON lines.  [default: synthetic]")
@click.option(
    "--requests",
    "count",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Number of requests: the first ones of a trace.",
)
@click.option("--rate", type=Number(0, min_open=True), help="Mean requests per second.  [default: the trace's; 1]")
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
@install_option
@json_option
@option_errors()
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
    install_vllm: bool,
    as_json: bool,
) -> int:
    """Measure latency, throughput and goodput of servers under load, and compare the first target with the others.

    Use it to compare servers under the same load. To test one server against limits, with users that come and go, use
    `overfill loadtest`.

    Requests are sent when they are due, without waiting for earlier ones. Targets run one after the other. The --tls
    options are for stacks over gRPC. Exits with 1 when a request failed.
    """
    from overfill.cli.progress import show_progress
    from overfill.lab.bench.serve.compare import LoadSettings, TargetSpec, play_on
    from overfill.lab.bench.serve.report import serve_rows, serve_table
    from overfill.lab.traffic.outcome import Objective

    if trace is not None and arrivals is not None:
        raise click.UsageError("--arrivals cannot be used with --trace, which has its own arrivals; leave one out")
    specs = [TargetSpec.parse(text) for text in targets]
    if len({spec.name for spec in specs}) < len(specs):
        raise click.UsageError("two targets have the same name; name them, as in --target a=http://…")
    goal = None if objective is None else Objective.parse(objective)
    if trace is None:
        requests = _synthetic(count, arrivals, rate, concurrency, prompt_tokens, output_tokens, seed)
    else:
        requests = _traced(trace, count, rate, length_scale, longest)
    if install_vllm:
        from overfill.lab.bench.engine.peers.environment import install

        with show_progress() as report:
            install("vllm", report)
    settings = LoadSettings(
        vocab_size,
        model,
        api_key or os.environ.get("OPENAI_API_KEY"),
        extensions,
        concurrency,
        timeout,
        stack_key=api_key or os.environ.get("OVERFILL_API_KEY"),
        tls=client_tls(tls_ca, tls_cert, tls_key, tls_name),
    )
    outcomes: dict[str, list[Outcome]] = {}
    with show_progress() as report:
        for spec in specs:
            step = f"Load on {spec.name}"
            report(step, 0, len(requests))
            outcomes[spec.name] = play_on(spec, requests, settings, partial(report, step))
            report(step, len(requests), len(requests))
    load = _shape(requests, trace, arrivals, concurrency, None if goal is None else str(goal))
    rows = serve_rows(outcomes, goal, load)
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
