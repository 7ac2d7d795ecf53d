"""A worker's membership: keeps a ``Registry.Join`` stream open to every router and sends reports on it.

A broken stream is reopened without limit. Only a router that refuses the worker as incompatible ends the attempts.

One router may have two addresses, such as an IPv4 and an IPv6 one. A router ends a worker's older stream when
the worker joins again. So a link whose stream has ended waits while another link has joined the same router.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import grpc.aio

from overfill.errors import Incompatible, OverfillError, Unavailable
from overfill.rpc.access import Role
from overfill.rpc.addresses import split_address
from overfill.rpc.calls import checked_response, checked_write
from overfill.rpc.channel import open_channel
from overfill.rpc.credits import RouterDemand, divide
from overfill.rpc.tls import Credentials
from overfill.v1 import registry_pb2, registry_pb2_grpc

logger = logging.getLogger(__name__)

REPORT_INTERVAL = 1.0
"""Maximum seconds between two reports."""

REPORT_GAP = 0.02
"""Minimum seconds between two reports; one report carries all changes in between."""

DEBOUNCE_GAP = 0.2
"""Seconds within which a debounced change is reported. A busy worker has such a change with every step."""

RESOLVE_INTERVAL = 5.0
"""Seconds between two resolutions of a router's name."""

SEARCH_INTERVAL = 0.5
"""The same while the name has no addresses yet, because routers and workers start at the same time."""

BACKOFF_FIRST, BACKOFF_CAP = 0.1, 2.0
"""Seconds before the first retry, and their maximum; doubled after each failure, with jitter."""

REFUSED_RETRY = 30.0
"""Seconds, at most, after which a worker tries again to join a router that refused it."""

WARN_AFTER = 10.0
"""Seconds of failed attempts to join a router after which the worker warns. Processes of a stack start together."""


PARKED = 60.0
"""Seconds after which a link tries again although another link has joined the same router: by then, the address may be
another router's."""

MAX_ROLLOUT_BYTES = 512
"""Maximum size of a Rollout that a worker keeps; each report repeats it."""

_SCHEME = ":///"

Resolver = Callable[[str], Awaitable[set[str]]]
"""Returns the current addresses ``host:port`` of a name. Raises OSError when the look-up fails."""


class PrefixFeed(Protocol):
    """Changes of keys that one router has not received yet."""

    def take(self) -> registry_pb2.PrefixDelta | None: ...

    def close(self) -> None: ...


class PrefixKeys(Protocol):
    """Keys of a prefix cache, or of KV on disk. Each feed starts with all current keys."""

    def feed(self) -> PrefixFeed: ...


