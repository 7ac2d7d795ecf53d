"""The standard health service, ``grpc.health.v1.Health``: one readiness for the process and its services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Not ready until told. The empty service name stands for the process.

    (The servicer that comes with ``grpcio-health-checking`` forgets the other watchers when one leaves, and
    its watchers hold a stopping server up for the whole grace period.)
    """

    def __init__(self) -> None:
        self._services = {""}
        self._ready = False
        self._closed = False
        self._changed = asyncio.Event()

    def add(self, service: str) -> None:
        self._services.add(service)

    def set_ready(self, ready: bool) -> None:
        self._ready = ready
        self._announce()

    def close(self) -> None:
        """Not ready for good; every watcher is told and let go."""
        self._ready, self._closed = False, True
        self._announce()

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return self._response(request.service)

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        last = None
        while True:
            changed, closed = self._changed, self._closed
            response = self._response(request.service)
            if response != last:
                last = response
                yield response
            if closed:
                return
            await changed.wait()

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _response(self, service: str) -> Any:
        response = health_pb2.HealthCheckResponse
        if service not in self._services:
            return response(status=response.SERVICE_UNKNOWN)
        return response(status=response.SERVING if self._ready and not self._closed else response.NOT_SERVING)
