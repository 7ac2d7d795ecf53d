"""A client of the HTTP server's connections without sockets, and the application that it talks to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote

from overfill.api.openai.errors import ApiError
from services.router.http.connection import Connection
from services.router.http.request import Request
from services.router.http.state import ByteBudget, ServerState


async def echo(request: Request) -> None:
    """Answers with the method, the path and the body of the request."""
    try:
        body = await request.body()
    except ApiError as error:
        request.respond(error.status, error.message.encode())
        return
    text = f"{request.method} {request.path} {body.decode('latin-1')}"
    request.respond(200, b"ok", [(b"x-echo", quote(text).encode())])


def parse(data: bytes) -> list[str | int]:
    """Returns what the answers in ``data`` echo, or their statuses. The last one may be incomplete and is left out."""
    answers: list[str | int] = []
    while True:
        head, end, data = data.partition(b"\r\n\r\n")
        if not end:
            return answers
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status, text = int(first.split()[1]), unquote(headers.get("x-echo", ""))
        size = 0 if status == 100 or text.startswith("HEAD ") else int(headers["content-length"])
        if len(data) < size:
            return answers
        data = data[size:]
        answers.append(text or status)


def new_state(
    app: Callable[[Request], Awaitable[None]] = echo, max_connections: int = 10
) -> ServerState[Connection, Request]:
    """Returns the state of a server that has no socket."""
    return ServerState(app, time.monotonic, max_connections, 1 << 18, ByteBudget(1 << 20, 1 << 19), None)


class MemoryClient(asyncio.Transport):
    """A new connection, and the transport that carries what the server sends to the client.

    Attributes:
        connection: the server's side, until it is lost.
        received: the bytes that the server has sent.
        closed: True once the server has closed its direction of the connection.
        unread: number of bytes that the client has not read, for the server's limits.
        paused: True while the server does not read.
        lost: True once the server has forgotten the connection.
    """

    def __init__(self, state: ServerState[Connection, Request]) -> None:
        super().__init__({"socket": SimpleNamespace(setsockopt=lambda *_: None)})
        self.received = b""
        self.closed = self.lost = self.paused = self._closing = False
        self.unread = 0
        self._early = b""
        self._changed = asyncio.Event()
        self.connection = Connection(state)
        self.connection.connection_made(self)

    # For the client

    def send(self, data: bytes) -> None:
        """Lets ``data`` arrive in one piece, or later if the server does not read now."""
        if self._closing:
            return
        if self.paused:
            self._early += data
        else:
            self.connection.data_received(data)

    def send_eof(self) -> None:
        """Closes the client's direction of the connection."""
        if not self._closing and not self.connection.eof_received():
            self.close()

    def disconnect(self) -> None:
        """Ends the connection as a client that dies."""
        self.abort()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until ``condition`` is true or the server has closed the connection."""
        while not condition() and not self.closed:
            self._changed.clear()
            await self._changed.wait()

    async def until_lost(self) -> None:
        """Waits until the server has forgotten the connection."""
        while not self.lost:
            self._changed.clear()
            await self._changed.wait()

    # For the connection

    def write(self, data: Any) -> None:
        self.received += data
        self._changed.set()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.closed = True
        self._changed.set()

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing and not self.unread:
            asyncio.get_running_loop().call_soon(self._lose)
        self._closing = True

    def abort(self) -> None:
        self.unread, self._closing = 0, False
        self.close()

    def _lose(self) -> None:
        if self.lost:
            return
        self.closed = self.lost = True
        self._changed.set()
        self.connection.connection_lost(None)
        del self.connection  # as asyncio's transports do

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False
        if self._early:
            data, self._early = self._early, b""
            self.send(data)

    def get_write_buffer_size(self) -> int:
        return self.unread
