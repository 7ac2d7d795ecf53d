"""A TCP proxy with a bandwidth limit, to stand between two processes on loopback."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType

_PIECE = 16 * 1024  # bytes forwarded at a time


class ThrottlingProxy:
    """Listens on a free loopback port and forwards to ``target``.

    Each connection gets ``bytes_per_second`` in each direction for itself.
    """

    def __init__(self, target: str, bytes_per_second: float) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._rate = bytes_per_second
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.address = ""

    async def __aenter__(self) -> ThrottlingProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        upstream: asyncio.StreamWriter | None = None
        try:
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
            await asyncio.sleep(max(0.0, free_at - loop.time()))
            free_at = max(free_at, loop.time()) + len(piece) / self._rate
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
