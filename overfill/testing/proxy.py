"""A TCP proxy on loopback: slow, cut off, or silent like a network that has lost its route.

It forwards bytes and so stands below gRPC: keepalive pings stop with everything else. ``message_proxy`` stands above.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType

_PIECE = 16 * 1024  # bytes forwarded at a time


class TcpProxy:
    """Listens on a loopback port and forwards to ``target``, HOST:PORT.

    Args:
        bytes_per_second: of each connection in each direction; None is no limit.
        port: to listen on; 0 picks a free one.
    """

    def __init__(self, target: str, bytes_per_second: float | None = None, port: int = 0) -> None:
        host, _, target_port = target.rpartition(":")
        self._target = (host, int(target_port))
        self._rate = bytes_per_second
        self._port = port
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._flows = asyncio.Event()
        self._flows.set()
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
        self._flows.clear()

    def heal(self) -> None:
        """Everything passes again, what was held back first."""
        self._flows.set()

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
            await self._flows.wait()
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
        loop = asyncio.get_running_loop()
        free_at = loop.time()
        while piece := await reader.read(_PIECE):
            await self._flows.wait()
            if self._rate is not None:
                await asyncio.sleep(max(0.0, free_at - loop.time()))
                free_at = max(free_at, loop.time()) + len(piece) / self._rate
            writer.write(piece)
            await writer.drain()
        await self._flows.wait()
        writer.write_eof()
