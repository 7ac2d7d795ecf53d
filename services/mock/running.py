"""Starts mock workers in a running event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from overfill.api.tokenizer import Tokenizer
from overfill.request.grammar import Grammars
from overfill.rpc.worker import WorkerHost
from overfill.settings.mock import MockColocatedConfig, MockDecodeConfig, MockPrefillConfig
from services.mock.decode import MockDecode
from services.mock.prefill import MockPrefill
from services.mock.tokens import Script
from services.mock.worker import MockWorker, Stage

MockConfig = MockPrefillConfig | MockDecodeConfig | MockColocatedConfig


@asynccontextmanager
async def mock_worker(config: MockConfig) -> AsyncIterator[MockRun]:
    """Yields a worker that serves and has started to join its routers. Cuts its requests off at the end."""
    ready = asyncio.Event()
    run = MockRun(asyncio.create_task(serve(config, lambda host: ready.set())))
    waiting = asyncio.create_task(ready.wait())
    try:
        await asyncio.wait({run.serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if run.serving.done():
            run.serving.result()
        yield run
    finally:
        waiting.cancel()
        await run.stop()


class MockRun:
    """A mock worker that serves in a task."""

    def __init__(self, serving: asyncio.Task[int]) -> None:
        self.serving = serving

    async def stop(self) -> None:
        """Leaves the routers and stops. Running requests are cut off."""
        self.serving.cancel()
        await asyncio.wait({self.serving})


async def serve(config: MockConfig, on_ready: Callable[[WorkerHost], object]) -> int:
    """Serves until drained and returns the exit code. Calls ``on_ready`` once the worker serves."""
    worker = MockWorker(config)
    folder = worker.pair.full_path
    tokenizer = Tokenizer.load(folder)
    vocab = worker.pair.full_config.vocab_size
    grammars = Grammars(folder / "tokenizer.json", vocab, tokenizer.eos_token_ids, config.grammar_limits())
    script = Script(tokenizer, config.mock_answer, config.mock_answer_tokens, grammars)
    stages: list[Stage] = []
    beside = None
    if not isinstance(config, MockDecodeConfig):
        prefill = MockPrefill(config, script, worker)
        stages.append(prefill)
        beside = prefill.metrics
    if not isinstance(config, MockPrefillConfig):
        stages.append(MockDecode(config, script, worker, beside))
    try:
        return await worker.serve(stages, on_ready)
    finally:
        grammars.close()
