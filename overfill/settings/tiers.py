"""Pools and tiers as users write them, in a document of a stack and in flags. No torch.

A tier is one of a stack's decoders, with its own pool of decode workers behind the one pool of prefill workers. All
pairs of a stack have the same full model. As text, a tier is ``NAME=PAIR[:N][,SETTING=VALUE...]``, such as
``fast=fast:2,quantize=int8``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from overfill.kv.spec import Quantization
from overfill.routing.tier import DEFAULT_TIER, NO_FALLBACK
from overfill.settings.values import LABEL, check_text

MAX_TIERS = 16
"""Maximum number of tiers of a stack: metrics have series for each."""

MAX_REPLICAS = 1000
"""Maximum number of processes of a pool."""

_SPEC = re.compile(r"(?P<name>[^=]*)=(?P<pair>[^,]+?)(:(?P<count>\d+))?(?P<settings>,.*)?", re.DOTALL)
_NEXT_SETTING = re.compile(r",(?=[a-z][a-z0-9-]*=)")  # a comma within a JSON value starts no setting

TEXT_FIELDS = {
    "fallback": "fallback", "ttft-objective": "ttft_objective", "itl-objective": "itl_objective", "max": "max_replicas",
}  # fmt: skip
"""Names in a tier's text that are fields of the tier. All other names are settings of its decode workers."""


class PoolSpec(BaseModel):
    """A pool: equal processes of a stack.

    Attributes:
        replicas: number of processes, at most 1000; with ``max_replicas``, the minimum and initial number.
        max_replicas: maximum number, on Ray; None means that the number is fixed.
        num_cpus, num_gpus, resources: resources that Ray reserves for each process. Fractions share a CPU or GPU, and
            the GPU's memory. With ``num_gpus`` 0, a process sees no GPU. A worker with several ranks needs a whole GPU
            for each. Plain processes refuse these fields and divide all GPUs.
        settings: settings of this pool only, by field.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # A stack checks MAX_REPLICAS, because a router's tiers also have totals over pools.
    replicas: int = Field(default=1, ge=1, json_schema_extra={"maximum": MAX_REPLICAS})
    max_replicas: int | None = Field(default=None, ge=1, json_schema_extra={"maximum": MAX_REPLICAS})
    num_cpus: float = Field(default=0.3, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)

    _check_text = field_validator("*", mode="before")(check_text)

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than replicas {self.replicas}")
        return self

    @property
    def most(self) -> int:
        """Maximum number of processes, not counting those that replace others."""
        return self.max_replicas or self.replicas


class TierSpec(PoolSpec):
    """A tier and its pool of decode workers.

    Attributes:
        replicas: as in ``PoolSpec``; 0 if only colocated workers decode in the tier. A router counts these too.
        name: name of the tier; in a document of a stack, the key.
        pair: named pair, or a pair's folder; its decoder writes the tier's answers.
        fallback: tier in which answers go on when this one has no worker left; empty means that they wait.
        ttft_objective, itl_objective: objectives of this tier, in seconds; None means the routers'.
    """

    replicas: int = Field(default=1, ge=0, json_schema_extra={"maximum": MAX_REPLICAS})
    name: str
    pair: str
    fallback: str = ""
    ttft_objective: float | None = Field(default=None, gt=0)
    itl_objective: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        check_tier_name(self.name)
        return self

    @classmethod
    def parse(cls, text: str, least: int = 1) -> Self:
        """Reads ``NAME=PAIR[:N][,SETTING=VALUE...]``. Raises ValueError, also if N is less than ``least``."""
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r}: expected NAME=PAIR, NAME=PAIR:N or NAME=PAIR:N,SETTING=VALUE")
        check_tier_name(match["name"])
        given: dict[str, str] = {}
        for part in _NEXT_SETTING.split(match["settings"] or "")[1:]:
            name, _, value = part.partition("=")
            if name in given:
                raise ValueError(f"tier {match['name']!r}: {name} is given twice")
            given[name] = value
        if (match["settings"] or "").strip(",") and not given:
            raise ValueError(f"tier {match['name']!r}: expected SETTING=VALUE after the comma in {text!r}")
        count = 1 if match["count"] is None else int(match["count"])
        if count < least:
            raise ValueError(
                f"tier {match['name']!r}: the number of decode workers must be at least {least}, got {count}"
            )
        own: dict[str, Any] = {TEXT_FIELDS[name]: given.pop(name) for name in [*given] if name in TEXT_FIELDS}
        for name in ("ttft-objective", "itl-objective"):
            if (field := TEXT_FIELDS[name]) in own:
                own[field] = _seconds(match["name"], name, own[field])
        if (most := own.get("max_replicas")) is not None:
            if not most.isdecimal() or int(most) < max(count, 1):
                raise ValueError(
                    f"tier {match['name']!r}: max must be a number of workers of at least {max(count, 1)}, got {most!r}"
                )
            own["max_replicas"] = int(most)
        settings = {name.replace("-", "_"): value for name, value in given.items()}
        return cls(name=match["name"], pair=match["pair"], replicas=count, settings=settings, **own)

    def __str__(self) -> str:
        own = {name: getattr(self, field) for name, field in TEXT_FIELDS.items()}
        own = {name: value for name, value in own.items() if value not in (None, "")}
        own |= {name.replace("_", "-"): value for name, value in self.settings.items()}
        return f"{self.name}={self.pair}:{self.replicas}" + "".join(f",{name}={value}" for name, value in own.items())

    @property
    def quantize(self) -> Quantization | None:
        """Format of the decoder's weights; None means what the pair says."""
        value = self.settings.get("quantize")
        return None if value is None else "int8" if value == "int8" else "none"


@dataclass(frozen=True, slots=True)
class RevisionSpec:
    """A revision of a stack: one state of its pairs' weights.

    Attributes:
        name: empty for a revision without a name.
        tiers: its tiers, the default one first.
    """

    name: str
    tiers: tuple[TierSpec, ...]


def _seconds(tier: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError(f"tier {tier!r}: {name} must be a number of seconds above 0, got {text!r}")
    return value


def check_tier_name(name: str) -> None:
    """Raises ValueError if ``name`` cannot be the name of a tier."""
    if not LABEL.fullmatch(name) or name == NO_FALLBACK:
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


Tiers = Annotated[tuple[TierSpec, ...], BeforeValidator(_parse_all)]
"""Several tiers, separated by semicolons."""

TierOrder = Annotated[tuple[str, ...], BeforeValidator(parse_order)]
"""Names of tiers, separated by ``>``."""
