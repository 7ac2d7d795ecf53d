"""Describes stacks for tests."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from overfill.settings.tiers import TierSpec
from overfill.stack.describe import describe
from overfill.stack.placed import PlacedStack, place
from overfill.stack.spec import StackSpec

_OWN = inspect.signature(describe).parameters


def described(*tiers: str, pair: Path | str = Path("pair"), **settings: Any) -> StackSpec:
    """Describes a stack. Arguments that are none of ``describe`` are settings of services."""
    own = {name: settings.pop(name) for name in list(settings) if name in _OWN}
    parsed = tuple(TierSpec.parse(text, least=0) for text in tiers)
    return describe(*([] if tiers else [pair]), tiers=parsed, settings=settings, **own)


def placed(*tiers: str, **settings: Any) -> PlacedStack:
    """Returns the processes of the stack that ``described`` describes."""
    return place(described(*tiers, **settings))
