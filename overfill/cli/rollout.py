"""``overfill rollout``: moves new conversations between the two revisions of a running stack."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from overfill.cli.options import ClientConnection, connection_options

if TYPE_CHECKING:
    from overfill.client import Client, PoolStatus, RolloutStatus

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds
_NO_NAME = "(no name)"


class _Duration(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """Reads a time such as 90s, 10m, 2h or 1d as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        if (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", value)) is None:
            self.fail(f"{value!r} is no time; give one such as 90s, 10m, 2h or 1d", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


class _Share(click.ParamType):  # type: ignore[type-arg]
    """Reads REVISION=PERCENT as a name and a number. The router checks both."""

    name = "revision=percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        name, separator, percent = value.rpartition("=")
        try:
            if separator:
                return name, float(percent)
        except ValueError:
            pass
        self.fail(f"{value!r}: expected REVISION=PERCENT, such as r2=25", param, ctx)


@click.group("rollout")
def rollout_group() -> None:
    """Move new conversations between the two revisions of a running stack.

    A revision is one state of a pair's weights. The field `canary` of a stack's document, and of the chart's values,
    starts a second one. The router that is asked changes the shares; the other routers learn of it within seconds.
    """


def _command(name: str, *arguments: Callable[[Any], Any]) -> Callable[[Any], click.Command]:
    """Makes a subcommand of a function that asks the router and returns the status, which the command prints."""

    def made(ask: Callable[..., RolloutStatus]) -> click.Command:
        def run(as_json: bool, connection: ClientConnection, **options: Any) -> None:
            with connection.client() as client:
                _show(ask(client, **options), as_json)

        run.__doc__ = ask.__doc__
        command = connection_options(click.option("--json", "as_json", is_flag=True, help="Print JSON.")(run))
        for argument in reversed(arguments):
            command = argument(command)
        return rollout_group.command(name)(command)

    return made


@_command("status")
def status_command(client: Client) -> RolloutStatus:
    """Show the revisions, their shares of new conversations, their pools and their running requests."""
    return client.rollout()


@_command(
    "set",
    click.argument("share", type=_Share(), metavar="REVISION=PERCENT"),
    click.option(
        "--over",
        type=_Duration(),
        default=0.0,
        help="Time in which the share gets there evenly, such as 90s, 10m, 2h or 1d, at most 7d.  [default: at once]",
    ),
)
def set_command(client: Client, share: tuple[str, float], over: float) -> RolloutStatus:
    """Give REVISION a share of PERCENT of new conversations, and the other revision the rest.

    A conversation moves when the share passes its place, and its prompt is computed again there, once.
    """
    return client.set_rollout(*share, over=over)


@_command("pause")
def pause_command(client: Client) -> RolloutStatus:
    """Stop a change before its end: the share stays as it is now. `overfill rollout set` goes on."""
    return client.pause_rollout()


@_command("undo")
def undo_command(client: Client) -> RolloutStatus:
    """Give all new conversations to the old revision at once."""
    return client.undo_rollout()


def _show(status: RolloutStatus, as_json: bool) -> None:
    from rich.table import Table

    from overfill.cli.output import console, print_json

    if as_json:
        print_json(_json(status))
        return
    named = [*dict.fromkeys(tier for one in status.revisions for tier in one.tiers)]
    tiers = named if len(named) > 1 else []  # the counts of a single one are those of its stage
    table = Table(box=None, padding=(0, 1))
    table.add_column("revision")
    table.add_column("share", justify="right")
    for column in ("state", "prefill", *([f"decode {tier}" for tier in tiers] or ["decode"])):
        table.add_column(column)
    table.add_column("running", justify="right")
    for one in status.revisions:
        decode = [one.tiers.get(tier) for tier in tiers] or [one.pools.get("decode")]
        pools = (one.pools.get("prefill"), *decode)
        counts = ("–" if pool is None else f"{pool.ready} of {pool.expected}" for pool in pools)
        state = "ready" if one.ready else "not ready"
        table.add_row(one.name or _NO_NAME, f"{one.percent:.1f} %", state, *counts, str(one.running))
    console().print(table)
    if note := _note(status):
        click.echo(note)


def _note(status: RolloutStatus) -> str:
    """Returns what is in progress, in words; empty if nothing is."""
    *_, new = status.revisions
    if len(status.revisions) < 2:
        return "the stack serves one revision"
    name, target = new.name or _NO_NAME, f"{status.target_percent:g} %"
    if status.paused:
        return f"the change of {name} to {target} is paused; `overfill rollout set` goes on"
    waits = (
        "" if new.ready or not new.percent else f"; {name} gets nothing before both of its stages have a ready worker"
    )
    if status.remaining_seconds > 0:
        return f"{name} reaches {target} in {_in_words(status.remaining_seconds)}{waits}"
    return waits.removeprefix("; ")


def _in_words(seconds: float) -> str:
    """Returns a time in its two largest units, such as "8 m 20 s"."""
    left, parts = round(seconds), []
    for unit in ("d", "h", "m", "s"):
        count, left = divmod(left, _UNITS[unit])
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def _json(status: RolloutStatus) -> dict[str, Any]:
    from overfill.rpc.stack_status_json import pool_json

    def counts(pools: Mapping[Any, PoolStatus]) -> dict[str, Any]:
        return {name: pool_json(pool) for name, pool in pools.items()}

    revisions = [asdict(one) | {"pools": counts(one.pools), "tiers": counts(one.tiers)} for one in status.revisions]
    return asdict(status) | {"revisions": revisions}
