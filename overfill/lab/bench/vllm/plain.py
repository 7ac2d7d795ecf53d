"""A process with one plain vLLM engine, driven by JSON lines on stdin. It knows nothing of pairs, workers and handoffs.

Each line on stdin is a request; each line on stdout is its answer::

    {"op": "load", "in_process", "arguments": {...}}                 -> {}
    {"op": "decode", "prompts": [[...], ...], "max_tokens", "steps"} -> the fields of ``DecodeWindow``
    {"op": "answer", "prompt": [...], "max_tokens"}                  -> {"times": [...]}

or ``{"error": ...}``. vLLM's own output goes to stderr. With ``in_process`` the engine is vLLM's synchronous one, which
this process steps. Otherwise it is ``AsyncLLM``, whose core is in a process of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import psutil

from overfill.lab.bench.vllm.window import STARTED, DecodeWindow, decode_window
from overfill.lab.cpu_clock import cpu_seconds


class PlainVllm:
    """Executes the requests of the protocol above with ``AsyncLLM``."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._ids = map(str, itertools.count())
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._processes = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]

    async def decode(self, prompts: list[list[int]], max_tokens: int, steps: int) -> DecodeWindow:
        streams = [self._stream(prompt, max_tokens) for prompt in prompts]
        return await decode_window(streams, steps, lambda: {"worker": sum(map(cpu_seconds, self._processes))})

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
    """vLLM's synchronous engine, which only decodes."""

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


async def _execute(engine: Any, op: str, request: dict[str, Any]) -> dict[str, Any]:
    found = await getattr(engine, op)(**request)
    return asdict(found) if isinstance(found, DecodeWindow) else {"times": found}


async def main() -> None:
    # vLLM may print to stdout, which is for answers only: keep a copy of it, and redirect stdout to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: PlainVllm | InProcessVllm | None = None
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            request, answer = json.loads(line), {}
            try:
                if (op := request.pop("op")) == "load":
                    kind = InProcessVllm if request["in_process"] else PlainVllm
                    engine = kind(request["arguments"])
                else:
                    answer = await _execute(engine, op, request)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        if engine is not None:
            engine.close()


if __name__ == "__main__":
    asyncio.run(main())
