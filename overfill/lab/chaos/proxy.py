"""A TCP proxy on loopback that limits bandwidth, delays or loses data, closes connections, or partitions the network.

It forwards bytes, so a partition stops gRPC's keepalive pings too. ``tests/support/message_proxy.py`` works on gRPC
messages instead.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

_PIECE_BYTES = 16 * 1024  # maximum bytes forwarded at a time
_MAX_PIECES = 64  # maximum pieces in flight per direction
_RETRANSMISSION = 0.2  # seconds until Linux retransmits; doubles with every further loss


class TcpProxy:
    """Listens on a loopback port and forwards to ``target``, HOST:PORT.

    Args:
        bytes_per_second: Bandwidth of each connection in each direction. None means no limit.

    Attributes:
        rate: Current bandwidth, at first ``bytes_per_second``. This and the next two may be changed at any time.
        delay: Maximum delay in seconds. Each piece of up to 16 KiB gets a random delay; the order is kept.
        loss: Probability that a piece is lost. As with TCP, the piece and all later ones wait for its retransmission.
    """

    def __init__(self, target: str, bytes_per_second: float | None = None, seed: int = 0) -> None:
        self.forward_to(target)
        self.rate = bytes_per_second
        self.delay = self.loss = 0.0
        self._rng = random.Random(seed)
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._partitions = 0
        self._open = asyncio.Event()
        self._open.set()
        self.address = ""

    async def __aenter__(self) -> TcpProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def forward_to(self, target: str) -> None:
        """Forwards new connections to ``target``. Open connections stay where they are."""
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))

    def partition(self) -> None:
        """Stops all traffic in both directions, until ``heal`` is called as often.

        Connections stay open; new ones are accepted but not forwarded.
        """
        self._partitions += 1
        self._open.clear()

    def heal(self) -> None:
        """Ends a partition. After the last one, data held back is forwarded first."""
        self._partitions -= 1
        if not self._partitions:
            self._open.set()

    def cut(self) -> None:
        """Closes every connection. New ones are forwarded as usual."""
        for task in self._connections:
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        upstream: asyncio.StreamWriter | None = None
        try:
            await self._open.wait()
            from_target, upstream = await asyncio.open_connection(*self._target)
            await asyncio.gather(self._forward(reader, upstream), self._forward(from_target, writer))
        except (OSError, asyncio.CancelledError):
            pass  # one end closed, or the proxy is closing: close both ends
        finally:
            self._connections.discard(task)
            for end in (writer, upstream):
                if end is not None:
                    end.close()
                    with suppress(OSError, asyncio.CancelledError):
                        await end.wait_closed()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forwards pieces in order, each when it is due, until either end closes."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MAX_PIECES)
        reading = asyncio.ensure_future(self._read(reader, queue))
        loop = asyncio.get_running_loop()
        free_at = loop.time()
        try:
            while True:
                due, piece = await queue.get()
                if not piece:
                    break
                await self._open.wait()
                if (wait := max(due, free_at) - loop.time()) > 0:
                    await asyncio.sleep(wait)
                if self.rate is not None:
                    free_at = max(free_at, loop.time()) + len(piece) / self.rate
                writer.write(piece)
                await writer.drain()
        finally:
            reading.cancel()
        await self._open.wait()
        writer.write_eof()

    async def _read(self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        due = 0.0
        piece = b"."
        while piece:
            try:
                piece = await reader.read(_PIECE_BYTES)
            except OSError:
                piece = b""  # treated as the end of the stream
            due = max(due, asyncio.get_running_loop().time() + self._draw_delay())
            await queue.put((due, piece))

    def _draw_delay(self) -> float:
        """Draws the delay of one piece, in seconds, including retransmissions."""
        delay = self._rng.uniform(0, self.delay) if self.delay else 0.0
        wait = _RETRANSMISSION
        while self.loss and self._rng.random() < self.loss:
            delay, wait = delay + wait, 2 * wait
        return delay
