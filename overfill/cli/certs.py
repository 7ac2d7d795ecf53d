"""``overfill certs``: certificates for every role of a stack, from authorities of one's own."""

from __future__ import annotations

from pathlib import Path

import click

from overfill.cli.options import Number
from overfill.errors import InvalidRequest


@click.command("certs")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=Path("certs"))
@click.option("--name", "names", multiple=True, help="Host or IP address that routers are reached at; repeatable.")
@click.option("--days", type=Number(0, min_open=True), default=90, show_default=True, help="Of validity.")
@click.option(
    "--role", "roles", type=click.Choice(["router", "worker", "client", "operator", "scraper"]), multiple=True,
    help="Make those of this role only; repeatable.  [default: all]",
)  # fmt: skip
def certs_command(folder: Path, names: tuple[str, ...], days: float, roles: tuple[str, ...]) -> None:
    """Make certificates for a stack in FOLDER; `overfill up --tls FOLDER` takes them.

    Two authorities sign: one for the processes of a stack, which is all that workers trust, and one for those who use
    it. Both are made at first; later runs make new certificates with them, which running processes take up within
    seconds. Keep peers-ca.key and clients-ca.key away from the machines that serve. Meant for trials and small
    installations: where there is an authority already, have it make certificates with the same names.
    """
    from overfill.rpc import certificates
    from overfill.rpc.access import Role

    try:
        written = certificates.make(folder, names, days, [Role(role) for role in roles] or tuple(Role))
    except InvalidRequest as error:
        raise click.UsageError(str(error)) from error
    for path in written:
        click.echo(path)
