"""``overfill loadtest``: the common cases of a load test with locust, which runs in a process of its own."""

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

from overfill.cli.processes import tied_to_parent
from overfill.errors import InvalidRequest
from overfill.lab.loadtest.plan import API_KEY, LoadPlan
from overfill.process.extras import require
from overfill.settings.environment import GRPC_ENVIRONMENT


def _plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for f in reversed(fields(LoadPlan)):
        command = click.option(
            f"--{f.name.replace('_', '-')}",
            type=_kind(f),
            default=f.default,
            show_default=f.default not in (None, ""),
            help=f.metadata["help"],
        )(command)
    return command


def _kind(f: Field[Any]) -> Any:
    if choices := f.metadata.get("choices"):
        return click.Choice(choices)
    if f.metadata["kind"] is Path:
        return click.Path(exists="output" not in f.metadata, dir_okay=False, path_type=Path)
    return f.metadata["kind"]


@click.command("loadtest")
@_plan_options
@click.option("--api-key", envvar=API_KEY, show_envvar=True, help="Key to show, where the stack wants one.")
def loadtest_command(api_key: str | None, **options: Any) -> int:
    """Load on a running stack or any OpenAI endpoint, held against objectives.

    Exits 0 when every objective is met, 1 when one is not (it is named with what was measured), and 2 when nothing
    could be measured.
    """
    require("loadtest", "`overfill loadtest`", "locust")  # which runs in a process of its own
    from overfill.lab.loadtest.workload import Workload

    try:
        plan = LoadPlan.from_options(options)
        Workload(plan)  # a trace that cannot be read is told before anything starts
    except InvalidRequest as error:
        name = error.field.replace("_", "-")
        message = str(error).removeprefix(f"{error.field}: ")
        raise click.UsageError(f"--{name}: {message}") from error
    return _run(plan, api_key)


def _run(plan: LoadPlan, api_key: str | None) -> int:
    command = [sys.executable, "-m", "locust", "-f", str(Path(__file__).parents[1] / "loadtest" / "locustfile.py")]
    # Locust's own tables stay away: one of ours follows, and there is no other switch for the last of them.
    command += ["--headless", "--only-summary", "--loglevel", "WARNING", "--json-file", os.devnull]
    # Locust takes options from variables too; a test is what its command line says.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    environment = GRPC_ENVIRONMENT | inherited | ({} if api_key is None else {API_KEY: api_key})
    child = subprocess.Popen([*tied_to_parent(), *command, *plan.locust_argv()], env=environment)
    while True:
        try:
            code = child.wait()
        except KeyboardInterrupt:
            continue  # it has been interrupted too, and tells what it has
        return 128 + signal.SIGINT if code == -signal.SIGINT else code if code in (0, 1) else 2
