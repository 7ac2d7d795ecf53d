"""Tests the HTTP server's limits with clients that send too much, too early or too slowly."""

import asyncio
import ssl
from contextlib import suppress
from contextvars import ContextVar

import pytest

from overfill.api.openai.errors import ApiError
from overfill.errors import Overloaded
from overfill.rpc import certificates
from overfill.rpc.access import Role
from overfill.rpc.tls import ServerTls
from services.router.http import connection as http_connection
from services.router.http.connection import MAX_PIPELINED
from services.router.http.head import MAX_HEAD

POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
PUT = b"PUT / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
PATCH = b"PATCH %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"

LONG = 32 << 20
"""Bytes of an answer that is too long for the buffers of a connection."""

PATH: ContextVar[str] = ContextVar("PATH", default="")


class App:
    """Refuses every request without reading its body. ``GET`` waits for ``finish`` before its answer.

    ``PUT`` reads the body and waits for ``finish``. ``ended`` has the error of the wait. ``PATCH`` sets a context
    variable to the path. ``seen`` has the variable's values before. ``TRACE`` reads the body and answers with its
    length, or with the error. ``PROPFIND`` gets an answer of ``LONG`` bytes.
    """

    def __init__(self):
        self.seen = []
        self.begun, self.finish = asyncio.Event(), asyncio.Event()
        self.ended = asyncio.get_running_loop().create_future()

    async def __call__(self, request):
        match request.method:
            case "PUT":
                await request.body()
                try:
                    self.begun.set()
                    await self.finish.wait()
                except BaseException as error:
                    self.ended.set_result(error)
                    raise
            case "PATCH":
                await request.body()
                self.seen.append(PATH.get())
                PATH.set(request.path)
            case "TRACE":
                request.key = request.header(b"x-key")
                self.begun.set()
                try:
                    request.respond(200, b"%d" % len(await request.body()))
                except ApiError as error:
                    request.respond(error.status, error.message.encode())
                except Overloaded as error:
                    request.respond(429, str(error).encode())
                return
            case "PROPFIND":
                self.begun.set()
                request.respond(200, bytes(LONG))
                return
            case "GET":
                self.begun.set()
                await self.finish.wait()
                request.respond(200, b"done")
                return
        request.respond(401, b"no")


@pytest.fixture
async def app():
    return App()


@pytest.fixture
async def start(app, serve):
    """Starts a server with the given options, and returns its address."""

    async def begin(**options):
        return (await serve(app, **options))[1]

    yield begin
    app.finish.set()


