"""One attempt's conversation with a decode worker: the interface, and its gRPC form."""

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
    """``Decode.Generate`` as the relay uses it. Failures are OverfillErrors."""

    async def send(self, message: decode_pb2.DecodeRequest) -> None:
        """Sends; into a stream that has ended, in vain: ``receive`` tells how it ended."""

    async def receive(self) -> decode_pb2.DecodeResponse | None:
        """The next message; None when the worker ended the stream without error."""

    def close(self) -> None:
        """Cancels the RPC, unless it has ended, and frees what the stream holds."""


class DecodeConnector(Protocol):
    """Opens streams."""

    def open(self, worker: WorkerInfo, timeout: float | None) -> DecodeStream:
        """Starts ``Decode.Generate`` on ``worker``; ``timeout``: seconds until the request's deadline."""


class GrpcConnector:
    """Keeps one channel to every worker that is a member, and to every other one while something runs there."""

    def __init__(self, tls: Credentials | None = None) -> None:
        self._tls = tls
        self._connections: dict[tuple[str, int], _Connection] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def add(self, worker: WorkerInfo) -> None:
        """Opens a channel; a worker that joins again gets a new one."""
        self.forget(worker)
        self._connections[worker.id, worker.incarnation] = _Connection(open_channel(worker.address, self._tls))

    def forget(self, worker: WorkerInfo) -> None:
        """Closes the channel once nothing runs on it."""
        connection = self._connections.pop((worker.id, worker.incarnation), None)
        if connection is not None:
            connection.forgotten = True
            self._close_idle(connection)

    def channel(self, worker: WorkerInfo) -> grpc.aio.Channel:
        """The channel to a member, for its other services."""
        return self._connections[worker.id, worker.incarnation].channel

    def open(self, worker: WorkerInfo, timeout: float | None) -> DecodeStream:
        connection = self._connections.get((worker.id, worker.incarnation))
        if connection is None:  # it left a moment ago
            connection = _Connection(open_channel(worker.address, self._tls), forgotten=True)
        connection.streams += 1
        return GrpcDecodeStream(connection, self, worker, timeout)

    async def close(self) -> None:
        """Closes every channel; what still runs on one is cancelled."""
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
    """A ``DecodeStream`` over gRPC."""

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
