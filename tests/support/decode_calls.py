"""The router's end of ``Decode.Serve`` with a single sequence, for tests of decode workers."""

from __future__ import annotations

from collections import deque
from typing import Any

import grpc.aio

from overfill.errors import OverfillError
from overfill.rpc.status import from_bytes
from overfill.v1 import decode_pb2, decode_pb2_grpc


class DecodeCall:
    """One stream with one sequence."""

    def __init__(self, stub: decode_pb2_grpc.DecodeStub) -> None:
        self.call: Any = stub.Serve()  # type: ignore[call-arg]  # the stub of asyncio takes the messages by write()
        self._unread: deque[decode_pb2.SequenceUpdate] = deque()

    async def send(self, **command: Any) -> None:
        await self.call.write(decode_pb2.RouterMessage(commands=[decode_pb2.SequenceCommand(sequence=1, **command)]))

    async def read(self) -> decode_pb2.SequenceUpdate:
        """Returns the sequence's next update."""
        while not self._unread:
            message = await self.call.read()
            assert message is not grpc.aio.EOF, "the stream has ended"  # type: ignore[attr-defined]
            self._unread.extend(message.updates)
        return self._unread.popleft()

    async def failure(self) -> OverfillError:
        """Reads to the end of the sequence and returns its error."""
        while not (update := await self.read()).HasField("failed"):
            assert not update.HasField("done")
        return from_bytes(update.failed.status)

    def cancel(self) -> None:
        """Ends the whole stream, as a router that dies does."""
        self.call.cancel()
