"""``overfill bench route``: what a routing decision costs, by the number of workers."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from overfill.cli.options import Number
from overfill.routing.policies import DECODE_DEFAULT, DECODE_POLICIES, POLICIES, PREFILL_DEFAULT, PolicyName


@click.command("route")
@click.option("--workers", default="10,100,1000", show_default=True, help="Workers of each stage, separated by commas.")
@click.option(
    "--requests", type=click.IntRange(100), default=20000, show_default=True, help="Requests for each number."
)
@click.option("--rate", type=Number(1), default=10000.0, show_default=True, help="Requests per virtual second.")
@click.option("--prefill-policy", type=click.Choice(list(POLICIES)), default=PREFILL_DEFAULT, show_default=True)
@click.option("--decode-policy", type=click.Choice(DECODE_POLICIES), default=DECODE_DEFAULT, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document per line on stdout.")
def route_command(
    workers: str, requests: int, rate: float, prefill_policy: PolicyName, decode_policy: PolicyName, as_json: bool
) -> None:
    """Time the dispatcher's decisions without sockets: goal, the same for 10 workers and for 1,000."""
    from overfill.lab.bench.route import measure

    try:
        counts = [int(count) for count in workers.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--workers: give whole numbers separated by commas, not {workers!r}") from error
    for count in counts:
        cost = measure(count, requests, rate, prefill_policy, decode_policy)
        if as_json:
            click.echo(json.dumps(asdict(cost)))
        else:
            click.echo(
                f"{count:>5} + {count} workers: {cost.decision_us:.1f} us per decision (p99 "
                f"{cost.decision_p99_us:.1f}), {cost.request_us:.1f} us per request, "
                f"{cost.report_us:.1f} us per report; {cost.waiting} wait"
            )
