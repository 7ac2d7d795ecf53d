"""The option ``--decoder``: prepares the pairs of tiers, and checks that they fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from overfill.model.manifest import Pair, check_family
from overfill.settings.config import WorkerConfig
from overfill.settings.config_file import all_names, field_name, flag_name, nearest
from overfill.settings.tiers import ROUTER_SETTINGS, TierSpec
from overfill.telemetry.progress import Report

MAX = "max"
"""Setting of a tier: maximum number of its decode workers when they are autoscaled."""

_MANAGED = {"config", "pair", "tier", "worker_id", "routers", "port", "advertise", "metrics_port"}
"""Settings of decode workers that differ between the workers of a tier, or that the tier itself sets."""


def worker_settings(tier: TierSpec, kind: type[WorkerConfig]) -> dict[str, str]:
    """Returns field -> value for the settings of a tier that its decode workers read.

    Raises:
        click.UsageError: decode workers have no such setting, or a tier cannot set it.
    """
    names = [name for name in tier.settings if name not in (*ROUTER_SETTINGS, MAX)]
    fields = [name for name in kind.model_fields if name not in _MANAGED]
    for name in names:
        if field_name(name) not in fields:
            known = (*ROUTER_SETTINGS, MAX, *map(flag_name, fields))
            hint = nearest(name, known, all_names(kind.section))
            raise click.UsageError(f"--decoder {tier.name}: {name}: a tier has no such setting; {hint}")
    return {field_name(name): tier.settings[name] for name in names}


def tier_objectives(tier: TierSpec) -> dict[str, str]:
    """Returns the tier's own objectives, as settings of workers with both stages."""
    names = ("ttft-objective", "itl-objective")
    return {field_name(name): tier.settings[name] for name in names if name in tier.settings}


def with_colocated(tiers: Sequence[TierSpec], default: str, colocated: int) -> tuple[TierSpec, ...]:
    """Returns the tiers with ``colocated`` more workers in the default one.

    Raises:
        click.UsageError: a tier has no worker.
    """
    counted = tuple(replace(tier, count=tier.count + colocated) if tier.name == default else tier for tier in tiers)
    for tier in counted:
        if tier.count < 1:
            raise click.UsageError(
                f"--decoder {tier.name}: the number of decode workers must be at least 1, got 0; only the default tier "
                "may have none, with --colocated"
            )
    return counted


def max_workers(tier: TierSpec) -> int | None:
    """Maximum number of the tier's decode workers; None if it is fixed. Raises click.UsageError."""
    if MAX not in tier.settings:
        return None
    text = tier.settings[MAX]
    if not text.isdecimal() or int(text) < tier.count:
        raise click.UsageError(
            f"--decoder {tier.name}: max must be a number of workers of at least {tier.count}, got {text!r}"
        )
    return int(text)


def tier_pair(tier: TierSpec) -> Pair:
    """Loads the pair in the tier's folder, with the format of weights that the tier's settings give."""
    pair = Pair.load(Path(tier.pair))
    return pair if tier.quantize is None else pair.with_quantize(tier.quantize)


def check_replaced(*names: str) -> None:
    """Raises click.UsageError if an option of the current command is given that --decoder replaces."""
    source = click.get_current_context().get_parameter_source
    if given := [f"--{name.replace('_', '-')}" for name in names if source(name) is not ParameterSource.DEFAULT]:
        raise click.UsageError(
            f"--decoder conflicts with {' and '.join(given)} (also in the settings file, or as a variable): each "
            f"--decoder names its own pair and number of decode workers, as NAME=PAIR:N,{MAX}=N"
        )


def check_tiers_given(settings: Mapping[str, Any]) -> None:
    """Raises click.UsageError if a setting names tiers; call it for a stack without --decoder."""
    for name in ("default_tier", "brownout"):
        if settings.get(name):
            raise click.UsageError(
                f"--{flag_name(name)} {settings[name]!r} names tiers, and the stack has none: add --decoder NAME=PAIR "
                "for each tier"
            )


def resolve_tiers(tiers: Sequence[TierSpec], report: Report) -> tuple[TierSpec, ...]:
    """Returns the tiers with their pairs' folders; prepares named pairs that are missing.

    Raises:
        InvalidPair: a pair cannot be prepared, or two pairs have different full models or tokenizers.
    """
    from overfill.pair.store import resolve_pair

    resolved = tuple(replace(tier, pair=str(resolve_pair(tier.pair, report))) for tier in tiers)
    check_family({tier.name: Pair.load(Path(tier.pair)) for tier in resolved})
    return resolved
