"""Tests the HTTP server's limits with clients that send too much, too early or too slowly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar

import pytest

from services.router.http import server as http_server
from services.router.http.connection import ClientGone
from services.router.http.server import MAX_HEAD, HttpServer

POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
PUT = b"PUT / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
PATCH = b"PATCH %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"

PATH: ContextVar[str] = ContextVar("PATH", default="")


class App:
    """Refuses every request without reading its body. ``GET`` starts an answer and waits for ``finish`` within it.

    ``PUT`` reads the body and waits for ``finish`` while the client is connected. ``ended`` has the error of the wait.
    ``PATCH`` takes the body from the connection, if it has arrived, and sets a context variable to the path. ``seen``
    has the variable's values before.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.begun, self.finish = asyncio.Event(), asyncio.Event()
        self.ended: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def _put(self, scope: dict, receive: Callable) -> None:
        while (await receive())["more_body"]:
            pass
        try:
            with scope["overfill.connection"]:
                self.begun.set()
                await self.finish.wait()
        except BaseException as error:
            self.ended.set_result(error)
            raise

    async def _patch(self, scope: dict) -> None:
        self.seen.append(PATH.get())
        PATH.set(scope["path"])
        while scope["overfill.connection"].take_body() is None:
            await asyncio.sleep(0)
        with scope["overfill.connection"]:
            pass

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["method"] == "PUT":
            await self._put(scope, receive)
        if scope["method"] == "PATCH":
            await self._patch(scope)
        status = 200 if scope["method"] == "GET" else 401
        body = b"done" if status == 200 else b"no"
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if status == 200:
            self.begun.set()
            await self.finish.wait()
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def app() -> App:
    return App()


@pytest.fixture
async def address(app: App) -> AsyncIterator[tuple[str, int]]:
    server = HttpServer(app, 10, None, client_certificates=False)
    host, port = (await server.start("127.0.0.1", 0)).split(":")
    yield host, int(port)
    app.finish.set()
    await server.stop()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    return int(head.split()[1]), await reader.readexactly(length)


async def test_a_refusal_reaches_a_client_that_is_still_sending(address: tuple[str, int]) -> None:
    reader, writer = await asyncio.open_connection(*address)
    body = bytes(2 << 20)
    writer.write(POST % len(body))
    for start in range(0, len(body), 1 << 16):
        writer.write(body[start : start + (1 << 16)])
        await writer.drain()
    assert await answer(reader) == (401, b"no")
    writer.write(POST % 0)  # the connection can still be used
    assert await answer(reader) == (401, b"no")
    writer.close()


@pytest.mark.parametrize("limit", ["bytes", "seconds"])
async def test_the_rest_of_a_refused_body_has_limits(
    limit: str, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "MAX_REST" if limit == "bytes" else "REST_TIMEOUT", 0.01)
    reader, writer = await asyncio.open_connection(*address)
    writer.write(POST % (1 << 30))
    assert await answer(reader) == (401, b"no")
    writer.write(b"x")
    assert await reader.read() == b""
    writer.close()


@pytest.mark.parametrize("kind", ["one line", "lines"])
async def test_a_head_that_comes_during_an_answer_has_the_same_limit(
    kind: str, app: App, address: tuple[str, int]
) -> None:
    _, writer = await asyncio.open_connection(*address)
    writer.write(GET)
    await app.begun.wait()
    writer.write(b"GET / HTTP/1.1\r\n" + (b"" if kind == "lines" else b"x-long: "))
    piece = b"a: b\r\n" * 1000 if kind == "lines" else b"a" * 6000
    with pytest.raises(ConnectionError):
        for _ in range(1000 * MAX_HEAD // len(piece)):
            writer.write(piece)
            await writer.drain()
    writer.close()


async def test_a_head_that_comes_during_an_answer_has_the_same_time(
    app: App, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT", 0.01)
    reader, writer = await asyncio.open_connection(*address)
    writer.write(GET)
    await app.begun.wait()
    writer.write(b"GET / HTTP/1.1\r\n")
    assert not (await reader.read()).endswith(b"done"), "closed before the answer ended"
    writer.close()


@pytest.mark.parametrize("body", [b"", bytes(200_000)], ids=["small", "large enough to pause reading"])
async def test_a_disconnect_ends_the_wait_for_an_answer(body: bytes, app: App, address: tuple[str, int]) -> None:
    _, writer = await asyncio.open_connection(*address)
    writer.write(PUT % len(body) + body)
    await app.begun.wait()
    writer.close()
    assert isinstance(await asyncio.wait_for(app.ended, 10), ClientGone)


async def test_a_disconnect_ends_the_wait_although_another_request_follows(app: App, address: tuple[str, int]) -> None:
    _, writer = await asyncio.open_connection(*address)
    writer.write(PUT % 0 + GET)
    await app.begun.wait()
    writer.transport.abort()
    app.begun.clear()
    assert isinstance(await asyncio.wait_for(app.ended, 10), ClientGone)
    assert not app.begun.is_set(), "the server started the next answer"


async def test_a_disconnect_ends_the_wait_although_another_request_came_during_it(
    app: App, address: tuple[str, int]
) -> None:
    _, writer = await asyncio.open_connection(*address)
    writer.write(PUT % 0)
    await app.begun.wait()
    writer.write(PUT % 0)
    await asyncio.sleep(0.05)  # the server takes it in; without a pause both may arrive with the end of the connection
    writer.transport.abort()
    assert isinstance(await asyncio.wait_for(app.ended, 10), ClientGone)


async def test_a_request_does_not_see_the_context_of_an_earlier_one(app: App, address: tuple[str, int]) -> None:
    reader, writer = await asyncio.open_connection(*address)
    for path, body in ((b"/a", bytes(100_000)), (b"/b", b""), (b"/c", b"")):
        writer.write(PATCH % (path, len(body)) + body)
        assert await answer(reader) == (401, b"no")
    writer.write(PATCH % (b"/d", 0) + PATCH % (b"/e", 0))
    for _ in range(2):
        assert await answer(reader) == (401, b"no")
    assert app.seen == [""] * 5
    writer.close()


async def test_a_shutdown_cancels_the_wait_for_an_answer(app: App) -> None:
    server = HttpServer(app, 10, None, client_certificates=False, stop_grace=0.1)
    host, port = (await server.start("127.0.0.1", 0)).split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(PUT % 0)
    await app.begun.wait()
    await server.stop()
    assert isinstance(await asyncio.wait_for(app.ended, 10), asyncio.CancelledError)
    writer.close()