class Membership:
    """Joins routers and sends them reports. Use it from one event loop.

    Args:
        hello: description of the worker; read when a stream opens.
        routers: addresses of routers, ``host:port`` or ``unix:path``, or names that stand for several addresses and are
            resolved repeatedly: ``dns:///name:port`` (with TLS, certificates name the DNS entry), or another scheme in
            ``RESOLVERS``. The worker leaves an address that its name no longer lists once the stream has ended.
        report: makes the current report. Its ``credits`` are the worker's total; each router gets its share.
        tls: certificates and secret to send; None sends none, without TLS.
        on_refused: called when every router has refused the worker as incompatible.
        prefix_keys: keys whose changes each report carries; None means that the worker has no prefix cache.
        disk_keys: the same for KV on disk.

    Attributes:
        joined: set while at least one router has welcomed the worker.
        rollout: the newest Rollout that any router has sent. Each report repeats it, so that every router learns it,
            also one that starts later. None before the first.

    Raises:
        ValueError: a name has a scheme that ``RESOLVERS`` does not know.
    """

    def __init__(
        self,
        hello: registry_pb2.Hello,
        routers: Sequence[str],
        report: Callable[[], registry_pb2.Report],
        tls: Credentials | None = None,
        on_refused: Callable[[Incompatible], None] | None = None,
        prefix_keys: PrefixKeys | None = None,
        disk_keys: PrefixKeys | None = None,
    ) -> None:
        self.joined = asyncio.Event()
        self.rollout: registry_pb2.Rollout | None = None
        self._hello = hello
        self._routers = {router: _resolver(router) for router in routers}
        self._report = report
        self._tls = tls
        self._on_refused = on_refused
        by_field = {"prefix": prefix_keys, "disk": disk_keys}  # fields of Report
        self._keys = {field: keys for field, keys in by_field.items() if keys is not None}
        self._links: dict[str, _Link] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._resolvers: list[asyncio.Task[None]] = []

    @property
    def num_joined(self) -> int:
        """Number of routers that have welcomed the worker and are still connected."""
        return sum(link.joined for link in self._links.values())

    async def start(self) -> None:
        """Starts to join routers in the background; ``joined`` is set once one has welcomed the worker."""
        for router, resolver in self._routers.items():
            if resolver is not None:
                self._resolvers.append(asyncio.create_task(self._follow(router, resolver)))
            else:
                self._add(router, self._tls)

    def notify(self, *, debounce: bool = False) -> None:
        """Sends a changed report soon; with ``debounce``, within ``DEBOUNCE_GAP``, because the change can wait."""
        for link in self._links.values():
            if debounce:
                link.change_later()
            else:
                link.changed.set()

    async def drain_reported(self) -> None:
        """Waits until all joined routers know that the worker drains, ``REPORT_INTERVAL`` at most.

        A router counts a worker as lost if its stream ends before that.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(REPORT_INTERVAL):
                await asyncio.gather(*(link.drain_sent.wait() for link in self._links.values() if link.joined))
                await asyncio.sleep(REPORT_GAP)  # the end of a stream may discard what its router has not read

    async def stop(self) -> None:
        """Closes the streams to all routers."""
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
            address,
            self._hello,
            self._report_for,
            self._membership_changed,
            self.notify,
            self._keep_rollout,
            self._joined_elsewhere,
            tls,
            self._keys,
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
        """Adds a link for each address that a name lists, and removes links that are no longer needed.

        A link is removed after two look-ups in a row that do not list its address while it is not joined. One look-up
        may omit a router that restarts. An open stream proves that the router runs, even if look-ups omit it.
        """
        mine: set[str] = set()  # addresses that this name has added; other entries of the list own the rest
        missing: set[str] = set()  # of these, addresses that the last look-up omitted while they were not joined
        tls = self._tls
        if router.startswith("dns:") and tls is not None and tls.tls is not None and not tls.tls.name:
            # Certificates name the DNS entry, because addresses change.
            name = split_address(router.partition(_SCHEME)[2])[0]
            tls = replace(tls, tls=replace(tls.tls, name=name))
        logged = ""
        while True:
            try:
                found = await resolver(router.partition(_SCHEME)[2])
                logged = ""
            except (OSError, ValueError) as error:  # ValueError: a malformed name
                if logged != (logged := str(error)):
                    logger.warning("cannot resolve %s: %s", router, error)
                found = mine
            new = found - self._links.keys()
            for address in new:
                self._add(address, tls)
            was_missing, missing = missing, {one for one in mine - found if not self._links[one].joined}
            if removed := missing & was_missing:
                for address in removed:
                    await self._remove(address)
                mine -= removed
                self._check_refusals()  # once all are removed, because a router that refused may be among them
            mine |= new
            await asyncio.sleep(RESOLVE_INTERVAL if found else SEARCH_INTERVAL)

    async def _keep(self, link: _Link) -> None:
        """Keeps a link open. One that was refused is tried again slowly, as long as the worker has other routers.

        The router may be replaced by one with other tiers, or the workers with which it compared this one may leave.
        """
        while True:
            try:
                await link.keep_open()
            except Incompatible as error:
                if str(link.refusal) != str(error):
                    logger.error("router %s refused this worker: %s", link.address, error)
                link.refusal = error
                self._check_refusals()
            await asyncio.sleep(REFUSED_RETRY * random.uniform(0.5, 1.0))

    def _check_refusals(self) -> None:
        """Calls ``on_refused`` when every known router has refused the worker. Runs after refusals and removals."""
        refusals = [link.refusal for link in self._links.values() if link.refusal is not None]
        if self._on_refused is not None and refusals and len(refusals) == len(self._links):
            self._on_refused(refusals[-1])

    def _report_for(self, link: _Link) -> registry_pb2.Report:
        report = registry_pb2.Report()
        report.CopyFrom(self._report())
        joined = [other for other in self._links.values() if other.joined or other is link]
        shares = divide(report.credits, [other.demand for other in joined])
        report.credits, report.routers = shares[joined.index(link)], len(joined)
        if self.rollout is not None:
            report.rollout.CopyFrom(self.rollout)
        return report

    def _keep_rollout(self, rollout: registry_pb2.Rollout) -> None:
        """Keeps a Rollout that a router has sent, and reports it to all routers, if it is newer than the kept one."""
        rollout.DiscardUnknownFields()
        if rollout.ByteSize() > MAX_ROLLOUT_BYTES:
            logger.warning("ignored a Rollout of %d bytes; the maximum is %d", rollout.ByteSize(), MAX_ROLLOUT_BYTES)
        elif self.rollout is None or is_newer(rollout, self.rollout):
            self.rollout = rollout
            self.notify()

    def _joined_elsewhere(self, link: _Link) -> bool:
        """True while another link has joined the router that ``link`` joined last."""
        others = (other for other in self._links.values() if other is not link)
        return any(other.joined and other.router_id == link.router_id for other in others)

    def _membership_changed(self) -> None:
        if self.num_joined:
            self.joined.set()
        else:
            self.joined.clear()
        self.notify()


class _Link:
    """The Join stream to one router."""

    def __init__(
        self,
        address: str,
        hello: registry_pb2.Hello,
        report: Callable[[_Link], registry_pb2.Report],
        on_change: Callable[[], None],
        on_demand: Callable[[], None],
        on_rollout: Callable[[registry_pb2.Rollout], None],
        joined_elsewhere: Callable[[_Link], bool],
        tls: Credentials | None,
        keys: Mapping[str, PrefixKeys],
    ) -> None:
        self.address = address
        self.joined = False
        self.router_id = ""  # of the router that was joined last
        self.refusal: Incompatible | None = None
        self.changed = asyncio.Event()
        self.drain_sent = asyncio.Event()
        self._hello = hello
        self._report = report
        self._on_change = on_change
        self._on_demand = on_demand
        self._on_rollout = on_rollout
        self._joined_elsewhere = joined_elsewhere
        self._tls = tls
        self._keys = keys
        self._adapters = registry_pb2.AdapterList()  # as the router knows them
        self.demand: RouterDemand | None = None
        self._later: asyncio.TimerHandle | None = None

    def change_later(self) -> None:
        """Sets ``changed`` after a delay; a report sent in the meantime cancels this."""
        if self._later is None:
            self._later = asyncio.get_running_loop().call_later(DEBOUNCE_GAP, self.changed.set)

    async def keep_open(self) -> None:
        """Opens the stream and reopens it whenever it ends. Raises Incompatible when the router refuses the worker."""
        loop = asyncio.get_running_loop()
        delay, apart_since, warned = BACKOFF_FIRST, loop.time(), ""
        while True:
            try:
                await self._run_stream()
            except Incompatible:
                raise
            except OverfillError as error:
                if self.joined:
                    logger.info("lost router %s: %s", self.address, error)
                    apart_since, warned = loop.time(), ""
                elif loop.time() - apart_since >= WARN_AFTER and warned != (warned := str(error)):
                    logger.warning("cannot join router %s: %s", self.address, error)
            except Exception:
                # For instance a certificate that is being replaced. Keep the worker and try again.
                logger.exception("router %s: joining failed", self.address)
            finally:
                was_joined, self.joined, self.demand = self.joined, False, None
                if was_joined:
                    self._on_change()
            delay = BACKOFF_FIRST if was_joined else min(BACKOFF_CAP, 2 * delay)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            if was_joined and self._joined_elsewhere(self):
                logger.info("router %s is joined at another address than %s too", self.router_id, self.address)
                await self._park()

    async def _park(self) -> None:
        """Waits until no other link has joined the same router, ``PARKED`` seconds at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PARKED):
                while self._joined_elsewhere(self):
                    self.changed.clear()
                    await self.changed.wait()

    async def _run_stream(self) -> None:
        # A new channel for each attempt, because gRPC would add its own back-off to ours on an old one.
        channel = open_channel(self.address, self._tls, role=Role.ROUTER)
        try:
            call: Any = registry_pb2_grpc.RegistryStub(channel).Join()
            self._adapters = registry_pb2.AdapterList(adapters=self._hello.adapters)
            with suppress(OverfillError):  # the call may have ended; the read below raises its error
                await checked_write(call.write(registry_pb2.JoinRequest(hello=self._hello)), self.address)
            welcome = await self._read(call)
            self.router_id, self.refusal = welcome.welcome.router_id, None
            logger.info("joined router %s at %s", self.router_id, self.address)
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
            elif message.HasField("rollout"):
                self._on_rollout(message.rollout)

    async def _tell(self, call: Any) -> None:
        self.drain_sent.clear()
        feeds = {field: keys.feed() for field, keys in self._keys.items()}
        try:
            await self._tell_reports(call, feeds)
        finally:
            for feed in feeds.values():
                feed.close()

    async def _tell_reports(self, call: Any, feeds: Mapping[str, PrefixFeed]) -> None:
        while True:
            self.changed.clear()
            if self._later is not None:
                self._later.cancel()
                self._later = None
            report = self._report(self)
            for field, feed in feeds.items():
                if (delta := feed.take()) is not None:
                    getattr(report, field).CopyFrom(delta)
            if report.adapters == self._adapters:
                report.ClearField("adapters")
            else:
                self._adapters = report.adapters
            await checked_write(call.write(registry_pb2.JoinRequest(report=report)), self.address)
            if report.draining:
                self.drain_sent.set()
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


