"""A router with mock workers in a thread: a fast stack without torch, for tests of the router's interfaces."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass

from overfill.settings.config import RouterConfig
from overfill.settings.mock import MockColocatedConfig, MockDecodeConfig, MockPrefillConfig
from services.mock.running import MockRun, mock_worker
from services.router.app import Router

SECRET = "the secret of a mock stack"
"""With API keys, what its processes show each other."""


@dataclass
class MockStack:
    """A running stack: ``grpc`` is host:port, ``url`` the HTTP endpoint's base; ``workers`` are those that decode."""

    grpc: str
    url: str
    router: Router
    loop: asyncio.AbstractEventLoop
    workers: dict[str, MockRun]

    def call(self, coroutine, timeout=30):
        """Runs ``coroutine`` in the stack's event loop; returns its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)


def _flags(settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]


@contextmanager
def mock_stack(
    pair,
    *,
    prefill=1,
    decode=1,
    colocated=0,
    workers=None,
    prefill_settings=None,
    decode_settings=None,
    tiers=None,
    **router,
):
    """Yields a ready MockStack.

    Args:
        colocated: number of workers with both stages, ``worker-0`` and so on, beside ``prefill`` and ``decode``.
        tiers: pair of each tier by name. Each tier has one decode worker, ``decode-TIER-0``; ``pair`` is for prefill.
        decode_settings: flags of every worker that decodes; with ``tiers``, flags by tier.
        workers: flags of every mock worker.
        router: the router's flags.
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
            "expect_prefill": prefill + colocated,
            "expect_decode": decode + colocated,
        }
        decoders = [(f"decode-{index}", decode_settings or {}) for index in range(decode)]
        if tiers is not None:
            flags = flags | {"pair": None, "tiers": ";".join(f"{name}={folder}" for name, folder in tiers.items())}
            decoders = [
                (f"decode-{name}-0", {"tier": name, "pair": folder} | (decode_settings or {}).get(name, {}))
                for name, folder in tiers.items()
            ]
        app = Router(RouterConfig.parse(_flags(flags | secret | router)))
        address = await app.start()
        serving = asyncio.create_task(app.run())
        running: dict[str, MockRun] = {}
        async with AsyncExitStack() as stack:
            common = {"pair": pair, "routers": address} | secret | (workers or {})
            for index in range(prefill):
                settings = common | {"worker_id": f"prefill-{index}"} | (prefill_settings or {})
                await stack.enter_async_context(mock_worker(MockPrefillConfig.parse(_flags(settings))))
            for worker_id, own in decoders:
                settings = common | {"worker_id": worker_id} | own
                running[worker_id] = await stack.enter_async_context(
                    mock_worker(MockDecodeConfig.parse(_flags(settings)))
                )
            for index in range(colocated):
                settings = common | {"worker_id": f"worker-{index}"} | (decode_settings or {})
                running[f"worker-{index}"] = await stack.enter_async_context(
                    mock_worker(MockColocatedConfig.parse(_flags(settings)))
                )
            members = prefill + len(decoders) + 2 * colocated
            while sum(worker.report is not None for worker in app.roster.workers()) < members:
                await asyncio.sleep(0.01)
            handle = MockStack(address, f"http://{app.http_address}", app, loop, running)
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
