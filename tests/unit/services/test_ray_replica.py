"""What Ray asks of a replica's service."""

from __future__ import annotations

import pytest

from overfill.errors import Unavailable
from overfill.rpc.server import RpcServer

replicas = pytest.importorskip("services.ray.replicas", reason="needs Ray")


async def test_a_router_without_workers_is_not_replaced_and_a_dead_one_is() -> None:
    server = RpcServer(condition=lambda: False)
    address = await server.start("127.0.0.1:0")
    server.set_ready(True)
    await replicas.check_alive(address, None)
    await server.stop()
    with pytest.raises(Unavailable):
        await replicas.check_alive(address, None)
