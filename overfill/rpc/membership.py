"""A worker's place in every router's list: Registry.Join kept open, with reports on it.

A broken stream is opened again, for ever; only a router that says that the worker does not fit ends it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import grpc.aio

from overfill.errors import Incompatible, OverfillError, Unavailable
from overfill.rpc.addresses import split_address
from overfill.rpc.calls import checked_response, checked_write
from overfill.rpc.channel import open_channel
from overfill.rpc.credits import RouterDemand, divide
from overfill.rpc.tls import Credentials
from overfill.v1 import registry_pb2, registry_pb2_grpc

logger = logging.getLogger(__name__)

REPORT_INTERVAL = 1.0
"""Seconds between reports when nothing changes."""

REPORT_GAP = 0.02
"""Seconds between reports at least; changes in between travel together."""

PASSING_GAP = 0.2
"""Seconds until a change is reported for which nobody waits; a busy worker has one with every step."""

RESOLVE_INTERVAL = 5.0
"""Seconds between look-ups of a name."""

SEARCH_INTERVAL = 0.5
"""The same while nothing has been found yet: routers and workers start at the same time."""

BACKOFF_FIRST, BACKOFF_CAP = 0.1, 2.0
"""Seconds before the first retry, and the most; doubled each time, with jitter."""


_SCHEME = ":///"

Resolver = Callable[[str], Awaitable[set[str]]]
"""The addresses ``host:port`` that a name stands for now. Raises OSError while it cannot tell."""


class PrefixFeed(Protocol):
    """What one router has not been told yet of a prefix cache's keys."""

    def take(self) -> registry_pb2.PrefixDelta | None: ...

    def close(self) -> None: ...


class PrefixKeys(Protocol):
    """The keys of a prefix cache; each feed begins with all there are."""

    def feed(self) -> PrefixFeed: ...


