"""A router in a thread, with workers on the mock engine: a fast stack without models, for tests of its interfaces."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import services.colocated.main
import services.decode.main
import services.prefill.main
from overfill.engine.mock.options import MockOptions
from overfill.kv.spec import DEFAULT_BLOCK_SIZE
from overfill.model.manifest import Pair
from overfill.settings.config import ColocatedConfig, DecodeConfig, PrefillConfig, RouterConfig
from services.router.app import Router

SECRET = "the secret of a mock stack"
"""With API keys, what its processes show each other."""


_SERVE = {
    PrefillConfig: services.prefill.main.serve,
    DecodeConfig: services.decode.main.serve,
    ColocatedConfig: services.colocated.main.serve,
}


class MockRun:
    """A worker that serves in a task."""

    def __init__(self, serving):
        self.serving = serving

    async def stop(self):
        """Leaves the routers and stops. Running requests are cut off."""
        self.serving.cancel()
        await asyncio.wait({self.serving})


@asynccontextmanager
async def mock_worker(kind, settings):
    """Yields a worker on the mock engine that serves and has started to join its routers.

    Args:
        settings: flags of the worker, arguments of the mock engine by name, and ``kv_blocks``.
    """
    arguments = {"answer_tokens": 1 << 30}  # answers end at max_tokens only
    arguments |= {name: settings[name] for name in settings.keys() & MockOptions.model_fields.keys()}
    flags = {name: value for name, value in settings.items() if name not in arguments}
    if (blocks := flags.pop("kv_blocks", None)) is not None:
        token_bytes = Pair.load(Path(settings["pair"])).full_config.kv_spec("float32").token_bytes
        flags["kv_memory"] = blocks * DEFAULT_BLOCK_SIZE * token_bytes
    flags |= {"engine": "mock", "engine_args": json.dumps(arguments)}
    ready = asyncio.Event()
    run = MockRun(asyncio.create_task(_SERVE[kind](kind.parse(_flags(flags)), lambda host: ready.set())))
    waiting = asyncio.create_task(ready.wait())
    try:
        await asyncio.wait({run.serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if run.serving.done():
            run.serving.result()
        yield run
    finally:
        waiting.cancel()
        await run.stop()


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
    named = {name.replace("_", "-"): value for name, value in settings.items() if value is not None}
    return [
        f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in named.items()
    ]


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
                await stack.enter_async_context(mock_worker(PrefillConfig, settings))
            for worker_id, own in decoders:
                settings = common | {"worker_id": worker_id} | own
                running[worker_id] = await stack.enter_async_context(mock_worker(DecodeConfig, settings))
            for index in range(colocated):
                settings = common | {"worker_id": f"worker-{index}"} | (decode_settings or {})
                running[f"worker-{index}"] = await stack.enter_async_context(mock_worker(ColocatedConfig, settings))
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
