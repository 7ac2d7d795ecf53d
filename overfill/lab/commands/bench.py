"""``overfill bench``: a subcommand per kind of measurement; each prints a table or a JSON line per figure."""

from __future__ import annotations

import click

from overfill.lab.commands.bench_engine import decode_command, prefill_command
from overfill.lab.commands.bench_fan_out import fan_out_command
from overfill.lab.commands.bench_handoff import handoff_command
from overfill.lab.commands.bench_router import router_command
from overfill.lab.commands.bench_serve import serve_command
from overfill.lab.commands.bench_sessions import sessions_command
from overfill.lab.commands.bench_tasks import tasks_command
from overfill.lab.commands.bench_vllm import vllm_command


@click.group("bench")
def bench_group() -> None:
    """Measure the engine, the handoff, the router, or whole servers on this machine."""


for command in (
    decode_command,
    prefill_command,
    fan_out_command,
    handoff_command,
    router_command,
    serve_command,
    sessions_command,
    tasks_command,
    vllm_command,
):
    bench_group.add_command(command)
