"""A router with mock workers in a thread: a fast stack without torch, for tests of the router's interfaces."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass

from overfill.settings.config import RouterConfig
from overfill.settings.mock import MockDecodeConfig, MockPrefillConfig
from services.mock.running import mock_worker
from services.router.app import Router

SECRET = "the secret of a mock stack"
"""With API keys, what its processes show each other."""


@dataclass
class MockStack:
    """Addresses of a running stack: ``grpc`` is host:port, ``url`` the base of the HTTP endpoint."""

    grpc: str
    url: str
    router: Router
    loop: asyncio.AbstractEventLoop

    def call(self, coroutine, timeout=30):
        """Runs ``coroutine`` in the stack's event loop; returns its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)


def _flags(settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]


@contextmanager
def mock_stack(
    pair, *, prefill=1, decode=1, workers=None, prefill_settings=None, decode_settings=None, tiers=(), **router
):
    """Yields a ready MockStack. ``router`` are the router's flags, ``workers`` those of every mock worker.

    With ``tiers``, each of them has ``decode`` workers of ``pair``.
    """
    started = Future()
    secret = {}
    if router.get("api_keys") is not None:
        secret["stack_secret"] = router["api_keys"].with_name("stack-secret")
        secret["stack_secret"].write_text(SECRET)

    async def main():
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        flags = {
            "pair": pair,
            "port": 0,
            "http": 0,
            "grace_period": 0,
            "expect_prefill": prefill,
            "expect_decode": decode,
        }
        if tiers:
            flags |= {"pair": None, "decoders": ";".join(f"{tier}={pair}:{decode}" for tier in tiers)}
        app = Router(RouterConfig.parse(_flags(flags | secret | router)))
        address = await app.start()
        serving = asyncio.create_task(app.run())
        async with AsyncExitStack() as stack:
            common = {"pair": pair, "routers": address} | secret | (workers or {})
            for index in range(prefill):
                settings = common | {"worker_id": f"prefill-{index}"} | (prefill_settings or {})
                await stack.enter_async_context(mock_worker(MockPrefillConfig.parse(_flags(settings))))
            placed = [{"worker_id": f"decode-{tier}-{i}", "tier": tier} for tier in tiers for i in range(decode)]
            placed = placed or [{"worker_id": f"decode-{i}"} for i in range(decode)]
            for place in placed:
                settings = common | place | (decode_settings or {})
                await stack.enter_async_context(mock_worker(MockDecodeConfig.parse(_flags(settings))))
            while sum(worker.report is not None for worker in app.roster.workers()) < prefill + len(placed):
                await asyncio.sleep(0.01)
            handle = MockStack(address, f"http://{app.http_address}", app, loop)
            started.set_result((handle, lambda: loop.call_soon_threadsafe(stop.set)))
            await stop.wait()
            app.drain()
            await serving

    def run():
        try:
            asyncio.run(main())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    handle, stop = started.result(60)
    try:
        yield handle
    finally:
        stop()
        thread.join(30)