@pytest.fixture
async def connect(start):
    """Opens connections, to a server with the usual options unless an address is given, and closes them at the end."""
    writers = []
    usual = await start()

    async def begin(address=usual, **options):
        reader, writer = await asyncio.open_connection(*address, **options)
        writers.append(writer)
        return reader, writer

    yield begin
    for writer in writers:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def answer(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    return int(head.split()[1]), await reader.readexactly(length)


@pytest.mark.parametrize("limit", ["bytes", "seconds"])
async def test_the_rest_of_a_refused_body_has_limits(limit, monkeypatch, connect):
    monkeypatch.setattr(http_connection, "MAX_REST" if limit == "bytes" else "BODY_TIMEOUT", 0.01)
    reader, writer = await connect()
    writer.write(POST % (1 << 30))
    assert await answer(reader) == (401, b"no")
    writer.write(b"x")
    assert await reader.read() == b""


@pytest.mark.parametrize("kind", ["one line", "lines", "only line ends"])
@pytest.mark.parametrize("when", ["first", "during an answer"])
async def test_a_head_has_a_limit(kind, when, app, connect, monkeypatch):
    monkeypatch.setattr(http_connection, "LINGER_TIMEOUT", 0.0)
    _, writer = await connect()
    if when == "during an answer":
        writer.write(GET)
        await app.begun.wait()
    piece = {"one line": b"a" * 6000, "lines": b"a: b\r\n" * 10, "only line ends": b"\r\n" * 3000}[kind]
    if kind != "only line ends":
        writer.write(b"GET / HTTP/1.1\r\n" + (b"x-long: " if kind == "one line" else b""))
    with pytest.raises(ConnectionError):
        for _ in range(1000 * MAX_HEAD // len(piece)):
            writer.write(piece)
            await writer.drain()


async def test_answers_that_are_not_read_do_not_pile_up(app, connect):
    reader, writer = await connect()
    others_reader, others_writer = await connect()
    for _ in range(2):
        app.begun.clear()
        writer.write(b"PROPFIND / HTTP/1.1\r\nhost: x\r\n\r\n")
        for _ in range(3):
            others_writer.write(POST % 0)
            assert await answer(others_reader) == (401, b"no")
    assert not app.begun.is_set(), "the server answers a client that has not read the answer before"
    for _ in range(2):
        assert await answer(reader) == (200, bytes(LONG))
    assert app.begun.is_set()


async def test_too_many_requests_behind_an_answer_end_the_connection(app, connect):
    app.finish.set()
    reader, writer = await connect()
    writer.write(GET * (MAX_PIPELINED + 5))
    assert [await answer(reader) for _ in range(MAX_PIPELINED + 1)] == [(200, b"done")] * (MAX_PIPELINED + 1)
    assert (await answer(reader))[0] == 400
    assert await reader.read() == b""


@pytest.mark.parametrize("body", [b"", bytes(200_000)], ids=["small", "large"])
async def test_a_disconnect_ends_the_wait_for_an_answer(body, app, connect):
    _, writer = await connect()
    writer.write(PUT % len(body) + body)
    await app.begun.wait()
    writer.close()
    assert isinstance(await asyncio.wait_for(app.ended, 10), asyncio.CancelledError)


async def test_a_disconnect_ends_the_wait_although_another_request_follows(app, connect):
    _, writer = await connect()
    writer.write(PUT % 0 + GET)
    await app.begun.wait()
    writer.transport.abort()
    app.begun.clear()
    assert isinstance(await asyncio.wait_for(app.ended, 10), asyncio.CancelledError)
    assert not app.begun.is_set(), "the server started the next answer"


async def test_a_request_does_not_see_the_context_of_an_earlier_one(app, connect):
    reader, writer = await connect()
    for path, body in ((b"/a", bytes(100_000)), (b"/b", b""), (b"/c", b"")):
        writer.write(PATCH % (path, len(body)) + body)
        assert await answer(reader) == (401, b"no")
    writer.write(PATCH % (b"/d", 0) + PATCH % (b"/e", 0))
    for _ in range(2):
        assert await answer(reader) == (401, b"no")
    assert app.seen == [""] * 5


async def test_a_shutdown_cancels_the_wait_for_an_answer(app, serve, connect):
    server, address = await serve(app, stop_grace=0.1)
    _, writer = await connect(address)
    writer.write(PUT % 0)
    await app.begun.wait()
    await server.stop()
    assert isinstance(await asyncio.wait_for(app.ended, 10), asyncio.CancelledError)


@pytest.mark.parametrize("begun", [b"", GET, b"GET / HT", POST % 9], ids=["silent", "idle", "half a head", "refused"])
async def test_a_connection_without_a_request_gives_way_to_a_new_one(begun, start, app, connect):
    address = await start(max_connections=2)
    app.finish.set()
    oldest, second = [await connect(address) for _ in range(2)]
    for reader, writer in (oldest, second):
        writer.write(begun)
        if begun == GET or begun.startswith(b"POST"):
            await answer(reader)
    reader, writer = await connect(address)
    writer.write(GET)
    assert await answer(reader) == (200, b"done")
    assert await oldest[0].read() == b""
    second[1].write({b"GET / HT": b"TP/1.1\r\nhost: x\r\n\r\n", POST % 9: bytes(9) + GET}.get(begun, GET))
    assert await answer(second[0]) == (200, b"done")


async def test_a_connection_whose_body_arrives_gives_way_if_all_have_requests(start, app, connect):
    address = await start(max_connections=2)
    slow = [await connect(address) for _ in range(2)]
    for _, writer in slow:
        app.begun.clear()
        writer.write(b"TRACE / HTTP/1.1\r\nhost: x\r\ncontent-length: 400\r\n\r\nx")
        await app.begun.wait()
    reader, writer = await connect(address)
    app.finish.set()
    writer.write(GET)
    assert await answer(reader) == (200, b"done")
    assert await slow[0][0].read() == b""
    slow[1][1].write(bytes(399))
    assert await answer(slow[1][0]) == (200, b"400")


async def test_connections_whose_requests_run_do_not_give_way(start, app, connect):
    address = await start(max_connections=2)
    held = [await connect(address) for _ in range(2)]
    for _, writer in held:
        app.begun.clear()
        writer.write(GET)
        await app.begun.wait()
    reader, _ = await connect(address)
    assert (await answer(reader))[0] == 503
    assert await reader.read() == b""
    app.finish.set()
    for reader, _ in held:
        assert await answer(reader) == (200, b"done")


async def test_tls_handshakes_count_as_connections_and_have_a_time(start, app, tmp_path, monkeypatch, connect):
    monkeypatch.setattr(http_connection, "HEAD_TIMEOUT", 2.0)
    app.finish.set()
    certificates.make(tmp_path, ["127.0.0.1"])
    files = certificates.role_files(tmp_path, Role.ROUTER)
    address = await start(max_connections=2, tls=ServerTls(files.cert, files.key))
    context = ssl.create_default_context(cafile=str(files.ca))
    silent = [await connect(address) for _ in range(3)]
    assert await silent[0][0].read() == b"", "the third takes the first one's place"
    reader, writer = await connect(address, ssl=context)
    writer.write(GET)
    assert await answer(reader) == (200, b"done")
    for reader, _ in silent:
        assert await asyncio.wait_for(reader.read(), 30) == b""


async def test_bodies_in_receipt_share_a_budget_and_a_key_has_a_part_of_it(start, app, connect):
    address = await start(max_body=100_000, max_bodies=400_000)
    head = b"TRACE / HTTP/1.1\r\nhost: x\r\nx-key: %b\r\ncontent-length: 90000\r\n\r\n"

    async def begin(key):
        reader, writer = await connect(address)
        writer.write(head % key)
        app.begun.clear()
        await app.begun.wait()
        return reader, writer

    first = await begin(b"a")
    refused, _ = await begin(b"a")
    status, message = await answer(refused)
    assert (status, b"for this API key" in message) == (429, True)
    others = [await begin(b"%d" % key) for key in range(3)]
    refused, _ = await begin(b"b")
    status, message = await answer(refused)
    assert (status, b"its limit is 400000" in message) == (429, True)
    for reader, writer in (first, *others):
        writer.write(bytes(90_000))
        assert await answer(reader) == (200, b"90000")
    reader, writer = await begin(b"b")
    writer.write(bytes(90_000))
    assert await answer(reader) == (200, b"90000")


@pytest.mark.parametrize("length", [b"content-length: 1001", b"transfer-encoding: chunked"])
async def test_a_body_that_is_too_large_is_refused_and_the_connection_goes_on(start, length, connect):
    address = await start(max_body=1000)
    reader, writer = await connect(address)
    body = bytes(1001) if b"content" in length else b"3e9\r\n" + bytes(1001) + b"\r\n0\r\n\r\n"
    writer.write(b"TRACE / HTTP/1.1\r\nhost: x\r\n" + length + b"\r\n\r\n" + body)
    status, message = await answer(reader)
    assert (status, b"1000 bytes" in message) == (413, True)
    writer.write(POST % 0)
    assert await answer(reader) == (401, b"no")


async def test_a_drained_server_closes_connections_behind_their_answers(app, serve, connect):
    server, address = await serve(app)
    idle_reader, idle_writer = await connect(address)
    idle_writer.write(POST % 0)
    await answer(idle_reader)
    reader, writer = await connect(address)
    writer.write(GET)
    await app.begun.wait()
    server.drain()
    assert await idle_reader.read() == b""
    app.finish.set()
    assert b"connection: close" in await reader.readuntil(b"\r\n\r\n")
    assert await reader.read() == b"done"
    reader, writer = await connect(address)  # a new connection gets one answer
    writer.write(GET + GET)
    assert b"connection: close" in await reader.readuntil(b"\r\n\r\n")
    assert await reader.read() == b"done"
