"""``overfill chaos-clients``: kill clients at random moments and see how soon their KV is free."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import click

from overfill.cli.output import print_json

_BOUND = 1.0  # seconds


@click.command("chaos-clients")
@click.option(
    "--pair", default="tiny", show_default=True, help="A named pair, the folder of one, or tiny: random weights."
)
@click.option("--kills", type=click.IntRange(1), default=1000, show_default=True, help="Clients to kill.")
@click.option("--prefill", type=click.IntRange(1), default=2, show_default=True, help="Prefill workers.")
@click.option("--decode", type=click.IntRange(1), default=3, show_default=True, help="Decode workers.")
@click.option("--max-tokens", type=click.IntRange(2), default=200, show_default=True, help="Length of the answers.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of moments and prompts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def chaos_clients_command(
    pair: str, kills: int, prefill: int, decode: int, max_tokens: int, seed: int, as_json: bool
) -> int:
    """Start a stack on this machine and kill its clients with SIGKILL, one by one, while their answers come.

    Exits 1 unless every KV block on every worker was free within a second of each kill.
    """
    from overfill.lab.commands.chaos import prepare
    from overfill.lab.faults.vanishing import run_vanishing
    from overfill.telemetry.progress import show_progress

    with ExitStack() as exits:
        report = exits.enter_context(show_progress())
        plan, prompts, _ = prepare(pair, prefill, decode, 1, exits, report, {})
        result = asyncio.run(run_vanishing(plan, prompts, kills, max_tokens, seed, report))
    delays = sorted(result.delays)
    figures = {
        "kills": len(delays),
        "had_blocks_after_the_kill": result.holding,
        "finished_before": result.finished,
        "freed_p50": round(delays[len(delays) // 2], 3),
        "freed_p99": round(delays[int(0.99 * (len(delays) - 1))], 3),
        "freed_max": round(delays[-1], 3),
    }
    if as_json:
        print_json(figures)
    else:
        for name, value in figures.items():
            click.echo(f"{name.replace('_', ' ')}: {value}")
    return 0 if delays[-1] <= _BOUND else 1
