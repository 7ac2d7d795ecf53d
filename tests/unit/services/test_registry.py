"""Tests which workers a router refuses to let join, and when it sends its demand to a worker."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from cores import revisions_of
from jobs import make_job

from overfill.errors import Incompatible, InvalidRequest, OverfillError, Unavailable
from overfill.kv.journal import MAX_KEYS
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.routing.async_dispatcher import AsyncDispatcher
from overfill.routing.dispatcher import Dispatcher
from overfill.routing.pool import Roster
from overfill.routing.pool_invariant import check_prefixes
from overfill.routing.tier import Tier
from overfill.routing.worker import DECODE, DEFAULT_IMPORT_COST, PREFILL, WorkerInfo
from overfill.rpc import certificates
from overfill.rpc.access import Role
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.tls import TlsError
from overfill.settings.config import RouterConfig
from overfill.v1 import admin_pb2, common_pb2, registry_pb2
from services.router import registry as registry_module
from services.router.app import Router
from services.router.registry import RegistryServicer

TIER = {"tier": "default"}  # of every decode worker
KV = KvSpec(num_layers=4, num_kv_heads=2, head_dim=16, dtype="float32", rope=RopeSpec())
HELLO = registry_pb2.Hello(worker_id="d", address="h:1", stages=[DECODE], kv=KV.to_proto(), wire_version=WIRE_VERSION)


def with_field(number):
    """HELLO with a string in a field that this version does not know."""
    key = number << 3 | 2
    return registry_pb2.Hello.FromString(HELLO.SerializeToString() + bytes([key & 127 | 128, key >> 7, 1, 0x78]))


def test_a_field_that_a_router_must_know_is_refused_and_any_other_ignored():
    registry_module.check_fields(HELLO)
    registry_module.check_fields(with_field(31))
    registry_module.check_fields(with_field(64))
    for number in (32, 63):
        with pytest.raises(Incompatible, match=rf"fields \[{number}\] of Hello.*upgrade the router first"):
            registry_module.check_fields(with_field(number))


async def refusal(hello):
    """Joins with ``hello`` and returns the error with which the router refuses it."""
    roster = Roster()
    servicer = RegistryServicer("r", revisions_of(roster), Connector())
    stream = Stream()
    stream.said.put_nowait(registry_pb2.JoinRequest(hello=hello))
    stream.said.put_nowait(None)
    with pytest.raises(OverfillError) as caught:
        await servicer.Join(stream.messages(), stream)
    assert stream.heard.empty()
    return caught.value


def changed(**fields):
    hello = registry_pb2.Hello()
    hello.CopyFrom(HELLO)
    for name in fields:
        hello.ClearField(name)
    hello.MergeFrom(registry_pb2.Hello(**fields))
    return hello


# A worker that is refused as incompatible ends and says why; after another error it would try again, without end.
@pytest.mark.parametrize(
    ("fields", "refused", "says"),
    [
        (
            {"tier": "small"},
            ("hello.tier",),
            "worker d belongs to the tier 'small'; this router has the tiers 'default'",
        ),
        (
            {"wire_version": WIRE_VERSION - 1},
            ("wire_version",),
            f"wire version {WIRE_VERSION - 1} (software unknown); this router speaks {WIRE_VERSION}",
        ),
    ],
    ids=["tier", "wire"],
)
async def test_a_worker_that_cannot_join_is_refused_as_incompatible(fields, refused, says):
    error = await refusal(changed(**fields))
    assert isinstance(error, Incompatible)
    assert error.fields == refused
    assert says in str(error)


async def test_a_worker_whose_hello_is_invalid_is_refused():
    error = await refusal(changed(stages=[DECODE, DECODE]))
    assert isinstance(error, InvalidRequest)
    assert error.field == "hello.stages"


class CountingDispatcher(AsyncDispatcher):
    looks = 0

    def queued(self, stage):
        self.looks += 1
        return super().queued(stage)


class Connector:
    def add(self, info):
        pass

    def forget(self, info):
        pass


class Stream:
    """A worker's Join stream, which the test controls."""

    def __init__(self):
        self.said = asyncio.Queue()
        self.heard = asyncio.Queue()

    async def write(self, response):
        self.heard.put_nowait(response)

    async def messages(self):
        while (message := await self.said.get()) is not None:
            yield message

    def report(self, routers):
        self.said.put_nowait(
            registry_pb2.JoinRequest(report=registry_pb2.Report(credits=4, ready=True, routers=routers))
        )


