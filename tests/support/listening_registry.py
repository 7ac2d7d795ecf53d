"""A registry that only accepts workers, for tests that start workers without a router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from overfill.rpc.interceptors import Context
from overfill.rpc.server import RpcServer
from overfill.v1 import registry_pb2, registry_pb2_grpc


class ListeningRegistry(registry_pb2_grpc.RegistryServicer):
    """Accepts every worker that joins, and queues its ``Hello``."""

    def __init__(self) -> None:
        self._server = RpcServer()
        self._server.add(registry_pb2_grpc.add_RegistryServicer_to_server, self, "overfill.v1.Registry")
        self._joined: asyncio.Queue[registry_pb2.Hello] = asyncio.Queue()

    async def start(self) -> str:
        """Listens on a free loopback port. Returns the address for a worker's ``--routers``."""
        return await self._server.start("127.0.0.1:0")

    async def stop(self) -> None:
        await self._server.stop()

    async def next_worker(self, timeout: float) -> registry_pb2.Hello:
        """Waits for the next worker to join. Raises TimeoutError after ``timeout`` seconds."""
        return await asyncio.wait_for(self._joined.get(), timeout)

    async def Join(
        self, request_iterator: AsyncIterator[registry_pb2.JoinRequest], context: Context
    ) -> AsyncIterator[registry_pb2.JoinResponse]:
        async for request in request_iterator:
            if request.WhichOneof("message") == "hello":
                yield registry_pb2.JoinResponse(welcome=registry_pb2.Welcome(router_id="listening"))
                self._joined.put_nowait(request.hello)
