from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from overfill.routing.pool import Roster
from overfill.routing.tier import Tier
from overfill.rpc.tls import ServerTls
from services.router.http import server as http_server
from services.router.http.server import HttpServer
from services.router.served_tiers import ServedTiers


@pytest.fixture(scope="session")
def serve_tiers() -> Callable[..., ServedTiers]:
    """Returns a function that makes the tiers of a model tiny; the digest of a decoder repeats the first letter."""

    def serve(*names: str, complete: Mapping[str, int] | None = None) -> ServedTiers:
        config = SimpleNamespace(vocab_size=100, max_positions=64)
        pairs: Any = {
            name: SimpleNamespace(
                name=f"{name}-pair", full_config=config, full_digest="0" * 64, decoder_digest=name[0] * 64, revision=""
            )
            for name in names
        }
        return ServedTiers(["tiny"], pairs, Roster(tiers=[Tier(name) for name in names]), complete=complete)

    return serve


@pytest.fixture
async def serve(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """Returns a function that starts an HTTP server for an application and returns it and its address."""
    monkeypatch.setattr(http_server, "_ROUND", 0.01)
    servers = []

    async def begin(app: Any, max_connections: int = 10, tls: ServerTls | None = None, **options: Any) -> Any:
        server = HttpServer(app, max_connections, tls, client_certificates=False, **options)
        servers.append(server)
        host, port = (await server.start("127.0.0.1", 0)).split(":")
        return server, (host, int(port))

    yield begin
    for server in servers:
        await server.stop()
