"""``overfill certs``: makes certificates for every role of a stack, signed by private authorities."""

from __future__ import annotations

from pathlib import Path

import click

from overfill.cli.options import Number, option_errors


@click.command("certs")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=Path("certs"))
@click.option("--name", "names", multiple=True, help="Host name or IP address of routers; repeatable.")
@click.option(
    "--days",
    type=Number(0, min_open=True),
    default=90,
    show_default=True,
    help="Days for which the certificates are valid.",
)
@click.option(
    "--role", "roles", type=click.Choice(["router", "worker", "client", "operator", "scraper"]), multiple=True,
    help="Role to make a certificate for; repeatable.  [default: all roles]",
)  # fmt: skip
def certs_command(folder: Path, names: tuple[str, ...], days: float, roles: tuple[str, ...]) -> None:
    """Make certificates for every role of a stack. `overfill up --tls FOLDER` uses them.

    Two certificate authorities sign them: one for the processes of the stack, the other for its users. Workers trust
    only the first. The first run makes both authorities; later runs replace the certificates, and running processes
    use the new ones within seconds.

    Keep peers-ca.key and clients-ca.key away from the machines that serve. This is meant for trials and small
    installations. If you have an authority already, let it make certificates with the same names.
    """
    from overfill.rpc import certificates
    from overfill.rpc.access import Role

    with option_errors():
        written = certificates.make(folder, names, days, [Role(role) for role in roles] or tuple(Role))
    for path in written:
        click.echo(path)
