"""The standard service ``grpc.health.v1.Health``; all services of the process share one status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

LOOK_SECONDS = 0.5
"""Seconds between evaluations of the condition in each ``Watch`` call."""


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Health servicer that reports NOT_SERVING until ``set_ready(True)``. The empty service name means the process.

    Args:
        condition: evaluated at every check; the process is ready only while it returns True. None means always ready.

    It replaces the servicer of ``grpcio-health-checking``. That one drops all watchers of a service when one leaves,
    and its open ``Watch`` calls delay a stopping server for the whole grace period.
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
        """Reports NOT_SERVING permanently: sends it to every ``Watch`` call and ends these calls."""
        self._ready, self._closed = False, True
        self._announce()

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"this server has no service {request.service[:80]!r}")
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
            # Re-evaluate the condition from time to time: a worker that stops reporting causes no event.
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
