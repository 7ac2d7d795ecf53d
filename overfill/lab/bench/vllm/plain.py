"""An engine of plain vLLM, and the process in which it runs. It knows nothing of pairs, workers and handoffs."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from overfill.lab.bench.vllm.window import STARTED, DecodeWindow, decode_window
from overfill.lab.cpu_clock import cpu_seconds, family


class PlainVllm:
    """vLLM's ``AsyncLLM``, whose core is in a process of its own."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._ids = map(str, itertools.count())
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._processes = family(os.getpid())

    async def decode(self, prompts: list[list[int]], max_tokens: int, steps: int) -> DecodeWindow:
        streams = [self._stream(prompt, max_tokens) for prompt in prompts]
        return await decode_window(streams, steps, lambda: {"worker": cpu_seconds(*self._processes)})

    async def answer(self, prompt: list[int], max_tokens: int) -> list[float]:
        start, times = time.perf_counter(), list[float]()
        async for count in self._stream(prompt, max_tokens):
            times += [time.perf_counter() - start] * (count - len(times))
        return times

    def close(self) -> None:
        self._engine.shutdown()

    async def _stream(self, prompt: Sequence[int], max_tokens: int) -> AsyncGenerator[int, None]:
        count = 0
        async for output in self._engine.generate(*_request(prompt, max_tokens), next(self._ids)):
            count += len(output.outputs[0].token_ids)
            yield count


class InProcessVllm:
    """vLLM's synchronous engine, which this process steps. It only decodes."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))

    async def decode(self, prompts: list[list[int]], max_tokens: int, steps: int) -> DecodeWindow:
        counts = {str(index): 0 for index in range(len(prompts))}
        for id, prompt in zip(counts, prompts, strict=True):
            self._engine.add_request(id, *_request(prompt, max_tokens))
        while min(counts.values()) < STARTED:
            self._step(counts)
        before, start, cpu = [*counts.values()], time.perf_counter(), {"thread": time.thread_time()}
        for _ in range(steps):
            self._step(counts)
        cpus, seconds = (cpu, {"thread": time.thread_time()}), time.perf_counter() - start
        found = DecodeWindow.between(before, [*counts.values()], seconds, cpus)
        self._engine.abort_request([*counts])
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return found

    def close(self) -> None:
        pass  # the engine ends with this process

    def _step(self, counts: dict[str, int]) -> None:
        for output in self._engine.step():
            counts[output.request_id] += len(output.outputs[0].token_ids)


def _request(prompt: Sequence[int], max_tokens: int) -> tuple[Any, Any]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.DELTA
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=kind)
    return TokensPrompt(prompt_token_ids=list(prompt)), sampling


def serve(pipe: Connection, log: Path, environment: Mapping[str, str]) -> None:
    """Carries out what the pipe asks for, until its other end is closed. The log gets all that vLLM prints.

    The first request is a class and the engine's arguments, further ones a method's name and its arguments. Each is
    answered by a pair of a result and an error's text, one of which is None.
    """
    os.environ.clear()
    os.environ.update(environment)  # before vLLM and torch are imported
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    asyncio.run(_serve(pipe))


async def _serve(pipe: Connection) -> None:
    engine: Any = None
    with suppress(EOFError), ExitStack() as opened:
        while True:
            what, *arguments = await asyncio.to_thread(pipe.recv)
            result, error = None, None
            try:
                if engine is None:
                    engine = what(*arguments)
                    opened.callback(engine.close)
                else:
                    result = await getattr(engine, what)(*arguments)
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"
            pipe.send((result, error))
