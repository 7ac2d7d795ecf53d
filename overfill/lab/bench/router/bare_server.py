"""The lower bound of ``overfill bench router``: uvicorn with httptools, which sends our router's bytes and does nothing
else. It also stands behind proxies, in place of workers.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import multiprocessing
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import uvicorn

from overfill.lab.bench.router.load import PATH, make_body
from overfill.lab.peers.process import PeerFailed
from overfill.lab.peers.routers import RunningRouter

_BACKLOG = 2048
_USAGE = b'"completion_tokens":%d'
_END = b"\n\n"
"""End of a server-sent event."""


@dataclass(frozen=True, slots=True)
class Recording:
    """An answer of our router in bytes: the events before a token, the event of one token, the events after it."""

    model: str
    head: bytes
    token: bytes
    tail: bytes


def record(server: RunningRouter) -> Recording:
    """Records a server's answer of one token.

    Raises:
        PeerFailed: The server did not answer with one event per token.
    """
    connection = http.client.HTTPConnection(server.address, timeout=30)
    with closing(connection):
        connection.request("POST", PATH, make_body(server.model, 1), {"content-type": "application/json"})
        events = [event + _END for event in connection.getresponse().read().split(_END) if event]
    place = [index for index, event in enumerate(events) if b'"content":"%b"' % server.token in event]
    if len(place) != 1:
        raise PeerFailed(f"{server.address}: expected one event with a token, got {len(place)} in {events!r}")
    return Recording(server.model, b"".join(events[: place[0]]), events[place[0]], b"".join(events[place[0] + 1 :]))


@contextmanager
def bare_server(recording: Recording, step: float, sequences: int = 0) -> Iterator[RunningRouter]:
    """Starts the server, which sends a token to each running answer every ``step`` seconds, to any number of them."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(recording, step, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert process.pid is not None
        yield RunningRouter(f"127.0.0.1:{ours.recv()}", recording.model, "bare uvicorn", (process.pid,))
    finally:
        process.kill()
        process.join()


def _serve(recording: Recording, step: float, pipe: Connection) -> None:
    asyncio.run(_Bare(recording, step).serve(pipe.send))


class _Bare:
    """The running answers, and the application that sends them."""

    def __init__(self, recording: Recording, step: float) -> None:
        self._recording = recording
        self._step = step
        self._models = json.dumps({"object": "list", "data": [{"id": recording.model, "object": "model"}]}).encode()
        self._next = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    async def serve(self, ready: Callable[[int], None]) -> None:
        config = uvicorn.Config(
            self._app, interface="asgi3", loop="asyncio", http="httptools", ws="none", lifespan="off", log_config=None,
            access_log=False, server_header=False, proxy_headers=False, backlog=_BACKLOG,
        )  # fmt: skip
        # With the protocol named, asyncio sets TCP_NODELAY on accepted connections.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(_BACKLOG)
            ready(listener.getsockname()[1])
            await uvicorn.Server(config).serve(sockets=[listener])

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        streams = bool(body) and json.loads(body).get("stream", False)
        kind = b"text/event-stream; charset=utf-8" if streams else b"application/json"
        headers = [(b"content-type", kind), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if not streams:  # a proxy asks for the models, or whether the server lives
            await send({"type": "http.response.body", "body": self._models})
            return
        gone = asyncio.ensure_future(receive())  # uvicorn drops what is sent to a client that has gone, without error
        async for event in self._events(json.loads(body)["max_tokens"]):
            if gone.done():
                return
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self, tokens: int) -> AsyncIterator[bytes]:
        """Yields the events of one answer. The first token comes at once."""
        yield self._recording.head
        yield self._recording.token
        for _ in range(tokens - 1):
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(self._step, self._end_step)
            await self._next.wait()
            yield self._recording.token
        yield self._recording.tail.replace(_USAGE % 1, _USAGE % tokens)

    def _end_step(self) -> None:
        self._timer = None
        self._next.set()
        self._next.clear()
