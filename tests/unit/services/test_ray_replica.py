"""Tests Ray Serve's replicas: start, health and drain of their service."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from overfill.errors import Unavailable
from overfill.rpc.server import RpcServer
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
