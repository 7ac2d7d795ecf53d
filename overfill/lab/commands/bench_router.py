"""``overfill bench router``: CPU, latency and memory of the router, beside other projects' routers."""

from __future__ import annotations

import os
import shutil
import sys

import click

from overfill.cli.options import Number
from overfill.lab.commands.bench_options import Listed, install_option, json_option, log_line, peer_pythons
from overfill.lab.measurement import print_measurements

_PEERS = ("dynamo", "smg", "vllm-router")
_ALONE = ("unshare", "-rn", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""Runs a command where loopback is the only network. Linux lets any user do so, unless it was set up otherwise."""


@click.command("router", short_help="CPU, latency and memory of the router, beside other projects' routers.")
@click.option(
    "--peers",
    type=Listed("peers", click.Choice(_PEERS), empty=True),
    help="Comma-separated: dynamo, smg, vllm-router; default: those installed.",
)
@install_option
@click.option("--seconds", type=Number(0.2), default=2.0, show_default=True, help="Duration of each part.")
@json_option
def router_command(peers: tuple[str, ...] | None, install: bool, seconds: float, as_json: bool) -> int:
    """Measure what the router costs beside others: CPU per request and per token, time to first token, memory.

    All get the same streamed chat completions over HTTP, and each has its own workers behind it: mock ones, or a bare
    server that sends the same event for every token. That server alone is the lower bound. The rows in which our router
    loses most come first. With Dynamo, the command runs in a network namespace, because Dynamo's mocker listens on all
    addresses. Exits with 1 when a bound is missed.
    """
    from overfill.cli.progress import show_progress
    from overfill.lab.bench.router.cost import measure_cost
    from overfill.lab.peers.environment import python_of
    from overfill.lab.peers.routers import other_networks

    if peers is None:
        peers = tuple(peer for peer in _PEERS if install or python_of(peer) is not None)
    peer_pythons(peers, install)
    if "dynamo" in peers and other_networks():
        if missing := [program for program in ("unshare", "ip") if shutil.which(program) is None]:
            raise click.UsageError(f"dynamo needs {' and '.join(missing)}: install them, or leave it out")
        os.execvp(_ALONE[0], [*_ALONE, sys.executable, *sys.orig_argv[1:]])
    with show_progress() as report:
        found = measure_cost(peers, seconds, log_line, report=report)
    return print_measurements(found, as_json)
