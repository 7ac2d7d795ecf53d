"""Tests Ray Serve's replicas: start, health and drain of their service."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from overfill.api.key_file import create
from overfill.errors import Unavailable
from overfill.process.open_files import SPARE_FILES
from overfill.rpc import certificates
from overfill.rpc.access import Role
from overfill.rpc.constants import MAX_CONNECTIONS
from overfill.rpc.server import RpcServer
from overfill.rpc.tls import TlsError
from overfill.stack.ray.policy import latest
from overfill.stack.spec import RouterSpec, StackSpec
from services.router.app import Router

replicas = pytest.importorskip("services.ray.replicas", reason="needs Ray")


async def test_a_router_without_workers_is_not_replaced_and_a_dead_one_is() -> None:
    server = RpcServer(condition=lambda: False)
    address = await server.start("127.0.0.1:0")
    server.set_ready(True)
    await replicas.check_alive(address, None)
    await server.stop()
    with pytest.raises(Unavailable):
        await replicas.check_alive(address, None)


async def test_a_router_on_ray_may_have_all_its_connections(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.getrlimit", lambda which: (1024, 20_000))
    monkeypatch.setattr("resource.setrlimit", lambda which, limits: wanted.append(limits))
    settings = {"max_connections": 5000}
    router = await replicas._listening_router(
        StackSpec(pair=str(tiny_pair), router=RouterSpec(ports=(0,), settings=settings))
    )
    router.drain()
    await router.run()
    assert wanted == [(5000 + MAX_CONNECTIONS + SPARE_FILES, 20_000)]


@pytest.mark.parametrize(("machine", "named"), [("127.0.0.1", True), ("127.0.0.2", False)])
async def test_a_replica_that_listens_on_every_interface_is_checked_at_its_machine_s_address(
    machine: str, named: bool, tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others reach it there too, so its certificate must name that address, unless all have one name."""
    certificates.make(tmp_path)
    files = certificates.role_files(tmp_path, Role.ROUTER)
    create(tmp_path / "keys.json", "a")
    settings = {"host": "0.0.0.0", "api_keys": tmp_path / "keys.json"}
    settings |= {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": files.ca}
    spec = StackSpec(pair=str(tiny_pair), router=RouterSpec(ports=(0,), settings=settings))
    monkeypatch.setattr(replicas, "get_node_ip_address", lambda: machine)
    replica = replicas.Replica()

    async def run(ready: Callable[[Router], None]) -> None:
        router = await replicas._listening_router(spec)
        ready(router)
        await router.run()

    if named:
        await replica.start(spec.router_config(), run)
        await replica.check_health()
        await replica.drain()
    else:
        with pytest.raises(TlsError, match=r"router\.crt cannot be used at 127\.0\.0\.2: IP address mis.*tls_name"):
            await replica.start(spec.router_config(), run)


async def test_a_router_whose_port_is_taken_says_so_once_and_starts_when_it_is_free(
    tiny_pair: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == replicas.logger.name]

    tries = 0

    class Counted(Router):
        async def start(self) -> str:
            nonlocal tries
            tries += 1
            return await super().start()

    monkeypatch.setattr("services.router.app.Router", Counted)
    monkeypatch.setattr(replicas, "_PORT_POLL", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        spec = StackSpec(pair=str(tiny_pair), router=RouterSpec(ports=(0,), http_ports=(port,)))
        starting = asyncio.create_task(replicas._listening_router(spec))
        while tries < 4:
            await asyncio.sleep(0.01)
    router = await starting
    router.drain()
    await router.run()
    (warning,) = said()
    assert f"127.0.0.1:{port}" in warning
    assert "retries for 40 s" in warning
    assert "--http off" in warning


async def test_the_policy_reads_each_revision_s_signals_of_a_router() -> None:
    sent = {"": {"arrivals": 1.0}, "r2": {"arrivals": 2.0, "arrivals.fast": 3.0}}
    cores = [
        SimpleNamespace(revision=name, signals=SimpleNamespace(read=lambda now, own=numbers: own))
        for name, numbers in sent.items()
    ]
    replica = SimpleNamespace(_service=SimpleNamespace(cores=cores))
    reported = await replicas.RouterReplica.record_autoscaling_stats(replica)
    series = {name: {"router": [SimpleNamespace(value=value)]} for name, value in reported.items()}
    assert {revision: latest(series, revision) for revision in sent} == {
        revision: {"router": numbers} for revision, numbers in sent.items()
    }
