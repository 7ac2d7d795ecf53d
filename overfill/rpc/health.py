"""The standard health service, ``grpc.health.v1.Health``: one readiness for the process and its services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

LOOK_SECONDS = 0.5
"""Seconds between evaluations of the condition for each `Watch` call."""


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Not ready until told. The empty service name stands for the process.

    Args:
        condition: evaluated at every check; the process is ready only while it holds. None: it always holds.

    (The servicer that comes with ``grpcio-health-checking`` forgets the other watchers when one leaves, and
    its watchers hold a stopping server up for the whole grace period.)
    """

    def __init__(self, condition: Callable[[], bool] | None = None) -> None:
        self._services = {""}
        self._condition = condition
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
            # A condition may change without an event: a worker that falls silent says nothing.
            with suppress(TimeoutError):
                async with asyncio.timeout(None if self._condition is None else LOOK_SECONDS):
                    await changed.wait()

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _response(self, service: str) -> Any:
        response = health_pb2.HealthCheckResponse
        if service not in self._services:
            return response(status=response.SERVICE_UNKNOWN)
        ready = self._ready and not self._closed and (self._condition is None or self._condition())
        return response(status=response.SERVING if ready else response.NOT_SERVING)
