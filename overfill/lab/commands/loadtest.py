"""``overfill loadtest``: runs the common kinds of load test with locust, in a child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from overfill.cli.options import FILE, Number, OutPath, option_errors, tls_options
from overfill.lab.loadtest.plan import API_KEY, LoadPlan, help_of
from overfill.process.extras import require
from overfill.process.tied import tied_to_parent
from overfill.settings.environment import GRPC_ENVIRONMENT


def _plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for f in reversed([f for f in fields(LoadPlan) if not f.name.startswith("tls_")]):  # tls_options adds these
        repeatable = "separator" in f.metadata
        command = click.option(
            f"--{f.name.replace('_', '-')}",
            type=_kind(f),
            is_flag=f.metadata["kind"] is bool,
            multiple=repeatable,
            default=() if repeatable else f.default,
            envvar=f.metadata.get("variable"),
            show_envvar=True,
            show_default=f.default not in (None, "") and f.default is not False,
            help=help_of(f),
        )(command)
    return command


def _kind(f: Field[Any]) -> Any:
    if choices := f.metadata.get("choices"):
        return click.Choice(choices)
    if f.metadata["kind"] is Path:
        return OutPath("file") if "output" in f.metadata else FILE
    if "minimum" in f.metadata:
        return click.IntRange(f.metadata["minimum"])
    return Number(f.metadata["more_than"], min_open=True) if "more_than" in f.metadata else f.metadata["kind"]


@click.command("loadtest")
@_plan_options
@tls_options
@click.option("--api-key", envvar=API_KEY, show_envvar=True, help="API key, if the server requires one.")
def loadtest_command(api_key: str | None, **options: Any) -> int:
    """Load a stack or an OpenAI endpoint, and check objectives.

    Use it to test one server against limits, with users or a trace. To compare several servers under the same load, use
    `overfill bench serve`.

    Exit code 0 when every objective is met, 1 when one is missed (it is printed with the measured value), 2 when
    nothing could be measured.
    """
    require("loadtest", "`overfill loadtest`", "locust")  # runs in a child process
    from overfill.lab.loadtest.workload import Workload

    with option_errors():
        plan = LoadPlan.from_options(options)
        Workload(plan)  # reports an unreadable trace before anything starts
    return _run(plan, api_key)


def _run(plan: LoadPlan, api_key: str | None) -> int:
    command = [sys.executable, "-m", "locust", "-f", str(Path(__file__).parents[1] / "loadtest" / "locustfile.py")]
    # --json-file suppresses locust's last table, for which there is no other switch; we print our own.
    command += ["--headless", "--only-summary", "--loglevel", "WARNING", "--json-file", os.devnull]
    # Locust also reads options from LOCUST_* variables. Leave them out: only the command line configures the test.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    environment = GRPC_ENVIRONMENT | inherited | ({} if api_key is None else {API_KEY: api_key})
    child = subprocess.Popen([*tied_to_parent(), *command, *plan.locust_argv()], env=environment)
    while True:
        try:
            code = child.wait()
        except KeyboardInterrupt:
            continue  # the child was interrupted too and prints its results
        return 128 + signal.SIGINT if code == -signal.SIGINT else code if code in (0, 1) else 2
