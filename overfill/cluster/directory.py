"""Where the routers of an application are: a named Ray actor that routers report to and workers ask.

A router's entry is a lease: it goes when the router says so or has not been heard of for a while. If the actor is
lost, the next router to report makes another one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from overfill.rpc.membership import RESOLVERS

logger = logging.getLogger(__name__)

NAMESPACE = "overfill"
"""Of the actor; its name is the application's."""

LEASE = 10.0
"""Seconds without a report after which a router is struck off."""

REPORT_INTERVAL = 2.0
"""Seconds between a router's reports."""

_ANSWER = 5.0  # seconds for the actor to answer


class Directory:
    """Addresses with the moment until which they hold. Time is the actor's own monotonic clock."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def report(self, address: str) -> None:
        """The router at ``address`` lives."""
        self._until[address] = time.monotonic() + LEASE

    def remove(self, address: str) -> int:
        """The router at ``address`` leaves; returns how many are left."""
        self._until.pop(address, None)
        return len(self.addresses())

    def addresses(self) -> list[str]:
        """Of all routers, in order."""
        now = time.monotonic()
        self._until = {address: until for address, until in self._until.items() if until > now}
        return sorted(self._until)


async def keep_reported(application: str, address: str, lasts: Callable[[], bool]) -> None:
    """Reports the router at ``address`` while it ``lasts``, and then that it leaves."""
    actor: Any = None
    while lasts():
        try:
            if actor is None:
                actor = await asyncio.to_thread(_open, application)
            await asyncio.wait_for(actor.report.remote(address), _ANSWER)
        except (RayError, TimeoutError, ValueError) as error:
            logger.warning("the directory of %s does not answer (%r); another try follows", application, error)
            actor = None
        await asyncio.sleep(REPORT_INTERVAL)
    await withdraw(application, address)


async def withdraw(application: str, address: str) -> None:
    """The router at ``address`` leaves; the last one ends the directory."""
    try:
        actor = await asyncio.to_thread(_find, application)
        if await asyncio.wait_for(actor.remove.remote(address), _ANSWER) == 0:
            ray.kill(actor)
    except (RayError, TimeoutError, ValueError) as error:
        logger.debug("the directory of %s is gone already: %r", application, error)


async def look_up(application: str) -> set[str]:
    """The routers' addresses. Raises OSError while there is no directory to ask."""
    try:
        actor = await asyncio.to_thread(_find, application)
        return set(await asyncio.wait_for(actor.addresses.remote(), _ANSWER))
    except (RayError, TimeoutError, ValueError, ConnectionError) as error:
        raise OSError(f"no directory of routers for {application!r} on this Ray cluster") from error


def addresses(application: str) -> list[str]:
    """The routers' addresses, in order; none while there is no directory. Blocks."""
    try:
        found: list[str] = ray.get(_find(application).addresses.remote(), timeout=_ANSWER)
    except (RayError, ValueError):
        return []
    return found


def end(application: str) -> None:
    """Ends the directory, if there is one: for applications whose routers may not have left in peace. Blocks."""
    try:
        ray.kill(_find(application))
    except (RayError, ValueError):
        return


def _open(application: str) -> Any:
    actor: Any = ray.remote(Directory)
    return actor.options(
        name=application, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0, max_restarts=0
    ).remote()


def _find(application: str) -> Any:
    """Raises ValueError when there is none, ConnectionError when there is no cluster."""
    if not ray.is_initialized():
        ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False)
    return ray.get_actor(application, namespace=NAMESPACE)


RESOLVERS["ray"] = look_up
