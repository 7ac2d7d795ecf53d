"""Tests that one client of the HTTP port can neither hold what others need, nor mix up what it sends."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import ssl
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from cores import one_revision
from http_memory import MemoryClient, echo, new_state, parse

from overfill.rpc import certificates
from overfill.rpc.access import AccessPolicy, Role, Scope
from overfill.rpc.tls import ServerTls
from overfill.telemetry.router_metrics import RouterMetrics
from services.router.http import connection as http_connection
from services.router.http import head as http_head
from services.router.http import server as http_server
from services.router.http.app import HttpApi
from services.router.http.connection import HEAD_TIMEOUT, Connection
from services.router.http.request import Request
from services.router.http.server import HttpServer
from services.router.limits import STALLED_TIMEOUT

GET = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
CHUNKED = b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


class Held:
    """Answers ``GET`` only when ``finish`` is set, refuses ``PUT`` without its body, and echoes other requests."""

    def __init__(self) -> None:
        self.begun, self.finish = asyncio.Event(), asyncio.Event()
        self.paths: list[str] = []

    async def __call__(self, request: Request) -> None:
        self.paths.append(request.path)
        if request.method == "GET":
            self.begun.set()
            await self.finish.wait()
        if request.method == "PUT":
            request.respond(403, b"no")
        else:
            await echo(request)


@pytest.fixture
async def held() -> Held:
    return Held()


Serve = Callable[..., Awaitable[tuple[HttpServer, tuple[str, int]]]]


@pytest.mark.parametrize("pieces", [(b"ghi", b""), (b"", b"ghi"), (b"g", b"hi")], ids=["early", "late", "both"])
async def test_a_body_whose_pieces_arrive_before_and_behind_its_turn_is_whole(
    pieces: tuple[bytes, bytes], held: Held
) -> None:
    client = MemoryClient(new_state(held))
    client.send(GET + POST % 9 + b"abc")
    await held.begun.wait()
    client.send(b"def")
    client.send(pieces[0])
    held.finish.set()
    await client.until(lambda: len(parse(client.received)) == 1)
    client.send(pieces[1])
    await client.until(lambda: len(parse(client.received)) == 2)
    assert parse(client.received) == ["GET /a ", "POST /a abcdefghi"]


async def test_nothing_runs_behind_the_last_answer(held: Held) -> None:
    state = new_state(held)
    client = MemoryClient(state)
    state.draining = True
    client.send(POST.replace(b"POST", b"PUT") % 3 + b"ab")
    await client.until(lambda: len(parse(client.received)) == 1)
    client.unread = 1
    client.send(b"c" + POST.replace(b"/a", b"/more") % 0)
    await asyncio.sleep(0)
    client.disconnect()
    await client.until_lost()
    assert held.paths == ["/a"]


async def test_a_body_in_small_chunks_takes_little_more_memory_than_its_size() -> None:
    state = new_state()
    client = MemoryClient(state)
    size = state.max_body
    tracemalloc.start()
    try:
        client.send(CHUNKED)
        chunks = b"2\r\nab\r\n" * 1000
        for _ in range(size // 2000):
            client.send(chunks)
            client.resume_reading()
        assert tracemalloc.get_traced_memory()[1] < 2 * size
    finally:
        tracemalloc.stop()
    client.disconnect()
    await client.until_lost()


@pytest.mark.parametrize("head", [CHUNKED + b"0\r\nlong: ", CHUNKED + b"1;"], ids=["trailer", "extension"])
async def test_a_line_that_does_not_end_is_refused(head: bytes) -> None:
    client = MemoryClient(new_state())
    client.send(head)
    for _ in range(2):
        client.send(b"a" * http_head.MAX_HEAD)
    await client.until(lambda: False)
    assert parse(client.received) == [431]


async def test_small_chunks_of_a_refused_body_count_as_larger_ones(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "MAX_REST", 100_000)
    client = MemoryClient(new_state(held))
    client.send(CHUNKED.replace(b"POST", b"PUT"))
    await client.until(lambda: len(parse(client.received)) == 1)
    client.send(b"1\r\na\r\n" * 200)
    await client.until_lost()


async def test_the_server_reads_small_chunks_slowly() -> None:
    client = MemoryClient(new_state())
    client.send(CHUNKED)
    client.send(b"1\r\na\r\n" * 200)
    assert client.paused
    client.send(b"0\r\n\r\n")
    await client.until(lambda: len(parse(client.received)) == 1)
    assert parse(client.received) == ["POST /a " + "a" * 200]


async def test_what_follows_an_error_behind_an_answer_has_a_limit(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "MAX_REST", 100_000)
    client = MemoryClient(new_state(held))
    client.send(GET + b"what is this?\r\n\r\n")
    await held.begun.wait()
    client.send(bytes(50_000))
    assert client.paused
    client.send(bytes(60_000))
    await client.until_lost()


async def test_an_error_reaches_a_client_that_sends_before_it_reads(serve: Serve) -> None:
    _, address = await serve(echo)

    def ask() -> bytes:
        with socket.create_connection(address) as client:
            client.sendall(GET.replace(b"Host: a", b"Host: a\r\nHost: a") + bytes(8 << 20))
            return client.recv(100)

    assert (await asyncio.to_thread(ask)).startswith(b"HTTP/1.1 400 ")


def connections_and_requests() -> list[object]:
    return [one for one in gc.get_objects() if type(one) in (Connection, Request)]


@pytest.mark.parametrize("kind", ["head", "body", "answer"])
async def test_a_client_that_is_too_slow_leaves_nothing(kind: str, held: Held) -> None:
    gc.collect()
    gc.disable()
    try:
        others = connections_and_requests()  # of earlier tests
        state = new_state(held)
        client = MemoryClient(state)
        client.send({"head": b"GET", "body": POST % 100_000, "answer": POST % 0}[kind])
        for _ in range(3):  # the application's turn
            await asyncio.sleep(0)
        now, round = time.monotonic(), 0.0
        while not client.lost:
            round += HEAD_TIMEOUT
            client.connection.check_time(now + round)
            await asyncio.sleep(0)
        assert parse(client.received) == {"head": [408], "body": [408], "answer": ["POST /a "]}[kind]
        assert (state.open, {**state.free, **state.receiving}, state.budget._sum) == (set(), {}, 0)
        del client
        await asyncio.sleep(0)
        assert len(connections_and_requests()) == len(others)
    finally:
        gc.enable()


async def test_a_client_that_reads_slowly_gets_its_answer_and_one_that_does_not_read_is_dropped() -> None:
    client = MemoryClient(new_state())
    client.unread = 1_000_000
    client.connection.pause_writing()
    now = time.monotonic()
    for round in range(1, 4):
        now += STALLED_TIMEOUT + 1
        client.unread -= 60_000
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client.connection._state, "now", lambda now=now: now)
            client.connection.check_time(now)
        assert not client.is_closing(), round
    client.unread -= 1000
    client.connection.check_time(now + STALLED_TIMEOUT + 1)
    await client.until_lost()


async def test_a_connection_that_gives_way_is_gone_at_once() -> None:
    state = new_state(max_connections=2)
    clients = [MemoryClient(state) for _ in range(2)]
    for client in clients:
        client.send(POST % 0)
        await client.until(lambda client=client: parse(client.received) != [])  # type: ignore[misc]
    await asyncio.sleep(0)
    clients[0].unread = 1  # the kernel takes no more, not even the end of TLS
    new = MemoryClient(state)
    await clients[0].until_lost()
    assert len(state.open) == 2
    assert new.connection in state.open


async def test_a_client_that_still_reads_its_answer_does_not_give_way() -> None:
    state = new_state(max_connections=1)
    reading = MemoryClient(state)
    reading.unread = 1000
    reading.send(POST % 0)
    await reading.until(lambda: parse(reading.received) != [])
    await asyncio.sleep(0)
    new = MemoryClient(state)
    await new.until_lost()
    assert parse(new.received) == [503]
    assert not reading.is_closing()


async def test_a_silent_tls_client_that_gives_way_is_gone_at_once(serve: Serve, tmp_path: Path) -> None:
    certificates.make(tmp_path, ["127.0.0.1"])
    files = certificates.role_files(tmp_path, Role.ROUTER)
    server, address = await serve(echo, 1, ServerTls(files.cert, files.key))
    context = ssl.create_default_context(cafile=str(files.ca))

    def ask() -> tuple[ssl.SSLSocket, bytes]:
        client = context.wrap_socket(socket.create_connection(address), server_hostname="127.0.0.1")
        client.sendall(GET)
        return client, client.recv(12)

    first, answer = await asyncio.to_thread(ask)
    assert answer == b"HTTP/1.1 200"
    second, answer = await asyncio.to_thread(ask)
    assert answer == b"HTTP/1.1 200"
    assert server.num_connections == 1
    first.close()
    second.close()


async def test_a_stop_ends_handshakes_that_have_not_begun(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Connection):
        def accept(self, accepted: socket.socket, context: ssl.SSLContext) -> None:
            super().accept(accepted, context)
            self.stop()

    monkeypatch.setattr(http_server, "Connection", Stopped)
    certificates.make(tmp_path, ["127.0.0.1"])
    files = certificates.role_files(tmp_path, Role.ROUTER)
    server, address = await serve(echo, 1, ServerTls(files.cert, files.key))
    reader, writer = await asyncio.open_connection(*address)
    async with asyncio.timeout(HEAD_TIMEOUT / 2):  # not the end of the time for a head
        assert await reader.read() == b""
    writer.close()
    assert server.num_connections == 0


async def test_tls_clients_that_give_way_in_the_same_turn_are_not_counted_for_ever(
    serve: Serve, tmp_path: Path
) -> None:
    certificates.make(tmp_path, ["127.0.0.1"])
    files = certificates.role_files(tmp_path, Role.ROUTER)
    server, address = await serve(echo, 1, ServerTls(files.cert, files.key))
    clients = [socket.create_connection(address) for _ in range(8)]
    _, writer = await asyncio.open_connection(*address)
    for client in clients:
        client.setblocking(False)
        assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
        client.close()
    assert server.num_connections == 1
    writer.close()
    while server.num_connections:
        await asyncio.sleep(0)


async def test_a_connection_that_arrives_during_a_stop_is_closed(serve: Serve) -> None:
    server, _ = await serve(echo)
    state = server._state
    await server.stop()
    client = MemoryClient(state)
    await client.until_lost()
    assert parse(client.received) == [503]


async def test_an_answer_that_is_cancelled_from_inside_ends_its_connection() -> None:
    async def cancelled(request: Request) -> None:
        raise asyncio.CancelledError

    state = new_state(cancelled)
    client = MemoryClient(state)
    client.send(GET)
    await client.until_lost()
    assert not state.open


MODELS = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("data", "keys", "status"),
    [
        (MODELS + b"Authorization: Bearer right\r\n\r\n", True, 200),
        (MODELS + b"\r\n", True, 401),
        (MODELS + b"Transfer-Encoding: chunked\r\n\r\n0\r\nAuthorization: Bearer right\r\n\r\n", True, 401),
        (MODELS + b"Authorization: Bearer wrong\r\nAuthorization: Bearer right\r\n\r\n", True, 400),
        (MODELS + b"\r\n", False, 200),
        (MODELS + b"Transfer-Encoding: chunked\r\n\r\n0\r\nOrigin: http://evil\r\nHost: evil\r\n\r\n", False, 200),
        (MODELS + b"Host: evil\r\n\r\n", False, 400),
        (MODELS.replace(b"/v1", b"http://evil/v1") + b"\r\n", False, 403),
        (MODELS + b"Origin: http://localhost\r\nOrigin: http://evil\r\n\r\n", False, 400),
    ],
    ids=["key", "none", "key in trailers", "two keys", "open", "trailers", "two hosts", "absolute", "two origins"],
)
async def test_who_asks_is_decided_by_one_head(data: bytes, keys: bool, status: int) -> None:
    holder = SimpleNamespace(id="1", scopes=frozenset(Scope), tiers=None)
    access = AccessPolicy(keys=lambda key: holder if key == "right" else None) if keys else AccessPolicy()  # type: ignore[arg-type, return-value]
    tiers = SimpleNamespace(listed=lambda caller: [], roster=SimpleNamespace(changes=0))
    statistics = SimpleNamespace(metrics=RouterMetrics())
    handler = SimpleNamespace(statistics=statistics, tiers=tiers, tokenizer=None)
    api = HttpApi(one_revision(handler), access, lambda: "", None, None, share_port=False)  # type: ignore[arg-type]
    client = MemoryClient(new_state(api))
    client.send(data)
    await client.until(lambda: parse(client.received) != [])
    assert parse(client.received) == [status]


async def test_clients_that_reset_their_connections_leave_no_errors(serve: Serve) -> None:
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    server, address = await serve(echo, 1)
    for data in (b"", b"what is this?\r\n\r\n"):
        for _ in range(50):
            client = socket.create_connection(address)
            client.sendall(data)
            client.close()  # resets the connection when the server writes
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    await reader.read()  # the others were accepted before
    writer.close()
    while server.num_connections:
        await asyncio.sleep(0)
    assert errors == []


async def test_many_connections_at_once_open_few_files(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Counting(Connection):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            seen.append(len(os.listdir("/proc/self/fd")))
            super().connection_made(transport)

    monkeypatch.setattr(http_server, "Connection", Counting)
    _, address = await serve(echo, 2)
    clients = [socket.create_connection(address) for _ in range(1000)]
    before = len(os.listdir("/proc/self/fd"))
    while len(seen) < len(clients):
        await asyncio.sleep(0)
    for client in clients:
        client.close()
    assert max(seen) - before < 200
