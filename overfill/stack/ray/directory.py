"""Directory of an application's routers: a named Ray actor to which routers report, and which workers query.

A router's entry is a lease. It ends when the router withdraws it or stops reporting. If the actor is lost, the next
router to report creates a new one.
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
"""Ray namespace of the actor; the actor has the application's name."""

LEASE = 10.0
"""Seconds without a report after which the directory removes a router."""

REPORT_INTERVAL = 2.0
"""Seconds between a router's reports."""

_ANSWER = 5.0  # seconds to wait for the actor's answer


class Directory:
    """Addresses of routers with the times at which their leases end, on the actor's monotonic clock."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def report(self, address: str) -> None:
        """Renews the lease of the router at ``address``."""
        self._until[address] = time.monotonic() + LEASE

    def remove(self, address: str) -> int:
        """Removes the router at ``address`` and returns the number of remaining routers."""
        self._until.pop(address, None)
        return len(self.addresses())

    def addresses(self) -> list[str]:
        """Returns the addresses of all routers, sorted."""
        now = time.monotonic()
        self._until = {address: until for address, until in self._until.items() if until > now}
        return sorted(self._until)


async def keep_reported(application: str, address: str, lasts: Callable[[], bool]) -> None:
    """Reports the router at ``address`` while ``lasts()`` returns True, and then withdraws it."""
    actor: Any = None
    while lasts():
        try:
            if actor is None:
                actor = await asyncio.to_thread(_open, application)
            await asyncio.wait_for(actor.report.remote(address), _ANSWER)
        except (RayError, TimeoutError, ValueError) as error:
            logger.warning("the directory of %s does not answer (%r); trying again", application, error)
            actor = None
        await asyncio.sleep(REPORT_INTERVAL)
    await withdraw(application, address)


async def withdraw(application: str, address: str) -> None:
    """Removes the router at ``address`` from the directory; the last router ends the directory."""
    try:
        actor = await asyncio.to_thread(_find, application)
        if await asyncio.wait_for(actor.remove.remote(address), _ANSWER) == 0:
            ray.kill(actor)
    except (RayError, TimeoutError, ValueError) as error:
        logger.debug("the directory of %s no longer exists: %r", application, error)


async def look_up(application: str) -> set[str]:
    """Returns the routers' addresses. Raises OSError while the directory does not exist or does not answer."""
    try:
        actor = await asyncio.to_thread(_find, application)
        return set(await asyncio.wait_for(actor.addresses.remote(), _ANSWER))
    except (RayError, TimeoutError, ValueError, ConnectionError) as error:
        raise OSError(f"no directory of routers for {application!r} on this Ray cluster") from error


def addresses(application: str) -> list[str]:
    """Returns the routers' addresses, sorted; an empty list while the directory does not exist. Blocks."""
    try:
        found: list[str] = ray.get(_find(application).addresses.remote(), timeout=_ANSWER)
    except (RayError, ValueError):
        return []
    return found


def end(application: str) -> None:
    """Ends the directory if it exists. Use it after routers may have died without withdrawing. Blocks."""
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
    """Returns the actor. Raises ValueError if it does not exist, ConnectionError without a cluster."""
    if not ray.is_initialized():
        ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False)
    return ray.get_actor(application, namespace=NAMESPACE)


RESOLVERS["ray"] = look_up
