"""Cores of a router for tests, of what a test has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from overfill.routing.async_dispatcher import AsyncDispatcher
from overfill.routing.dispatcher import Dispatcher
from overfill.routing.pool import Roster
from services.router.revisions import Revisions


def one_revision(handler: Any) -> Revisions:
    """Returns the revisions of a router that serves one, whose requests ``handler`` handles."""
    core: Any = SimpleNamespace(revision="", handler=handler)
    return Revisions([core])


def revisions_of(*rosters: Roster, dispatcher: Any = None, names: tuple[str, ...] = ("", "r2")) -> Revisions:
    """Returns the revisions of a router with these workers, whose requests nobody handles."""
    cores: list[Any] = [
        SimpleNamespace(
            revision=name, roster=roster, async_dispatcher=dispatcher or AsyncDispatcher(Dispatcher(roster))
        )
        for name, roster in zip(names, rosters, strict=False)
    ]
    return Revisions(cores)