@asynccontextmanager
async def joined():
    roster = Roster()
    dispatcher = CountingDispatcher(Dispatcher(roster))
    stream = Stream()
    servicer = RegistryServicer("r", revisions_of(roster, dispatcher=dispatcher), Connector())
    stream.said.put_nowait(registry_pb2.JoinRequest(hello=HELLO))
    joining = asyncio.create_task(servicer.Join(stream.messages(), stream))
    assert (await stream.heard.get()).HasField("welcome")
    yield dispatcher, stream
    stream.said.put_nowait(None)
    await joining


async def settled():
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def no_gap(monkeypatch):
    monkeypatch.setattr(registry_module, "DEMAND_GAP", 0.0)


async def test_a_worker_of_one_router_is_sent_no_demand_and_costs_nothing():
    async with joined() as (dispatcher, stream):
        stream.report(routers=1)
        await settled()
        dispatcher.submit(make_job("a", 10, 10), lambda _: None)
        await settled()
        assert stream.heard.empty()
        assert dispatcher.looks == 0


async def test_a_shared_worker_is_sent_changes_of_demand_and_costs_nothing_between_them():
    async with joined() as (dispatcher, stream):
        stream.report(routers=2)
        assert (await stream.heard.get()).demand == registry_pb2.Demand()
        job = make_job("a", 10, 10)
        placed = []
        dispatcher.submit(job, placed.append)
        assert (await stream.heard.get()).demand == registry_pb2.Demand(queued=1)
        await settled()
        looks = dispatcher.looks
        await settled()
        assert dispatcher.looks == looks
        dispatcher.finish(job)
        assert not placed
        assert (await stream.heard.get()).demand == registry_pb2.Demand()


async def test_a_worker_that_vanishes_before_it_is_welcomed_leaves_no_trace():
    class Gone(Stream):
        async def write(self, message):
            raise asyncio.CancelledError

    roster, stream = Roster(), Gone()
    servicer = RegistryServicer("r", revisions_of(roster), Connector())
    stream.said.put_nowait(registry_pb2.JoinRequest(hello=changed(metrics_address="h:9")))
    with pytest.raises(asyncio.CancelledError):
        await servicer.Join(stream.messages(), stream)
    assert roster.workers() == servicer.targets() == []


async def test_a_worker_to_which_no_channel_opens_is_not_waited_for():
    class Failing(Connector):
        def add(self, info):
            raise TlsError("the key does not belong to the certificate")

    roster, stream, placed = Roster(tiers=[Tier("full"), Tier("fast")]), Stream(), []
    roster.join_all(WorkerInfo.from_hello(changed(worker_id="other", tier="fast")))
    dispatcher = AsyncDispatcher(Dispatcher(roster))
    servicer = RegistryServicer("r", revisions_of(roster, dispatcher=dispatcher), Failing())
    job = make_job("a", 10, 10, tier="full", fallback="fast")
    stream.said.put_nowait(registry_pb2.JoinRequest(hello=changed(tier="full")))
    with pytest.raises(TlsError):
        await servicer.Join(stream.messages(), stream)
    dispatcher.submit(job, placed.append)
    assert job.tier == "fast", "its own tier has no worker that starts"
    assert [worker.id for worker in roster.workers()] == ["other"]
    assert servicer.targets() == []


