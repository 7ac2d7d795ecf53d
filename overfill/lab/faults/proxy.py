"""A TCP proxy on loopback: slow, delay, lossy, cut off, or silent like a network that has lost its route.

It forwards bytes and so stands below gRPC: keepalive pings stop with everything else. ``message_proxy`` stands above.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from types import TracebackType

_PIECE_BYTES = 16 * 1024  # bytes forwarded at a time
_MAX_PIECES = 64  # pieces of one direction, at most
_RETRANSMISSION = 0.2  # seconds after which Linux sends again what was lost, and twice as long each further time


class TcpProxy:
    """Listens on a loopback port and forwards to ``target``, HOST:PORT.

    Args:
        bytes_per_second: of each connection in each direction; None is no limit.
        port: to listen on; 0 picks a free one.

    Attributes:
        rate: as ``bytes_per_second``; like the two below it may change at any time.
        delay: most seconds that a piece of up to 16 KiB takes, drawn for each; their order stays.
        loss: probability that a piece is lost. What whoever uses TCP sees of that is a wait for the retransmission, of
            it and of all behind it.
    """

    def __init__(self, target: str, bytes_per_second: float | None = None, port: int = 0, seed: int = 0) -> None:
        host, _, target_port = target.rpartition(":")
        self._target = (host, int(target_port))
        self.rate = bytes_per_second
        self.delay = self.loss = 0.0
        self._rng = random.Random(seed)
        self._port = port
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._open = asyncio.Event()
        self._open.set()
        self.address = ""

    async def __aenter__(self) -> TcpProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def partition(self) -> None:
        """Nothing passes in either direction from now on; connections stay open, new ones are accepted in silence."""
        self._open.clear()

    def heal(self) -> None:
        """Everything passes again, what was held back first."""
        self._open.set()

    def cut(self) -> None:
        """Closes every connection; new ones are forwarded."""
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
            pass  # either end has gone, or the proxy is closing: both ends see a closed connection
        finally:
            self._connections.discard(task)
            for end in (writer, upstream):
                if end is not None:
                    end.close()
                    with suppress(OSError, asyncio.CancelledError):
                        await end.wait_closed()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until either end closes: pieces arrive on their own, and leave in order, each when it is due."""
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
                piece = b""  # the other end hears of it as of any end
            due = max(due, asyncio.get_running_loop().time() + self._draw_delay())
            await queue.put((due, piece))

    def _draw_delay(self) -> float:
        """Seconds that a piece that arrives now takes."""
        delay = self._rng.uniform(0, self.delay) if self.delay else 0.0
        wait = _RETRANSMISSION
        while self.loss and self._rng.random() < self.loss:
            delay, wait = delay + wait, 2 * wait
        return delay
