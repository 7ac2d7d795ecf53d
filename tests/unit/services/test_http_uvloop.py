"""Tests the HTTP server on uvloop, which Ray uses where it is installed: its transports are not asyncio's."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

from overfill.rpc import certificates
from overfill.rpc.access import Role
from overfill.rpc.tls import ServerTls
from services.router.http.request import Request
from services.router.http.server import HttpServer

uvloop = pytest.importorskip("uvloop")

POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n"


@pytest.mark.parametrize("encrypted", [False, True], ids=["clear", "TLS"])
def test_requests_answers_refusals_and_disconnects(encrypted: bool, tmp_path: Path) -> None:
    certificates.make(tmp_path, ["127.0.0.1"])
    files = certificates.role_files(tmp_path, Role.ROUTER)
    cancelled: list[str] = []

    async def app(request: Request) -> None:
        body = await request.body()
        if body == b"leave":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(request.path)
                raise
        request.begin(200, ())
        request.write(body)
        request.write(b"!", last=True)

    async def run() -> None:
        server = HttpServer(app, 10, ServerTls(files.cert, files.key) if encrypted else None, client_certificates=False)
        host, _, port = (await server.start("127.0.0.1", 0)).partition(":")
        context = ssl.create_default_context(cafile=str(files.ca)) if encrypted else None
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        writer.write(POST + b"hello" + POST)
        await reader.readuntil(b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n")
        writer.write(b"again")
        await reader.readuntil(b"5\r\nagain\r\n1\r\n!\r\n0\r\n\r\n")
        writer.write(b"what is this?\r\n\r\n")
        assert b" 400 " in await reader.readuntil(b"\r\n\r\n")
        writer.close()
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        writer.write(POST + b"leave")
        await writer.drain()
        writer.close()
        await server.stop()
        assert server.num_connections == 0

    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(run(), 60))
    finally:
        loop.close()
    assert cancelled in (["/"], []), "the client may leave before the request has arrived"