async def test_a_worker_joins_while_a_router_s_certificate_is_being_replaced(tiny_pair, tmp_path):
    certificates.make(tmp_path)
    files = certificates.role_files(tmp_path, Role.ROUTER)
    tls = {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": files.ca, "tls_name": "overfill"}
    router = Router(RouterConfig(pair=str(tiny_pair), http="off", metrics_port="off", **tls))
    files.cert.write_bytes(certificates.role_files(tmp_path, Role.WORKER).cert.read_bytes())  # its key follows later
    (info,) = WorkerInfo.from_hello(HELLO)
    router._connector.add(info)
    await router._connector.close()


async def test_scrape_targets_name_tier_and_revision():
    roster, stream = Roster(tiers=[Tier("full"), Tier("fast")]), Stream()
    servicer = RegistryServicer("r", revisions_of(roster, names=("r2",)), Connector())
    hello = of_revision("r2", tier="fast", metrics_address="h:9")
    stream.said.put_nowait(registry_pb2.JoinRequest(hello=hello))
    joining = asyncio.create_task(servicer.Join(stream.messages(), stream))
    await stream.heard.get()
    labels = {"stage": "decode", "worker": "d", "tier": "fast", "revision": "r2"}
    assert servicer.targets() == [{"targets": ["h:9"], "labels": labels}]
    stream.said.put_nowait(None)
    await joining
    assert servicer.targets() == []


async def test_a_worker_with_both_stages_is_a_member_of_two_pools_and_leaves_both():
    roster, stream, lost = Roster(), Stream(), []
    servicer = RegistryServicer("r", revisions_of(roster), Connector(), lost.append)
    hello = changed(stages=[PREFILL, DECODE], metrics_address="h:9")
    stream.said.put_nowait(registry_pb2.JoinRequest(hello=hello))
    joining = asyncio.create_task(servicer.Join(stream.messages(), stream))
    await stream.heard.get()
    report = registry_pb2.Report(credits=4, ready=True)
    report.load.kv_blocks_total, report.load.block_size = 20, 16
    report.prefill_load.kv_blocks_total, report.prefill_load.block_size = 30, 16
    report.prefix.added.append(7)
    report.disk.added.append(8)
    report.costs.compute_ns, report.costs.peer_ns = 100, 30
    stream.said.put_nowait(registry_pb2.JoinRequest(report=report))
    await settled()
    prefill, decode = roster.find_all("d")
    assert [(w.info.stage, w.info.colocated, w.capacity_tokens) for w in (prefill, decode)] == [
        (PREFILL, True, 480),
        (DECODE, True, 320),
    ]
    assert (prefill.prefix_keys, decode.prefix_keys) == ({7}, set()), "only prefill reads the prefix cache"
    assert (prefill.disk_keys, decode.disk_keys) == ({8}, set())
    assert (prefill.peer_cost, decode.peer_cost) == (0.3, DEFAULT_IMPORT_COST)
    assert prefill.process == decode.process
    assert servicer.targets() == [{"targets": ["h:9"], "labels": {"stage": "prefill+decode", "worker": "d"} | TIER}]
    stream.said.put_nowait(None)
    await joining
    assert roster.workers() == servicer.targets() == []
    assert [info.stage for info in lost] == [PREFILL, DECODE]


@pytest.mark.parametrize(
    ("report", "field"),
    [
        (registry_pb2.Report(prefix=registry_pb2.PrefixDelta(added=range(MAX_KEYS), removed=[1])), "report.prefix"),
        (registry_pb2.Report(disk=registry_pb2.PrefixDelta(added=range(MAX_KEYS + 1))), "report.disk"),
        (registry_pb2.Report(costs=registry_pb2.KvCosts(peer_ns=61 * 10**9)), "report.costs.peer_ns"),
    ],
)
async def test_a_worker_that_reports_what_it_may_not_leaves_with_its_keys(report, field):
    roster, stream = Roster(), Stream()
    servicer = RegistryServicer("r", revisions_of(roster), Connector())
    good = registry_pb2.Report(prefix=registry_pb2.PrefixDelta(added=range(MAX_KEYS)))
    for message in (
        registry_pb2.JoinRequest(hello=changed(stages=[PREFILL])),
        registry_pb2.JoinRequest(report=good),
        registry_pb2.JoinRequest(report=report),
    ):
        stream.said.put_nowait(message)
    with pytest.raises(InvalidRequest) as caught:
        await servicer.Join(stream.messages(), stream)
    assert caught.value.field == field
    assert not roster.workers()
    check_prefixes(roster.prefixes, ())


async def test_a_worker_that_returns_with_other_stages_leaves_its_earlier_pools():
    """Its earlier stream may still be open: a host that dies says nothing."""
    roster = Roster()
    roster.join_all(WorkerInfo.from_hello(changed(stages=[PREFILL, DECODE], incarnation=1)))
    (worker,) = roster.join_all(WorkerInfo.from_hello(changed(stages=[DECODE], incarnation=2)))
    assert roster.workers() == [worker]


def of_revision(revision, **fields):
    return changed(model=common_pb2.ModelIdentity(revision=revision), **fields)


@asynccontextmanager
async def joining(servicer, hello):
    """Yields the stream of a worker that has been welcomed."""
    stream = Stream()
    stream.said.put_nowait(registry_pb2.JoinRequest(hello=hello))
    task = asyncio.create_task(servicer.Join(stream.messages(), stream))
    assert (await stream.heard.get()).HasField("welcome")
    yield stream
    stream.said.put_nowait(None)
    await task


async def test_workers_join_the_pools_of_their_revision_and_others_are_told_to_come_again():
    old, new = Roster(), Roster()
    servicer = RegistryServicer("r", revisions_of(old, new), Connector())
    async with joining(servicer, HELLO), joining(servicer, of_revision("r2", worker_id="e")):
        assert [[worker.id for worker in roster.workers()] for roster in (old, new)] == [["d"], ["e"]]
    assert old.workers() == new.workers() == []
    stream = Stream()
    stream.said.put_nowait(registry_pb2.JoinRequest(hello=of_revision("r3")))
    with pytest.raises(Unavailable, match="revision 'r3'; this router serves '' and 'r2'"):
        await servicer.Join(stream.messages(), stream)


async def test_a_worker_that_restarts_with_another_revision_leaves_the_pools_of_the_old_one():
    old, new, lost = Roster(), Roster(), []
    servicer = RegistryServicer("r", revisions_of(old, new), Connector(), lost.append)
    async with joining(servicer, HELLO) as first:
        async with joining(servicer, of_revision("r2", incarnation=7)):
            assert (old.workers(), [worker.id for worker in new.workers()]) == ([], ["d"])
            first.report(routers=1)  # its host died, and says this late
            await settled()
            assert old.workers() == []
        assert new.workers() == []
    assert len(lost) == 1


async def test_a_live_worker_of_another_revision_keeps_its_id():
    old, new = Roster(), Roster()
    servicer = RegistryServicer("r", revisions_of(old, new), Connector())
    async with joining(servicer, HELLO) as first:
        first.report(routers=1)
        await settled()
        stream = Stream()
        stream.said.put_nowait(registry_pb2.JoinRequest(hello=of_revision("r2", incarnation=7, address="h:2")))
        with pytest.raises(Incompatible, match="a live worker at h:1 has the id 'd'"):
            await servicer.Join(stream.messages(), stream)
        assert [worker.id for worker in old.workers()] == ["d"]


async def test_a_change_of_shares_goes_to_all_workers_and_a_newer_one_is_taken_from_a_report():
    revisions = revisions_of(Roster(), Roster())
    servicer = RegistryServicer("r", revisions, Connector())
    async with joining(servicer, HELLO) as one, joining(servicer, of_revision("r2", worker_id="e")) as other:
        await settled()
        assert one.heard.empty(), "the settings' share is no news"
        revisions.change(admin_pb2.ChangeRolloutRequest(set=admin_pb2.SetShare(revision="r2", percent=5)))
        told = [(await stream.heard.get()).rollout for stream in (one, other)]
        assert told == [revisions.state.to_proto()] * 2
        newer = registry_pb2.Rollout()
        newer.CopyFrom(told[0])
        newer.generation, newer.to_percent = 9, 80.0
        other.said.put_nowait(registry_pb2.JoinRequest(report=registry_pb2.Report(credits=1, rollout=newer)))
        assert (await one.heard.get()).rollout == newer
        async with joining(servicer, changed(worker_id="f")) as late:
            assert (await late.heard.get()).rollout == newer


async def test_a_worker_that_reports_ever_newer_states_wakes_the_others_rarely(monkeypatch):
    monkeypatch.setattr(registry_module, "LEARN_GAP", 3600.0)
    revisions = revisions_of(Roster(), Roster())
    servicer = RegistryServicer("r", revisions, Connector())
    async with joining(servicer, HELLO) as one, joining(servicer, of_revision("r2", worker_id="e")) as other:
        for stream, generations in ((other, range(1, 50)), (one, [60])):
            for generation in generations:
                rollout = registry_pb2.Rollout(generation=generation, revision="r2")
                stream.said.put_nowait(registry_pb2.JoinRequest(report=registry_pb2.Report(credits=1, rollout=rollout)))
                await settled()
            assert revisions.state.generation == generations[0], "another worker's is taken"


async def test_a_router_with_one_revision_neither_sends_nor_reads_a_rollout():
    revisions = revisions_of(Roster())
    servicer = RegistryServicer("r", revisions, Connector())
    async with joining(servicer, HELLO) as stream:
        rollout = registry_pb2.Rollout(generation=1, to_percent=50.0)
        stream.said.put_nowait(registry_pb2.JoinRequest(report=registry_pb2.Report(credits=1, rollout=rollout)))
        await settled()
        assert stream.heard.empty()
        assert revisions.state.generation == 0