class _Numbered(Protocol):
    @property
    def generation(self) -> int: ...

    @property
    def tie_break(self) -> int: ...


def is_newer(state: _Numbered, other: _Numbered) -> bool:
    """True if a rollout's ``state`` replaces the ``other``.

    Generations are on a circle, as sequence numbers in RFC 1982: the next one after any is newer. So no generation
    that a faulty process sends ends the changes. Generation 0, which no change has, is the oldest.
    """
    if not (state.generation and other.generation):
        return bool(state.generation)
    ahead = (state.generation - other.generation) % (1 << 64)
    return state.tie_break > other.tie_break if ahead == 0 else ahead < 1 << 63


def next_generation(generation: int) -> int:
    """Returns the generation of the change after ``generation``."""
    return generation % ((1 << 64) - 1) + 1


def _resolver(router: str) -> Resolver | None:
    scheme, found, _ = router.partition(_SCHEME)
    if not found:
        return None
    if scheme not in RESOLVERS:
        raise ValueError(f"{router}: cannot resolve names of this scheme; known schemes are {', '.join(RESOLVERS)}")
    return RESOLVERS[scheme]


async def resolve(target: str) -> set[str]:
    """Returns the current addresses ``ip:port`` of ``name:port``. Raises OSError when the look-up fails."""
    name, port = split_address(target)
    infos = await asyncio.get_running_loop().getaddrinfo(name.strip("[]"), port)
    hosts = {str(sockaddr[0]) for *_, sockaddr in infos}
    return {f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts}


RESOLVERS: dict[str, Resolver] = {"dns": resolve}
"""Scheme of ``scheme:///name`` -> its resolver. ``overfill.stack.ray.directory`` adds ``ray``."""
