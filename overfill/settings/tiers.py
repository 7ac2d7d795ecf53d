"""Tiers: the decoders of a stack, each with its own pool of decode workers behind the one pool of prefill workers.

All pairs of a stack have the same full model. A tier is written ``NAME=PAIR[:N][,SETTING=VALUE...]``, such as
``fast=fast:2,quantize=int8``. ``overfill up --decoder`` and a router's ``--decoders`` read the same text. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BeforeValidator
from pydantic_settings import NoDecode

from overfill.kv.spec import Quantization
from overfill.routing.tier import DEFAULT_TIER, NO_FALLBACK

MAX_TIERS = 16
"""Maximum number of tiers of a stack: metrics have series for each."""

ROUTER_SETTINGS = ("fallback", "ttft-objective", "itl-objective")
"""Settings of a tier that routers read. All other settings are for decode workers, or for ``overfill up``."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")  # also a valid DNS label
_SPEC = re.compile(r"(?P<name>[^=]*)=(?P<pair>[^,]+?)(:(?P<count>\d+))?(?P<settings>,.*)?", re.DOTALL)
_NEXT_SETTING = re.compile(r",(?=[a-z][a-z0-9-]*=)")  # a comma within a JSON value starts no setting


@dataclass(frozen=True, slots=True)
class TierSpec:
    """One tier as users write it.

    Attributes:
        name: name of the tier.
        pair: named pair, or a pair's folder; its decoder writes the tier's answers.
        count: number of decode workers.
        settings: further settings by name, in kebab-case.
    """

    name: str
    pair: str
    count: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, least: int = 1) -> TierSpec:
        """Reads ``NAME=PAIR[:N][,SETTING=VALUE...]``. Raises ValueError, also if N is less than ``least``."""
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r}: expected NAME=PAIR, NAME=PAIR:N or NAME=PAIR:N,SETTING=VALUE")
        check_tier_name(match["name"])
        settings: dict[str, str] = {}
        for part in _NEXT_SETTING.split(match["settings"] or "")[1:]:
            name, _, value = part.partition("=")
            if name in settings:
                raise ValueError(f"tier {match['name']!r}: {name} is given twice")
            settings[name] = value
        if (match["settings"] or "").strip(",") and not settings:
            raise ValueError(f"tier {match['name']!r}: expected SETTING=VALUE after the comma in {text!r}")
        count = 1 if match["count"] is None else int(match["count"])
        if count < least:
            raise ValueError(
                f"tier {match['name']!r}: the number of decode workers must be at least {least}, got {count}"
            )
        spec = cls(match["name"], match["pair"], count, settings)
        for setting in ("ttft-objective", "itl-objective"):
            spec.seconds(setting)
        return spec

    def __str__(self) -> str:
        settings = "".join(f",{name}={value}" for name, value in self.settings.items())
        return f"{self.name}={self.pair}:{self.count}{settings}"

    @property
    def fallback(self) -> str:
        """Tier in which an answer goes on when this tier has no worker left; empty means that it waits."""
        return self.settings.get("fallback", "")

    @property
    def quantize(self) -> Quantization | None:
        """Format of the decoder's weights; None means what the pair says."""
        value = self.settings.get("quantize")
        return None if value is None else "int8" if value == "int8" else "none"

    def seconds(self, setting: str) -> float | None:
        """The setting as seconds; None if it is not given. Raises ValueError if it is not a number above 0."""
        if setting not in self.settings:
            return None
        try:
            value = float(self.settings[setting])
        except ValueError:
            value = 0.0
        if not 0 < value < math.inf:
            raise ValueError(
                f"tier {self.name!r}: {setting} must be a number of seconds above 0, got {self.settings[setting]!r}"
            )
        return value


def check_tier_name(name: str) -> None:
    """Raises ValueError if ``name`` cannot be the name of a tier."""
    if not _NAME.fullmatch(name) or name == NO_FALLBACK:
        raise ValueError(
            f"{name!r} cannot name a tier: give 1 to 32 lower-case letters, digits and hyphens, and not {NO_FALLBACK!r}"
        )


def check_tiers(tiers: Sequence[TierSpec], default: str = "", brownout: Sequence[str] = ()) -> None:
    """Raises ValueError unless the names are unique and every tier that is referred to exists."""
    names = [tier.name for tier in tiers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two tiers have the name {twice[0]!r}")
    if len(names) > MAX_TIERS:
        raise ValueError(f"{len(names)} tiers; a stack has at most {MAX_TIERS}")
    referred = [("--default-tier", default), *(("--brownout", name) for name in brownout)]
    referred += [(f"fallback of tier {tier.name!r}", tier.fallback) for tier in tiers]
    for where, name in referred:
        if name and name not in names:
            raise ValueError(f"{where}: there is no tier {name!r}; tiers are {', '.join(names) or 'none'}")
    for tier in tiers:
        if tier.fallback == tier.name:
            raise ValueError(f"fallback of tier {tier.name!r}: names the tier itself")


def default_tier(names: Sequence[str], chosen: str = "") -> str:
    """The tier of requests that name none: ``chosen``, or else the one called "default", or else the first."""
    return chosen or (DEFAULT_TIER if DEFAULT_TIER in names else names[0])


def _parse_all(value: object) -> object:
    if isinstance(value, str):
        value = [part for part in value.split(";") if part.strip()]
    if isinstance(value, Iterable):
        return tuple(TierSpec.parse(part) if isinstance(part, str) else part for part in value)
    return value


def parse_order(value: object) -> object:
    """Reads tiers from the best to the cheapest: ``full > default > fast``. Raises ValueError."""
    if not isinstance(value, str):
        return value
    names = tuple(name.strip() for name in value.split(">"))
    if value.strip() and (len(names) < 2 or len(set(names)) < len(names) or not all(names)):
        raise ValueError("expected tiers from the best to the cheapest, such as 'full > default > fast'")
    return names if value.strip() else ()


Tiers = Annotated[tuple[TierSpec, ...], NoDecode, BeforeValidator(_parse_all)]
"""Several tiers, separated by semicolons."""

TierOrder = Annotated[tuple[str, ...], NoDecode, BeforeValidator(parse_order)]
"""Names of tiers, separated by ``>``."""
