"""Reads the own options of ``overfill up`` from variables and the settings file; services read theirs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from overfill.settings.config import SERVICES, UP_KEYS, read_checked
from overfill.settings.config_file import COMMON, BadConfigFile, all_names, field_name, nearest

PREFIX = "OVERFILL_UP_"

_SHARED = {
    "pair": (COMMON, "pair"),
    "grpc": ("router", "port"),
    "http": ("router", "http"),
    "tier": ("router", "tiers"),
}
"""Options of ``up`` that are also a service's setting: option -> (section, key) in the file."""

OWN = ("config", *UP_KEYS, *_SHARED)
"""Options of ``up`` with a variable ``OVERFILL_UP_…``. The others are settings of services, which have variables."""


class OwnSettings(click.Command):
    """A command whose own options are also variables; refuses unknown variables with its prefix."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        flags = [option.opts[0] for option in self.params if option.opts[0].removeprefix("--") in OWN]
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(
                f"The options {', '.join(flags)} are variables too, such as {_variable('prefill')} and "
                f"{_variable('ray')}=no."
            )

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        known = {_variable(name) for name in OWN}
        for option in self.params:
            flag = option.opts[0].removeprefix("--")
            if flag in OWN:
                option.envvar = [_variable(flag), *_service_variable(flag)]
        unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
        if unknown:
            raise click.UsageError(
                "; ".join(f"{name}: no such setting; {nearest(name, known, all_names('up'))}" for name in unknown)
            )
        return super().make_context(*args, **extra)


def _variable(flag: str) -> str:
    return PREFIX + field_name(flag).upper()


def _service_variable(flag: str) -> list[str]:
    """Returns the service's variable of a shared option. ``up`` must read it, because it has a default of its own."""
    section, key = _SHARED.get(flag, (COMMON, ""))
    return [kind.variable(field_name(key)) for kind in SERVICES if kind.section == section]


def _load(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    if path is None:
        return None
    try:
        file = read_checked(path)
    except BadConfigFile as error:
        raise click.UsageError(str(error)) from error
    own = dict(file.sections.get("up", {}))
    for option, (section, key) in _SHARED.items():
        if key in file.sections.get(section, {}):
            if option in own:
                raise click.UsageError(f"{path}: up.{option} and {section}.{key} are one setting: remove one of them")
            own[option] = file.sections[section][key]
    if isinstance(tiers := own.get("tier"), str):
        own["tier"] = [tier for tier in tiers.split(";") if tier.strip()]
    names = {option.opts[0].removeprefix("--"): option.name for option in ctx.command.params}
    ctx.default_map = {names[key]: value for key, value in own.items()}
    return path


config_option = click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    is_eager=True,  # before the options whose defaults it sets
    callback=_load,
    help="YAML or TOML file of settings; flags and variables take precedence.",
)
