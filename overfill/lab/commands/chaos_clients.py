"""``overfill chaos-clients``: kills clients at random moments and measures when their KV blocks are free."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import click

from overfill.cli.output import print_json
from overfill.lab.commands.chaos import chaos_engine_options, prepare

_MAX_DELAY = 1.0  # seconds from a kill until all KV blocks are free


@click.command("chaos-clients")
@click.option(
    "--pair",
    default="tiny",
    show_default=True,
    help="Name of a pair, folder of a pair, or tiny (a small pair with random weights).",
)
@click.option("--kills", type=click.IntRange(1), default=1000, show_default=True, help="Number of clients to kill.")
@click.option("--prefill", type=click.IntRange(1), default=2, show_default=True, help="Number of prefill workers.")
@click.option("--decode", type=click.IntRange(1), default=3, show_default=True, help="Number of decode workers.")
@click.option("--max-tokens", type=click.IntRange(2), default=200, show_default=True, help="Tokens of each answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed for times and prompts.")
@chaos_engine_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def chaos_clients_command(
    pair: str, kills: int, prefill: int, decode: int, max_tokens: int, seed: int, as_json: bool, **engines: str | None
) -> int:
    """Kill clients at random moments; time how soon their KV is free.

    Starts a stack on this machine, and kills its clients one by one with SIGKILL while they receive answers.
    Exit code 0 when all KV blocks of all workers were free within one second of each kill. Exit code 1 otherwise.
    """
    from overfill.lab.faults.client_kills import kill_clients
    from overfill.telemetry.progress import show_progress

    with ExitStack() as exits:
        report = exits.enter_context(show_progress())
        plan, prompts = prepare(pair, (), {"prefill": prefill, "decode": decode}, 1, exits, report, engines)
        result = asyncio.run(kill_clients(plan, prompts, kills, max_tokens, seed, report))
    delays = sorted(result.delays)
    figures = {
        **{f"{stage}_engine": engine for stage, engine in result.engines.items()},
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
    return 0 if delays[-1] <= _MAX_DELAY else 1
