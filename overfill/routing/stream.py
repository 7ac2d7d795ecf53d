"""The stream between one attempt and its decode worker: the interface, and its implementation over gRPC."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import grpc.aio

from overfill.errors import OverfillError
from overfill.routing.worker import WorkerInfo
from overfill.rpc.calls import checked_response, checked_write
from overfill.rpc.channel import open_channel
from overfill.rpc.tls import Credentials
from overfill.telemetry import tracing
from overfill.v1 import decode_pb2, decode_pb2_grpc


class DecodeStream(Protocol):
    """One ``Decode.Generate`` call. Failures are raised as OverfillErrors."""

    async def send(self, message: decode_pb2.DecodeRequest) -> None:
        """Sends a message. Does nothing if the stream has ended; ``receive`` raises the reason."""

    async def receive(self) -> decode_pb2.DecodeResponse | None:
        """Returns the next message, or None when the worker has ended the stream without error."""

    def close(self) -> None:
        """Cancels the RPC unless it has ended, and releases the channel."""


class DecodeConnector(Protocol):
    """Opens streams to decode workers."""

    def open(self, worker: WorkerInfo, timeout: float | None) -> DecodeStream:
        """Starts ``Decode.Generate`` on ``worker``, with ``timeout`` seconds until the request's deadline."""


class GrpcConnector:
    """Keeps one channel to each joined worker, and to each worker that has left until its last stream ends."""

    def __init__(self, tls: Credentials | None = None) -> None:
        self._tls = tls
        self._connections: dict[tuple[str, int], _Connection] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def add(self, worker: WorkerInfo) -> None:
        """Opens a channel to ``worker``. A worker that joins again gets a new channel."""
        self.forget(worker)
        self._connections[worker.id, worker.incarnation] = _Connection(open_channel(worker.address, self._tls))

    def forget(self, worker: WorkerInfo) -> None:
        """Closes the channel to ``worker`` once no stream uses it."""
        connection = self._connections.pop((worker.id, worker.incarnation), None)
        if connection is not None:
            connection.forgotten = True
            self._close_idle(connection)

    def channel(self, worker: WorkerInfo) -> grpc.aio.Channel:
        """Returns the channel to a joined worker, for the worker's other services."""
        return self._connections[worker.id, worker.incarnation].channel

    def open(self, worker: WorkerInfo, timeout: float | None) -> DecodeStream:
        connection = self._connections.get((worker.id, worker.incarnation))
        if connection is None:  # the worker has just left
            connection = _Connection(open_channel(worker.address, self._tls), forgotten=True)
        connection.streams += 1
        return GrpcDecodeStream(connection, self, worker, timeout)

    async def close(self) -> None:
        """Closes all channels and cancels their streams."""
        for connection in self._connections.values():
            await connection.channel.close(None)
        self._connections.clear()
        await asyncio.gather(*self._closing)

    def stream_closed(self, connection: _Connection) -> None:
        connection.streams -= 1
        self._close_idle(connection)

    def _close_idle(self, connection: _Connection) -> None:
        if connection.forgotten and not connection.streams:
            task = asyncio.ensure_future(connection.channel.close(None))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


class GrpcDecodeStream:
    """Implements ``DecodeStream`` over gRPC."""

    def __init__(
        self, connection: _Connection, connector: GrpcConnector, worker: WorkerInfo, timeout: float | None
    ) -> None:
        self._connection = connection
        self._connector = connector
        self._peer = f"decode worker {worker.id}"
        self._call: Any = decode_pb2_grpc.DecodeStub(connection.channel).Generate(
            timeout=timeout, metadata=tracing.outgoing()
        )
        self._closed = False

    async def send(self, message: decode_pb2.DecodeRequest) -> None:
        with suppress(OverfillError):
            await checked_write(self._call.write(message), self._peer)

    async def receive(self) -> decode_pb2.DecodeResponse | None:
        message = await checked_response(self._call.read(), self._peer)
        return None if message is grpc.aio.EOF else message  # type: ignore[attr-defined]

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._call.cancel()
            self._connector.stream_closed(self._connection)


@dataclass(slots=True)
class _Connection:
    channel: grpc.aio.Channel
    streams: int = 0
    forgotten: bool = False
