"""``overfill config``: shows the origin of a service's settings, and checks a settings file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import SecretStr, ValidationError

from overfill.settings.config import (
    SERVICES,
    ColocatedConfig,
    DecodeConfig,
    RouterConfig,
    ServiceConfig,
    read_checked,
)
from overfill.settings.config_file import BadConfigFile, ConfigFile, flag_name
from overfill.settings.reader import SEPARATORS, BadSettings, Given
from overfill.settings.tiers import TierSpec
from overfill.stack.describe import tier_settings

_NAMES = tuple(kind.section for kind in SERVICES)
Row = tuple[str, str, str]
"""Setting, value, origin."""


@click.group("config")
def config_group() -> None:
    """Show where settings come from, and check a settings file.

    Each setting is a flag, an environment variable and a key in a file. For instance, `kv-memory` of prefill workers is
    --kv-memory, OVERFILL_PREFILL_KV_MEMORY, and the key kv-memory under `prefill`, or under `common` for all services.
    The first of these that sets it wins: flag, variable, the service's section, `common`, default.
    """


@config_group.command("show", context_settings={"ignore_unknown_options": True})
@click.argument("service", type=click.Choice(_NAMES), required=False, metavar="SERVICE")
@click.option("--config", type=click.Path(path_type=Path), help="Settings file to read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def show_command(service: str | None, config: Path | None, as_json: bool, flags: tuple[str, ...]) -> None:
    """Show the settings that SERVICE would run with, and the origin of each. Without SERVICE, show all services.

    The settings include this environment's variables, and FLAGS of the service given after its name. Secrets are not
    shown.
    """
    from overfill.cli.output import print_json

    argv = [*([f"--config={config}"] if config else []), *flags]
    shown = {name: _rows(name, argv) for name in ([service] if service else _NAMES)}
    if as_json:
        print_json(
            {name: {key: {"value": v, "from": origin} for key, v, origin in rows} for name, rows in shown.items()}
        )
        return
    for name, rows in shown.items():
        _print_table(name, rows)


@config_group.command("check")
@click.argument("file", type=click.Path(path_type=Path))
def check_command(file: Path) -> int:
    """Check all names and values in FILE, for all services. Lists faults and exits with 1 if any."""
    try:
        read = read_checked(file)
    except BadConfigFile as error:
        faults = error.faults
    else:
        with _no_variables():
            kinds = [kind for kind in SERVICES if kind is not ColocatedConfig or _has_colocated(read)]
            faults = [*dict.fromkeys(fault for kind in kinds for fault in _faults(kind, read))]
    for fault in faults:
        click.echo(fault, err=True)
    if not faults:
        click.echo(f"{file}: valid ({sum(len(settings) for settings in read.sections.values())} settings)")
    return 1 if faults else 0


def _has_colocated(file: ConfigFile) -> bool:
    """False for a file with settings of workers with one stage and none of those with both."""
    return "colocated" in file.sections or not {"prefill", "decode"} & file.sections.keys()


def _rows(name: str, argv: list[str]) -> list[Row]:
    kind = next(kind for kind in SERVICES if kind.section == name)
    # --pair is the only required setting; the real run may get it elsewhere.
    flags = kind.read_flags(argv)
    try:
        given = kind.given(flags)
        absent = "pair" not in given
        config = kind.made(given | ({"pair": Given("-", "")} if absent else {}))
    except BadSettings as error:
        raise click.UsageError(str(error)) from error
    rows = []
    for field in kind.model_fields:
        required = absent and field == "pair" and not getattr(config, "tiers", ())
        value = "" if absent and field == "pair" else display(getattr(config, field), SEPARATORS.get(field, ","))
        rows.append(
            (flag_name(field), value, "required" if required else given[field].origin if field in given else "default")
        )
    return rows


def display(value: Any, separator: str = ",") -> str:
    """Returns a value as a file or variable would have it; empty if unset; stars for a secret."""
    if value is None:
        return ""
    if isinstance(value, SecretStr):
        return "********"
    return separator.join(map(str, value)) if isinstance(value, tuple) else str(value)


def _print_table(name: str, rows: list[Row]) -> None:
    click.echo(f"{name}:")
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, origin in rows:
        click.echo(f"  {key:{widths[0]}}  {value:{widths[1]}}  {origin}".rstrip())


def _faults(kind: type[ServiceConfig], file: ConfigFile) -> list[str]:
    values = kind.file_values(file)
    given: dict[str, Any] = {"pair": "-"} | {name: value for name, (_, value) in values.items()}
    origins = {name: f"{file.path}: {key}" for name, (key, _) in values.items()}
    try:
        config = kind.model_validate(given)
    except ValidationError as error:
        return list(kind.explain(error, origins, f"{file.path}: {kind.section}: "))
    if not isinstance(config, RouterConfig):
        return []
    return [
        f"{origins[name]}: {fault}"
        for name in ("tiers", "canary_tiers")
        for tier in getattr(config, name)
        for fault in _faults_of_tier(tier)
    ]


def _faults_of_tier(tier: TierSpec) -> Iterator[str]:
    """Checks the settings that `overfill up` gives to the workers of the tier."""
    try:
        DecodeConfig.of({**tier_settings(tier, DecodeConfig), "pair": tier.pair})
    except BadSettings as error:
        yield f"tier {tier.name}: {str(error).removeprefix(f'--tier {tier.name}: ')}"


@contextlib.contextmanager
def _no_variables() -> Iterator[None]:
    """Hides this environment's variables while the file is checked."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OVERFILL_")}
    try:
        yield
    finally:
        os.environ.update(kept)