class Membership:
    """Joins routers and keeps them informed. Use it from one event loop.

    Args:
        hello: what the worker says about itself; read when a stream opens.
        routers: ``host:port`` or ``unix:path`` of one router, or a name for several that is looked up again and
            again: ``dns:///name:port`` (with TLS, their certificates are for the name), or any other scheme that
            ``RESOLVERS`` knows. An address that a name lists no more is left once its stream has ended.
        report: what every router is told, its ``credits`` all that the worker takes; they are divided here.
        on_refused: called when every router has refused the worker for good.
        prefix_keys: whose changes each report carries; None: no prefix cache.

    Attributes:
        joined: set while at least one router has welcomed the worker.

    Raises:
        ValueError: nobody here can look one of the names up.
    """

    def __init__(
        self,
        hello: registry_pb2.Hello,
        routers: Sequence[str],
        report: Callable[[], registry_pb2.Report],
        tls: Credentials | None = None,
        on_refused: Callable[[Incompatible], None] | None = None,
        prefix_keys: PrefixKeys | None = None,
    ) -> None:
        self.joined = asyncio.Event()
        self._hello = hello
        self._routers = {router: _resolver(router) for router in routers}
        self._report = report
        self._tls = tls
        self._on_refused = on_refused
        self._prefix_keys = prefix_keys
        self._links: dict[str, _Link] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._resolvers: list[asyncio.Task[None]] = []

    @property
    def num_joined(self) -> int:
        """Routers that have welcomed the worker and are still connected."""
        return sum(link.joined for link in self._links.values())

    async def start(self) -> None:
        """Begins to join; does not wait for any router. ``joined`` tells."""
        for router, resolver in self._routers.items():
            if resolver is not None:
                self._resolvers.append(asyncio.create_task(self._follow(router, resolver)))
            else:
                self._add(router, self._tls)

    def notify(self, *, debounce: bool = False) -> None:
        """Something in the report has changed: it is sent soon, or, where that can wait, within ``PASSING_GAP``."""
        for link in self._links.values():
            if debounce:
                link.change_later()
            else:
                link.changed.set()

    async def stop(self) -> None:
        """Leaves every router."""
        tasks = [*self._resolvers, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._resolvers.clear()
        self._tasks.clear()
        self._links.clear()
        self.joined.clear()

    def _add(self, address: str, tls: Credentials | None) -> None:
        link = _Link(
            address, self._hello, self._report_for, self._membership_changed, self.notify, tls, self._prefix_keys
        )
        self._links[address] = link
        self._tasks[address] = asyncio.create_task(self._keep(link))

    async def _remove(self, address: str) -> None:
        task = self._tasks.pop(address)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        del self._links[address]
        self._membership_changed()

    async def _follow(self, router: str, resolver: Resolver) -> None:
        """Adds a link to each address that a name lists, and removes those that have gone.

        A link goes when two look-ups in a row find that the name does not list it and that it is not joined: a router
        that restarts may be missing from one. An open stream proves that the router runs, even when the look-up omits
        it.
        """
        mine: set[str] = set()  # addresses that this name has added: another entry of the list may own others
        missing: set[str] = set()  # those that the last look-up did not list, and that were not joined
        tls = self._tls
        if router.startswith("dns:") and tls is not None and tls.tls is not None and not tls.tls.name:
            # Certificates name the DNS entry, because addresses change.
            name = split_address(router.partition(_SCHEME)[2])[0]
            tls = replace(tls, tls=replace(tls.tls, name=name))
        told = ""
        while True:
            try:
                found = await resolver(router.partition(_SCHEME)[2])
                told = ""
            except (OSError, ValueError) as error:  # ValueError: a name that cannot be one
                if told != (told := str(error)):
                    logger.warning("cannot resolve %s: %s", router, error)
                found = mine
            new = found - self._links.keys()
            for address in new:
                self._add(address, tls)
            was_missing, missing = missing, {one for one in mine - found if not self._links[one].joined}
            if gone := missing & was_missing:
                for address in gone:
                    await self._remove(address)
                mine -= gone
                self._check_refusals()  # after the last removal: a router that refused may be among them
            mine |= new
            await asyncio.sleep(RESOLVE_INTERVAL if found else SEARCH_INTERVAL)

    async def _keep(self, link: _Link) -> None:
        try:
            await link.keep_open()
        except Incompatible as error:
            logger.error("router %s refused this worker: %s", link.address, error)
            link.refusal = error
            self._check_refusals()

    def _check_refusals(self) -> None:
        """Calls ``on_refused`` when no router is left that could take the worker. Follows refusals and removals."""
        refusals = [link.refusal for link in self._links.values() if link.refusal is not None]
        if self._on_refused is not None and refusals and len(refusals) == len(self._links):
            self._on_refused(refusals[-1])

    def _report_for(self, link: _Link) -> registry_pb2.Report:
        report = registry_pb2.Report()
        report.CopyFrom(self._report())
        joined = [other for other in self._links.values() if other.joined or other is link]
        shares = divide(report.credits, [other.demand for other in joined])
        report.credits, report.routers = shares[joined.index(link)], len(joined)
        return report

    def _membership_changed(self) -> None:
        if self.num_joined:
            self.joined.set()
        else:
            self.joined.clear()
        self.notify()


class _Link:
    """The stream to one router."""

    def __init__(
        self,
        address: str,
        hello: registry_pb2.Hello,
        report: Callable[[_Link], registry_pb2.Report],
        on_change: Callable[[], None],
        on_demand: Callable[[], None],
        tls: Credentials | None,
        prefix_keys: PrefixKeys | None,
    ) -> None:
        self.address = address
        self.joined = False
        self.refusal: Incompatible | None = None
        self.changed = asyncio.Event()
        self._hello = hello
        self._report = report
        self._on_change = on_change
        self._on_demand = on_demand
        self._tls = tls
        self._prefix_keys = prefix_keys
        self.demand: RouterDemand | None = None
        self._later: asyncio.TimerHandle | None = None

    def change_later(self) -> None:
        """Sets ``changed`` in a while, unless a report comes first."""
        if self._later is None:
            self._later = asyncio.get_running_loop().call_later(PASSING_GAP, self.changed.set)

    async def keep_open(self) -> None:
        """Opens the stream whenever there is none. Raises Incompatible when the router refuses the worker."""
        delay = BACKOFF_FIRST
        while True:
            try:
                await self._run_stream()
            except Incompatible:
                raise
            except OverfillError as error:
                level = logging.INFO if self.joined else logging.DEBUG
                logger.log(level, "router %s has gone: %s", self.address, error)
            except Exception:
                # Such as a certificate that is being replaced: the worker stays, and tries again.
                logger.exception("router %s: joining failed", self.address)
            finally:
                was_joined, self.joined, self.demand = self.joined, False, None
                if was_joined:
                    self._on_change()
            delay = BACKOFF_FIRST if was_joined else min(BACKOFF_CAP, 2 * delay)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def _run_stream(self) -> None:
        # A new channel each time: a kept one would add its own back-off to ours.
        channel = open_channel(self.address, self._tls)
        try:
            call: Any = registry_pb2_grpc.RegistryStub(channel).Join()
            with suppress(OverfillError):  # of an ended call; the read says how it ended
                await checked_write(call.write(registry_pb2.JoinRequest(hello=self._hello)), self.address)
            welcome = await self._read(call)
            logger.info("joined router %s at %s", welcome.welcome.router_id, self.address)
            self.joined = True
            self._on_change()
            tasks = [asyncio.create_task(self._listen(call)), asyncio.create_task(self._tell(call))]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.result()
        finally:
            await channel.close(None)

    async def _listen(self, call: Any) -> None:
        while True:
            message = await self._read(call)
            if message.HasField("demand"):
                self.demand = RouterDemand(message.demand.in_use, message.demand.queued)
                self._on_demand()

    async def _tell(self, call: Any) -> None:
        feed = self._prefix_keys.feed() if self._prefix_keys is not None else None
        try:
            await self._tell_reports(call, feed)
        finally:
            if feed is not None:
                feed.close()

    async def _tell_reports(self, call: Any, feed: PrefixFeed | None) -> None:
        while True:
            self.changed.clear()
            if self._later is not None:
                self._later.cancel()
                self._later = None
            report = self._report(self)
            if feed is not None and (delta := feed.take()) is not None:
                report.prefix.CopyFrom(delta)
            await checked_write(call.write(registry_pb2.JoinRequest(report=report)), self.address)
            await asyncio.sleep(REPORT_GAP)
            try:
                await asyncio.wait_for(self.changed.wait(), REPORT_INTERVAL - REPORT_GAP)
            except TimeoutError:
                continue

    async def _read(self, call: Any) -> registry_pb2.JoinResponse:
        message = await checked_response(call.read(), self.address)
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise Unavailable(f"{self.address}: the router closed the stream")
        assert isinstance(message, registry_pb2.JoinResponse)
        return message


def _resolver(router: str) -> Resolver | None:
    scheme, found, _ = router.partition(_SCHEME)
    if not found:
        return None
    if scheme not in RESOLVERS:
        raise ValueError(f"{router}: names of this kind cannot be looked up here; known are {', '.join(RESOLVERS)}")
    return RESOLVERS[scheme]


async def resolve(target: str) -> set[str]:
    """The addresses ``ip:port`` that ``name:port`` stands for now. Raises OSError."""
    name, port = split_address(target)
    infos = await asyncio.get_running_loop().getaddrinfo(name.strip("[]"), port)
    hosts = {str(sockaddr[0]) for *_, sockaddr in infos}
    return {f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts}


RESOLVERS: dict[str, Resolver] = {"dns": resolve}
"""Who looks up a ``scheme:///name`` of routers. ``overfill.cluster.directory`` adds ``ray``."""
