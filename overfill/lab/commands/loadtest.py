"""``overfill loadtest``: the command and its options."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from overfill.cli.options import ClientConnection, connection_options, field_options, option_errors
from overfill.lab.loadtest.plan import LoadPlan
from overfill.process.extras import require

_target_option = click.option(
    "--target",
    "address",
    default=LoadPlan().target,
    envvar="OVERFILL_ADDRESS",
    show_default=True,
    show_envvar=True,
    help="Server: HOST:PORT of a router (several separated by commas), or http(s)://HOST:PORT/v1.",
)


@click.command("loadtest")
@partial(connection_options, address=_target_option)
@field_options(LoadPlan)
def loadtest_command(connection: ClientConnection, **options: Any) -> int:
    """Load a stack or an OpenAI endpoint, and check objectives.

    Use it to test one server against limits, with users or a trace.

    Exit code 0 when every objective is met, 1 when one is missed (it is printed with the measured value), 2 when
    nothing could be measured.
    """
    require("loadtest", "`overfill loadtest`", "aiohttp", "matplotlib", "numpy")
    from overfill.lab.loadtest.report import conclude, nothing_measured
    from overfill.lab.loadtest.run import run_test
    from overfill.lab.traffic.outcome import RequestFailed

    with option_errors():
        plan = LoadPlan(target=connection.address, **options)
        requests = plan.load()  # reports an unreadable trace before anything starts
    try:
        outcomes = run_test(plan, requests, connection.tls, connection.api_key or None)
    except RequestFailed as error:
        return nothing_measured(str(error))
    return conclude(plan, outcomes)
