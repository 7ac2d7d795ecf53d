"""Starts mock workers in a running event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from overfill.api.tokenizer import Tokenizer
from overfill.kv.wire import add_prefill_to_server
from overfill.request.grammar import Grammars
from overfill.settings.mock import MockDecodeConfig, MockPrefillConfig
from overfill.v1 import common_pb2, decode_pb2_grpc
from services.mock.decode import MockDecode
from services.mock.prefill import MockPrefill
from services.mock.tokens import Script
from services.mock.worker import MockWorker


@asynccontextmanager
async def mock_worker(config: MockPrefillConfig | MockDecodeConfig) -> AsyncIterator[MockWorker]:
    """Yields a worker that serves and has started to join its routers. Cuts its requests off at the end."""
    is_prefill = isinstance(config, MockPrefillConfig)
    worker = MockWorker(config, common_pb2.STAGE_PREFILL if is_prefill else common_pb2.STAGE_DECODE)
    folder = worker.pair.full_path
    tokenizer = Tokenizer.load(folder)
    vocab = worker.pair.full_config.vocab_size
    grammars = Grammars(folder / "tokenizer.json", vocab, tokenizer.eos_token_ids)
    script = Script(tokenizer, config.mock_answer, config.mock_answer_tokens, grammars)
    decode: MockDecode | None = None
    try:
        if isinstance(config, MockPrefillConfig):
            prefill = MockPrefill(config, script)
            await worker.start(prefill, add_prefill_to_server, "overfill.v1.Prefill")
        else:
            decode = MockDecode(config, script)
            await worker.start(decode, decode_pb2_grpc.add_DecodeServicer_to_server, "overfill.v1.Decode")
        yield worker
    finally:
        await worker.stop()
        if decode is not None:
            await decode.close()


async def serve(config: MockPrefillConfig | MockDecodeConfig, on_ready: Callable[[MockWorker], object]) -> None:
    """Serves until drained. Calls ``on_ready`` once the worker serves."""
    async with mock_worker(config) as worker:
        on_ready(worker)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                while not worker.draining:  # noqa: ASYNC110  # drained by a signal or a call
                    await asyncio.sleep(0.05)
                limit.reschedule(loop.time() + config.grace_period)
                await worker.drained.wait()
        except TimeoutError:
            logging.warning("the grace period is over; exiting with unfinished requests")
