"""``overfill bench``: a subcommand per kind of measurement; each prints a table or a JSON line per figure."""

from __future__ import annotations

import signal

import click

from overfill.lab.commands.bench_curve import curve_command
from overfill.lab.commands.bench_engine import decode_command, prefill_command
from overfill.lab.commands.bench_quality import quality_command
from overfill.lab.commands.bench_router import router_command
from overfill.lab.commands.bench_vllm import vllm_command


@click.group("bench")
@click.pass_context
def bench_group(context: click.Context) -> None:
    """Measure engines, the router, or whole servers on this machine."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops what was started, as Ctrl-C does
    context.call_on_close(lambda: signal.signal(signal.SIGTERM, before))


for command in (curve_command, decode_command, prefill_command, quality_command, router_command, vllm_command):
    bench_group.add_command(command)
