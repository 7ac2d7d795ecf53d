"""The router's end of ``Decode.Serve``: one stream per decode worker, shared by all of the router's sequences there.

Updates reach their sequence by a callback, in the task that reads the stream. So no token waits for a task of its own,
and a slow client never holds up the stream.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any, Protocol

import grpc.aio

from overfill.errors import InvalidRequest, OverfillError, Unavailable
from overfill.routing.worker import WorkerInfo
from overfill.rpc.access import Role
from overfill.rpc.calls import checked_write, responses
from overfill.rpc.channel import open_channel
from overfill.rpc.constants import LAST_UPDATES, MAX_MESSAGE_BYTES
from overfill.rpc.status import from_bytes
from overfill.rpc.tls import Credentials
from overfill.v1 import decode_pb2, decode_pb2_grpc

logger = logging.getLogger(__name__)

Receive = Callable[["decode_pb2.SequenceUpdate | OverfillError"], None]
"""Receives a sequence's updates in order, or the error that ended the sequence or its stream. It must not raise."""

_MESSAGE_MARGIN = 1024
"""Commands stay this many bytes below gRPC's message limit. A message above the limit ends the whole stream."""

_COMMAND_OVERHEAD = 8
"""Maximum bytes that a command takes in its message besides its own: a tag and its length."""


_MAX_AGE = 60.0
"""Seconds after which new sequences get a new stream, so that renewed certificates reach a busy worker too."""


class DecodeStream(Protocol):
    """A stream to a decode worker. Its sequences have numbers."""

    def send(self, number: int, command: decode_pb2.SequenceCommand) -> None:
        """Queues a command. The worker ignores one about a sequence that has ended.

        Raises:
            InvalidRequest: the command is too large for one message.
        """

    def close(self, number: int) -> None:
        """Cancels the sequence on the worker unless it has ended. Its callback is not called any more."""


class DecodeConnector(Protocol):
    """Opens sequences on decode workers."""

    def open(self, worker: WorkerInfo, receive: Receive) -> tuple[DecodeStream, int]:
        """Opens a sequence on ``worker``, whose updates ``receive`` gets. Returns its stream and its number there."""


class GrpcConnector:
    """Keeps one channel to each joined worker, and to each worker that has left until its last sequence ends."""

    def __init__(self, tls: Credentials | None = None) -> None:
        self._tls = tls
        self._connections: dict[tuple[str, int], _Connection] = {}
        self._retiring: dict[_Connection, asyncio.Task[None]] = {}

    def add(self, worker: WorkerInfo) -> None:
        """Opens a channel to ``worker``. A worker that joins again gets a new channel."""
        self.forget(worker)
        self._connections[worker.id, worker.incarnation] = _Connection(worker, self._tls)

    def forget(self, worker: WorkerInfo) -> None:
        """Closes the channel to ``worker`` once no sequence uses it."""
        connection = self._connections.pop((worker.id, worker.incarnation), None)
        if connection is not None:
            self._retire(connection)

    def channel(self, worker: WorkerInfo) -> grpc.aio.Channel:
        """Returns the channel to a joined worker, for the worker's other services."""
        return self._connections[worker.id, worker.incarnation].channel

    def open(self, worker: WorkerInfo, receive: Receive) -> tuple[DecodeStream, int]:
        connection = self._connections.get((worker.id, worker.incarnation))
        if connection is not None:
            return connection.open(receive)
        connection = _Connection(worker, self._tls)  # the worker has just left
        sequence = connection.open(receive)
        self._retire(connection)
        return sequence

    async def close(self) -> None:
        """Closes all channels and ends their streams."""
        retiring = list(self._retiring.values())
        for connection in [*self._connections.values(), *self._retiring]:
            await connection.close()
        self._connections.clear()
        await asyncio.gather(*retiring)

    def _retire(self, connection: _Connection) -> None:
        task = self._retiring[connection] = asyncio.ensure_future(connection.retire())
        task.add_done_callback(lambda _: self._retiring.pop(connection))


class _Connection:
    """A channel to one worker, with its streams. A stream that breaks, or is old, is followed by another one."""

    def __init__(self, worker: WorkerInfo, tls: Credentials | None) -> None:
        self.channel = open_channel(worker.address, tls, role=Role.WORKER)
        self._peer = f"decode worker {worker.id}"
        self._streams: list[_ServeStream] = []  # only the last one takes sequences

    def open(self, receive: Receive) -> tuple[DecodeStream, int]:
        if not self._streams or self._streams[-1].ended or self._streams[-1].age > _MAX_AGE:
            self._streams = [stream for stream in self._streams if not stream.ended]
            for stream in self._streams:
                stream.retire()
            self._streams.append(_ServeStream(self._peer, self.channel))
        return self._streams[-1], self._streams[-1].open(receive)

    async def retire(self) -> None:
        """Closes the channel once its last sequence has ended."""
        for stream in self._streams:
            stream.retire()
            await stream.wait_ended()
        await self.close()

    async def close(self) -> None:
        for stream in self._streams:
            stream.cancel()
        await self.channel.close(None)


