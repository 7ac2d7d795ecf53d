"""Tests a worker's membership against scripted registries on loopback."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest

from overfill.errors import Incompatible, Unavailable
from overfill.kv.journal import KeyJournal
from overfill.lab.chaos.proxy import TcpProxy
from overfill.rpc import membership as membership_module
from overfill.rpc.access import Role
from overfill.rpc.membership import Membership
from overfill.rpc.server import RpcServer
from overfill.rpc.tls import ClientTls, Credentials
from overfill.v1 import common_pb2, registry_pb2, registry_pb2_grpc

SERVICE = registry_pb2.DESCRIPTOR.services_by_name["Registry"].full_name


class Registry(registry_pb2_grpc.RegistryServicer):
    """Records messages of workers, sends those in ``outbox``, and refuses workers with ``errors``.

    As in a router, a newer stream of the worker ends the older one at its next report.
    """

    def __init__(self):
        self.id = f"router-{id(self)}"
        self.newest = None
        self.hellos = asyncio.Queue()
        self.reports = asyncio.Queue()
        self.outbox = asyncio.Queue()
        self.errors = []

    async def Join(self, requests, context):
        first = await anext(requests)
        await self.hellos.put(first.hello)
        if self.errors:
            raise self.errors.pop(0)
        self.newest = context
        await context.write(registry_pb2.JoinResponse(welcome=registry_pb2.Welcome(router_id=self.id)))
        sending = asyncio.create_task(self._send(context))
        try:
            async for message in requests:
                if self.newest is not context:
                    return
                await self.reports.put(message.report)
        finally:
            sending.cancel()

    async def _send(self, context):
        while True:
            message = await self.outbox.get()
            if message is None:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
            await context.write(message)

    async def report_with(self, credits):
        while (await self.reports.get()).credits != credits:
            pass


@asynccontextmanager
async def registry(address="127.0.0.1:0"):
    server, servicer = RpcServer(), Registry()
    server.add(registry_pb2_grpc.add_RegistryServicer_to_server, servicer, SERVICE)
    bound = await server.start(address)
    try:
        yield servicer, bound
    finally:
        await server.stop(0)


@asynccontextmanager
async def member(*routers, report=None, **arguments):
    hello = registry_pb2.Hello(worker_id="w", incarnation=5)
    report = report or (lambda: registry_pb2.Report(credits=12, ready=True))
    membership = Membership(hello, routers, report, **arguments)
    await membership.start()
    try:
        yield membership
    finally:
        await membership.stop()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(membership_module, "BACKOFF_FIRST", 0.01)
    monkeypatch.setattr(membership_module, "BACKOFF_CAP", 0.02)
    monkeypatch.setattr(membership_module, "RESOLVE_INTERVAL", 0.01)
    monkeypatch.setattr(membership_module, "SEARCH_INTERVAL", 0.01)


class Name:
    """A DNS name of routers that resolves to ``addresses``, or raises ``error``."""

    def __init__(self, monkeypatch, *addresses, scheme="dns"):
        self.addresses, self.error = set(addresses), None
        self._looked = asyncio.Event()
        monkeypatch.setitem(membership_module.RESOLVERS, scheme, self._resolve)

    async def _resolve(self, target):
        self._looked.set()
        if self.error is not None:
            raise self.error
        return set(self.addresses)

    async def looked_up(self, times=4):
        """Waits for the given number of look-ups, and until the membership has acted on their results."""
        for _ in range(times):
            self._looked.clear()
            await self._looked.wait()


async def test_a_worker_says_hello_and_reports():
    async with registry() as (router, address), member(address) as worker:
        hello = await router.hellos.get()
        assert (hello.worker_id, hello.incarnation) == ("w", 5)
        report = await router.reports.get()
        assert (report.credits, report.ready) == (12, True)
        await worker.joined.wait()


async def test_a_change_is_reported_long_before_the_next_regular_report(monkeypatch):
    monkeypatch.setattr(membership_module, "REPORT_INTERVAL", 3600.0)
    credits = [1]
    async with (
        registry() as (router, address),
        member(address, report=lambda: registry_pb2.Report(credits=credits[0])) as worker,
    ):
        await router.report_with(1)
        credits[0] = 2
        for _ in range(50):
            worker.notify()
        await router.report_with(2)


async def test_changes_that_can_wait_are_reported_together_or_with_urgent_ones(monkeypatch):
    monkeypatch.setattr(membership_module, "REPORT_INTERVAL", 3600.0)
    monkeypatch.setattr(membership_module, "REPORT_GAP", 0.0)
    monkeypatch.setattr(membership_module, "DEBOUNCE_GAP", 3600.0)
    credits = [1]
    async with (
        registry() as (router, address),
        member(address, report=lambda: registry_pb2.Report(credits=credits[0])) as worker,
    ):
        await router.report_with(1)
        for credits[0] in range(2, 9):
            worker.notify(debounce=True)
            await asyncio.sleep(0)
        worker.notify()
        assert (await router.reports.get()).credits == 8
        monkeypatch.setattr(membership_module, "DEBOUNCE_GAP", 0.01)
        credits[0] = 9
        worker.notify(debounce=True)
        await router.report_with(9)


async def test_credits_are_not_divided_with_a_router_that_is_away():
    async with registry() as (first, one), registry() as (second, two), member(one, two):
        await second.report_with(6)
        second.errors.append(Unavailable("restarting"))
        second.outbox.put_nowait(None)
        await first.report_with(12)


async def test_a_router_that_cannot_be_joined_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(membership_module, "WARN_AFTER", 0.0)
    async with member("127.0.0.1:1"):
        while "cannot join router 127.0.0.1:1" not in caplog.text:
            await asyncio.sleep(0.01)


async def test_a_router_without_the_worker_s_revision_is_asked_until_it_has_it_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(membership_module, "WARN_AFTER", 0.0)
    refusals = []
    async with registry() as (router, address):
        router.errors += [Unavailable("worker w has the revision 'r2'; this router serves 'r1'")] * 3
        async with member(address, on_refused=refusals.append) as worker:
            await worker.joined.wait()
            assert router.hellos.qsize() == 4
    assert refusals == []
    assert "cannot join router" in caplog.text
    assert "has the revision 'r2'" in caplog.text


def rollout(generation, tie_break=0, **fields):
    return registry_pb2.Rollout(generation=generation, tie_break=tie_break, revision="r2", **fields)


async def test_the_newest_rollout_of_any_router_is_in_every_report_also_to_a_router_that_starts_later():
    async with registry() as (first, one), registry() as (second, two), member(one, two) as worker:

        async def told(router, *sent):
            for state in sent:
                first.outbox.put_nowait(registry_pb2.JoinResponse(rollout=state))
            while (report := await router.reports.get()).rollout != sent[0]:
                pass
            return report

        assert not (await second.reports.get()).HasField("rollout")
        await told(second, rollout(2, 5, to_percent=40))
        await told(second, rollout(2, 6, to_percent=50), rollout(2, 5), rollout(1, 9))
        assert worker.rollout == rollout(2, 6, to_percent=50)
        second.outbox.put_nowait(None)
        await second.hellos.get()
        await second.hellos.get()
        assert (await told(second, rollout(3))).rollout.generation == 3


async def test_no_generation_that_a_faulty_router_sends_ends_the_changes():
    async with registry() as (router, address), member(address):
        for state in (rollout(2**64 - 1), rollout(1)):
            router.outbox.put_nowait(registry_pb2.JoinResponse(rollout=state))
        while (await router.reports.get()).rollout != rollout(1):
            pass


async def test_a_rollout_that_is_too_large_to_repeat_is_ignored(caplog):
    async with registry() as (router, address), member(address) as worker:
        large = registry_pb2.Rollout(generation=9, revision="r" * 600)
        for state in (large, rollout(1)):
            router.outbox.put_nowait(registry_pb2.JoinResponse(rollout=state))
        while not (await router.reports.get()).HasField("rollout"):
            pass
        assert worker.rollout == rollout(1)
    assert "ignored a Rollout" in caplog.text


async def test_credits_that_one_router_does_not_use_go_to_one_that_queues():
    async with registry() as (first, one), registry() as (second, other), member(one, other):
        await first.report_with(6)
        await second.report_with(6)
        first.outbox.put_nowait(registry_pb2.JoinResponse(demand=registry_pb2.Demand(in_use=6, queued=9)))
        second.outbox.put_nowait(registry_pb2.JoinResponse(demand=registry_pb2.Demand(in_use=2)))
        await first.report_with(9)
        await second.report_with(3)
        second.outbox.put_nowait(registry_pb2.JoinResponse(demand=registry_pb2.Demand(in_use=2, queued=8)))
        await second.report_with(6)
        await first.report_with(6)


async def test_a_final_refusal_is_reported_and_not_retried():
    refusals = asyncio.Queue()
    async with registry() as (router, address):
        router.errors.append(Incompatible("wire version 1, not 2", ["wire_version"]))
        async with member(address, on_refused=refusals.put_nowait) as worker:
            error = await refusals.get()
            assert error.fields == ("wire_version",)
            assert "wire version 1, not 2" in str(error)
            assert not worker.joined.is_set()
            assert router.hellos.qsize() == 1


async def test_a_refusal_is_asked_about_again_while_another_router_is_joined(monkeypatch):
    monkeypatch.setattr(membership_module, "REFUSED_RETRY", 0.05)
    refusals = asyncio.Queue()
    async with registry() as (first, one), registry() as (second, two):
        first.errors.append(Incompatible("another worker came first", ["kv.dtype"]))
        async with member(one, two, on_refused=refusals.put_nowait) as worker:
            await first.reports.get()
            assert first.hellos.qsize() == 2
            assert worker.num_joined == 2
            second.errors.append(Incompatible("no", ["kv.dtype"]))
            assert refusals.empty(), "the first router does not refuse it any more"


@pytest.mark.parametrize("answer", ["empty", "partial"])
async def test_joined_routers_stay_when_a_look_up_omits_them(monkeypatch, answer):
    async with registry() as (first, one), registry() as (second, two):
        name = Name(monkeypatch, one, two)
        async with member("dns:///routers.internal:7600") as worker:
            await first.report_with(6)
            await second.report_with(6)
            name.addresses = {two} if answer == "partial" else set()
            await name.looked_up()
            assert worker.num_joined == 2
            name.addresses = {one, two}
            await name.looked_up()
            assert worker.num_joined == 2
            assert (first.hellos.qsize(), second.hellos.qsize()) == (1, 1), "no stream was opened anew"
            worker.notify()
            assert (await first.reports.get()).credits == 6


async def test_a_router_that_is_neither_listed_nor_joined_is_left_until_it_is_listed_again(monkeypatch):
    async with registry() as (first, one):
        name = Name(monkeypatch, one)
        async with registry() as (second, two), member("dns:///routers.internal:7600") as worker:
            name.addresses.add(two)
            await first.report_with(6)
            await second.report_with(6)
            name.addresses = {two}
            await name.looked_up()
            first.errors += [Unavailable("leaving")] * 1000
            first.outbox.put_nowait(None)
            await second.report_with(12)
            await name.looked_up()
            first.errors.clear()
            hellos = first.hellos.qsize()
            await name.looked_up(10)
            assert (worker.num_joined, first.hellos.qsize()) == (1, hellos), "it is not tried any more"
            name.addresses = {one, two}
            await first.report_with(6)


async def test_a_refusal_is_reported_when_no_other_router_is_left(monkeypatch):
    refusals = asyncio.Queue()
    async with registry() as (first, one), registry() as (second, two):
        name = Name(monkeypatch, one, two)
        second.errors.append(Incompatible("wire version 1, not 2", ["wire_version"]))
        async with member("dns:///routers.internal:7600", on_refused=refusals.put_nowait):
            await first.report_with(12)
            await second.hellos.get()
            name.addresses = {two}
            await name.looked_up()
            assert refusals.empty(), "the first is still joined"
            first.errors += [Unavailable("leaving")] * 1000
            first.outbox.put_nowait(None)
            assert (await refusals.get()).fields == ("wire_version",)


@pytest.mark.parametrize("answer", ["partial", "empty"])
async def test_one_look_up_without_a_router_that_restarts_ends_no_worker(monkeypatch, answer):
    monkeypatch.setattr(membership_module, "RESOLVE_INTERVAL", 0.0)
    refusals = asyncio.Queue()
    async with registry() as (first, one), registry() as (second, two):
        addresses, omits = {one, two}, asyncio.Event()

        async def resolve(target):
            if omits.is_set() and worker.num_joined == 0:
                omits.clear()
                return {two} if answer == "partial" else set()
            return addresses

        monkeypatch.setitem(membership_module.RESOLVERS, "dns", resolve)
        second.errors += [Incompatible("wire version 1, not 2", ["wire_version"])] * 1000
        async with member("dns:///routers.internal:7600", on_refused=refusals.put_nowait) as worker:
            await first.report_with(12)
            await second.hellos.get()
            omits.set()
            first.errors += [Unavailable("restarting")] * 3
            first.outbox.put_nowait(None)
            while omits.is_set():
                await first.hellos.get()
            await first.report_with(12)
            assert refusals.empty()
            assert worker.num_joined == 1


@pytest.mark.parametrize(("told", "expected"), [("", "routers.internal"), ("overfill.internal", "overfill.internal")])
async def test_a_router_found_by_name_has_to_prove_the_name(monkeypatch, told, expected):
    asked = asyncio.Queue()

    def open_channel(address, tls, role):
        asked.put_nowait((address, tls.tls.name, role))
        raise Unavailable("not today")

    monkeypatch.setattr(membership_module, "open_channel", open_channel)
    Name(monkeypatch, "10.1.2.3:7600")
    tls = Credentials(ClientTls(name=told))
    async with member("dns:///routers.internal:7600", tls=tls):
        assert await asked.get() == ("10.1.2.3:7600", expected, Role.ROUTER)
    asked = asyncio.Queue()
    async with member("router-0.internal:7600", tls=tls):
        assert await asked.get() == ("router-0.internal:7600", told, Role.ROUTER)


async def test_an_address_that_was_given_itself_stays_when_a_name_omits_it(monkeypatch):
    async with registry() as (router, address):
        name = Name(monkeypatch, address)
        async with member(address, "dns:///routers.internal:7600") as worker:
            await router.reports.get()
            name.addresses = set()
            await name.looked_up()
            assert worker.num_joined == 1
            assert router.hellos.qsize() == 1


async def test_a_fault_of_its_own_does_not_end_a_worker_s_attempts_to_join():
    faults = [ValueError("not now"), AssertionError()]

    def report():
        if faults:
            raise faults.pop()
        return registry_pb2.Report(credits=1)

    async with registry() as (router, address), member(address, report=report):
        await router.report_with(1)
        assert router.hellos.qsize() == 3


async def test_streams_stay_while_a_name_cannot_be_resolved(monkeypatch):
    async with registry() as (router, address):
        name = Name(monkeypatch, address)
        async with member("dns:///routers.internal:7600") as worker:
            await router.reports.get()
            name.error = OSError("no such name")
            await name.looked_up()
            assert worker.num_joined == 1


async def test_a_name_resolves_to_addresses_with_its_port():
    assert "127.0.0.1:7600" in await membership_module.resolve("127.0.0.1:7600")


async def test_a_worker_that_stops_leaves():
    async with registry() as (_, address):
        async with member(address) as worker:
            await worker.joined.wait()
        assert not worker.joined.is_set()
        assert worker.num_joined == 0


@pytest.mark.parametrize("field", ["prefix", "disk"])
async def test_every_router_gets_the_keys_in_memory_and_on_disk_and_then_changes(monkeypatch, field):
    monkeypatch.setattr(membership_module, "REPORT_INTERVAL", 0.03)
    journal, other = KeyJournal(), KeyJournal()
    journal.add(1)
    other.add(100)
    keys = {"prefix_keys": other, "disk_keys": other} | {f"{field}_keys": journal}
    async with registry() as (router, address), member(address, **keys):
        first = getattr(await router.reports.get(), field)
        assert (list(first.added), first.replaces) == ([1], True)
        journal.add(2)
        journal.remove(1)
        while not (report := await router.reports.get()).HasField(field):
            pass
        delta = getattr(report, field)
        assert (list(delta.added), list(delta.removed), delta.replaces) == ([2], [1], False)
        router.outbox.put_nowait(None)  # the stream breaks
        while not getattr(report := await router.reports.get(), field).replaces:
            pass
        assert list(getattr(report, field).added) == [2]


async def test_every_router_hears_of_each_change_of_the_adapters_once(monkeypatch):
    monkeypatch.setattr(membership_module, "REPORT_INTERVAL", 0.03)
    loaded = []

    def report():
        return registry_pb2.Report(credits=12, adapters=registry_pb2.AdapterList(adapters=loaded))

    async with registry() as (router, address), member(address, report=report) as worker:
        assert not (await router.reports.get()).HasField("adapters"), "Hello says that there are none"
        for name in ("a", "b", ""):
            loaded[:] = [common_pb2.Adapter(name=name)] if name else []
            worker.notify()
            while not (told := await router.reports.get()).HasField("adapters"):
                pass
            assert [one.name for one in told.adapters.adapters] == [one.name for one in loaded]
            assert not (await router.reports.get()).HasField("adapters")


async def test_routers_that_come_after_the_worker_are_found_soon(monkeypatch):
    async with registry() as (router, address):
        name = Name(monkeypatch, scheme="board")
        monkeypatch.setattr(membership_module, "RESOLVE_INTERVAL", 3600)
        async with member("board:///stack"):
            await name.looked_up()
            name.addresses = {address}
            await router.reports.get()


def test_a_name_of_an_unknown_kind_is_refused_at_once():
    with pytest.raises(ValueError, match=r"board:///stack.*known schemes are dns"):
        Membership(registry_pb2.Hello(), ["board:///stack"], lambda routers: registry_pb2.Report())


async def settled(router):
    """Waits until a worker has sent 20 reports in a row without joining again."""
    reports = 0
    while reports < 20:
        await router.reports.get()
        reports += 1
        while not router.hellos.empty():
            router.hellos.get_nowait()
            reports = 0


async def test_a_router_with_two_addresses_is_joined_at_one(monkeypatch):
    monkeypatch.setattr(membership_module, "REPORT_INTERVAL", 0.03)
    async with registry() as (router, address), member(address, address.replace("127.0.0.1", "localhost")) as worker:
        await settled(router)
        assert worker.num_joined == 1


async def test_a_router_s_other_address_is_joined_when_the_first_is_lost(monkeypatch):
    monkeypatch.setattr(membership_module, "REPORT_INTERVAL", 0.03)
    async with registry() as (router, address):
        name = Name(monkeypatch, address)
        async with member("dns:///routers.internal:7600") as worker:
            await router.hellos.get()
            async with TcpProxy(address) as proxy:
                name.addresses.add(proxy.address)
                await router.hellos.get()
                await settled(router)
            await settled(router)
            assert worker.num_joined == 1
