"""``overfill bench burst``: a burst of requests, and how the pools of a running stack follow it."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from overfill.cli.options import Number
from overfill.cli.output import console, print_json


@click.command("burst")
@click.option("--address", default="127.0.0.1:7600", show_default=True, help="The stack's router.")
@click.option("--before", type=Number(0), default=20.0, show_default=True, help="Quiet seconds before.")
@click.option("--during", type=Number(0), default=60.0, show_default=True, help="Seconds of the burst.")
@click.option("--after", type=Number(0), default=120.0, show_default=True, help="Quiet seconds after.")
@click.option("--rate", type=Number(0), default=0.5, show_default=True, help="Requests/s when quiet.")
@click.option("--burst-rate", type=Number(0), default=8.0, show_default=True, help="Requests/s in the burst.")
@click.option("--prompt-words", type=click.IntRange(1), default=32, show_default=True, help="Words of each prompt.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Longest answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of arrivals and prompts.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the timeline to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def burst_command(address: str, plot: Path | None, as_json: bool, **burst: Any) -> int:
    """Send a burst of requests to a running stack and watch how many workers it has.

    Exits 1 when a request failed, and when the decode pool did not grow or did not come back to what it was.
    """
    from overfill.client import AsyncClient
    from overfill.lab.bench.burst import Burst, BurstResult, quantile, run_burst
    from overfill.telemetry.progress import show_progress

    async def run() -> BurstResult:
        with show_progress() as report:
            async with AsyncClient(address) as client:
                return await run_burst(client, Burst(**burst), report)

    result = asyncio.run(run())
    if plot is not None:
        from overfill.lab.bench.plots import save_burst

        save_burst(plot, result)
    first, last = result.samples[0], result.samples[-1]
    figures = {
        "answers": result.answers,
        "failed": len(result.errors),
        "migrations": result.migrations,
        "decode_workers": [first.decode, result.most("decode"), last.decode],
        "prefill_workers": [first.prefill, result.most("prefill"), last.prefill],
        "ttft_p50": round(quantile([value for _, value in result.ttft], 0.5), 4),
        "ttft_p95": round(quantile([value for _, value in result.ttft], 0.95), 4),
        "itl_p50": round(quantile([value for _, value in result.itl], 0.5), 4),
        "itl_p95": round(quantile([value for _, value in result.itl], 0.95), 4),
    }
    if as_json:
        print_json(figures | {"errors": result.errors[:10], "samples": [asdict(sample) for sample in result.samples]})
    else:
        for name, value in figures.items():
            console().print(f"{name.replace('_', ' ')}: {value}")
    followed = first.decode < result.most("decode") and last.decode == first.decode
    return 0 if followed and not result.errors else 1