class _ServeStream:
    """One call of ``Decode.Serve``: implements ``DecodeStream``.

    Attributes:
        ended: True once the call has ended; it takes no more sequences.
    """

    def __init__(self, peer: str, channel: grpc.aio.Channel) -> None:
        self.ended = False
        self._peer = peer
        self._call: Any = decode_pb2_grpc.DecodeStub(channel).Serve()
        self._numbers = itertools.count(1)
        self._receivers: dict[int, Receive] = {}
        self._commands: deque[decode_pb2.SequenceCommand] = deque()
        self._queued = asyncio.Event()
        self._retired = False
        self._began = asyncio.get_running_loop().time()
        # An empty context: the tasks belong to all requests, not to the one that opened the stream.
        self._reading = asyncio.create_task(self._read(), name=f"read {peer}", context=Context())
        self._writing = asyncio.create_task(self._write(), name=f"write {peer}", context=Context())

    @property
    def age(self) -> float:
        """Seconds since the call began."""
        return asyncio.get_running_loop().time() - self._began

    def retire(self) -> None:
        """Ends the call once its last sequence has ended. It takes no more sequences."""
        self._retired = True
        self._end_retired()

    async def wait_ended(self) -> None:
        """Returns once the call has ended."""
        await asyncio.wait([self._reading])

    def open(self, receive: Receive) -> int:
        """Returns the number of a new sequence whose updates ``receive`` gets."""
        number = next(self._numbers)
        self._receivers[number] = receive
        return number

    def send(self, number: int, command: decode_pb2.SequenceCommand) -> None:
        size = command.ByteSize()
        if size > MAX_MESSAGE_BYTES - _MESSAGE_MARGIN:
            raise InvalidRequest(
                "", f"the request takes {size} bytes between router and worker; the maximum is {MAX_MESSAGE_BYTES}"
            )
        command.sequence = number
        self._commands.append(command)
        self._queued.set()

    def close(self, number: int) -> None:
        if self._receivers.pop(number, None) is None:
            return
        unsent = [command for command in self._commands if command.sequence == number]
        if unsent:  # only while the worker reads slowly
            self._commands = deque(command for command in self._commands if command.sequence != number)
        if not any(command.HasField("start") for command in unsent):  # otherwise the worker does not know the sequence
            self.send(number, decode_pb2.SequenceCommand(cancel=decode_pb2.CancelDecode()))
        self._end_retired()

    def cancel(self) -> None:
        self._call.cancel()

    def _end_retired(self) -> None:
        if self._retired and not self._receivers:
            self._call.cancel()

    async def _write(self) -> None:
        try:
            while True:
                while not self._commands:
                    self._queued.clear()
                    await self._queued.wait()
                await checked_write(self._call.write(self._take()), self._peer)
        except OverfillError:
            pass  # the reader raises the reason
        except Exception:
            logger.exception("writing to %s failed", self._peer)
            self._call.cancel()

    def _take(self) -> decode_pb2.RouterMessage:
        """Removes the commands that are queued and fit a message, at least one, and returns the message."""
        message, size = decode_pb2.RouterMessage(), 0
        while self._commands:
            size += self._commands[0].ByteSize() + _COMMAND_OVERHEAD
            if message.commands and size > MAX_MESSAGE_BYTES:
                break
            message.commands.append(self._commands.popleft())
        return message

    async def _read(self) -> None:
        error: OverfillError = Unavailable(f"{self._peer} ended the stream before the answer")
        try:
            async for message in responses(self._call, self._peer):
                for update in message.updates:
                    self._deliver(update)
        except OverfillError as failure:
            # An error of the stream, a refused caller included, says nothing about a single request: each may continue
            # on another worker.
            error = failure if isinstance(failure, Unavailable) else Unavailable(f"{self._peer}: {failure}")
        finally:
            self.ended = True
            self._writing.cancel()
            self._call.cancel()
            receivers, self._receivers = self._receivers, {}
            for receive in receivers.values():
                _hand_over(receive, type(error)(str(error)))  # one error each, because raising changes it

    def _deliver(self, update: decode_pb2.SequenceUpdate) -> None:
        receive = self._receivers.get(update.sequence)
        if receive is None:
            return  # cancelled meanwhile
        kind = update.WhichOneof("message")
        if kind in LAST_UPDATES:
            del self._receivers[update.sequence]
        if kind == "failed":
            error = from_bytes(update.failed.status, self._peer)
            error.trace_id = update.failed.trace_id
            _hand_over(receive, error)
        else:
            _hand_over(receive, update)
        self._end_retired()


def _hand_over(receive: Receive, update: decode_pb2.SequenceUpdate | OverfillError) -> None:
    try:
        receive(update)
    except Exception:  # a defect of one receiver must not end the stream of all
        logger.exception("a sequence could not take an update")
