"""``overfill keys``: manages the API keys of a stack, in a file of hashes."""

from __future__ import annotations

from pathlib import Path

import click

from overfill.api import key_file, keys
from overfill.cli.options import option_errors
from overfill.request.names import ADAPTER_NAME, ADAPTER_NAME_RULE
from overfill.rpc.access import Scope

_FILE_OPTION = click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default="api-keys.json",
    show_default=True,
    help="File of keys. `overfill up --api-keys FILE` reads it, and reads it again when it changes.",
)


def _split_scopes(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> list[str]:
    return [scope.strip() for value in given for scope in value.split(",")]


def _check_tiers(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    for name in given:
        if not ADAPTER_NAME.fullmatch(name):
            raise click.BadParameter(f"{name!r} cannot name a tier or an adapter: give {ADAPTER_NAME_RULE}")
    return given


@click.group("keys")
def keys_group() -> None:
    """Make, list and revoke the API keys of a stack."""


@keys_group.command("create")
@click.argument("name")
@click.option("--rate", type=float, help="Maximum requests per second, per address.  [default: no limit]")
@click.option("--concurrency", type=int, help="Maximum concurrent requests, per address.  [default: no limit]")
@click.option(
    "--priority", type=int, default=0, show_default=True,
    help="Smallest priority that requests with this key may have, -2 to 2. Smaller priorities are served first.",
)  # fmt: skip
@click.option(
    "--scope", "scopes", multiple=True, callback=_split_scopes, metavar="SCOPE[,SCOPE…]",
    default=("infer", "status"), show_default=True,
    help=f"Permissions of the key, of {', '.join(Scope)}; separated by commas, or repeat the option.",
)  # fmt: skip
@click.option(
    "--tier", "tiers", multiple=True, callback=_check_tiers,
    help="Tier or adapter that requests with this key may use; repeatable.  [default: all]",
)  # fmt: skip
@click.option(
    "--allow-brownout", is_flag=True,
    help="Let the next tier of the router's --brownout answer when the requested tier is overloaded.",
)  # fmt: skip
@_FILE_OPTION
def create_command(
    name: str,
    path: Path,
    rate: float | None,
    concurrency: int | None,
    priority: int,
    scopes: list[str],
    tiers: tuple[str, ...],
    allow_brownout: bool,
) -> None:
    """Make a key for NAME and print it. It is printed only now, because the file keeps only its hash."""
    with option_errors():
        key = key_file.create(
            path,
            name,
            rate=rate,
            concurrency=concurrency,
            priority=priority,
            scopes=scopes,
            tiers=tiers or None,
            allow_brownout=allow_brownout,
        )
    click.echo(f"{name}: send this key as 'Authorization: Bearer KEY'; it is not shown again", err=True)
    click.echo(key)


@keys_group.command("list")
@_FILE_OPTION
def list_command(path: Path) -> None:
    """List the names, dates, hashes, scopes, limits and tiers of all keys."""
    for key in keys.load(path):
        limits = [
            *([] if key.rate is None else [f"rate:{key.rate:g}/s"]),
            *([] if key.concurrency is None else [f"concurrency:{key.concurrency}"]),
            *([] if not key.priority else [f"priority:{key.priority}"]),
            *([] if key.tiers is None else [f"tiers:{','.join(sorted(key.tiers))}"]),
            *([] if not key.allow_brownout else ["brownout"]),
        ]
        scopes = ",".join(sorted(key.scopes))
        click.echo("\t".join([key.name, key.created, f"sha256:{key.sha256[:12]}…", scopes, *limits]))


@keys_group.command("revoke")
@click.argument("name")
@_FILE_OPTION
def revoke_command(name: str, path: Path) -> None:
    """Remove the key of NAME. Running routers refuse it within two seconds."""
    with option_errors():
        key_file.revoke(path, name)
