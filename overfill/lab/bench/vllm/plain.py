"""A process with one plain vLLM engine (``AsyncLLM``), driven by JSON lines on stdin.

It knows nothing of pairs, workers and handoffs. Each line on stdin is a request; each line on stdout is its answer::

    {"op": "load", "arguments": {...}, "whole"}                -> {}
    {"op": "decode", "prompts": [[...], ...], "max_tokens", "steps"} -> the fields of ``DecodeWindow``
    {"op": "answer", "prompt": [...], "max_tokens"}            -> {"times": [...], "cpu"}

or ``{"error": ...}``. vLLM's own output goes to stderr. CPU seconds are those of the process that computes, or, if
``whole``, of this process and all that it has started.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from typing import Any

import psutil

from overfill.lab.cpu_clock import cpu_seconds
from overfill.lab.bench.vllm.window import decode_window


class PlainVllm:
    """Executes the requests of the protocol above."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._ids = itertools.count()
        self._computing: list[int] = []

    async def load(self, arguments: dict[str, Any], whole: bool) -> dict[str, Any]:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        started = psutil.Process().children(recursive=True)
        # On a CPU, vLLM computes in a worker process. The process of the scheduler spins while it waits for the worker.
        workers = [child for child in started if "Worker" in " ".join(child.cmdline())]
        self._computing = [os.getpid(), *(c.pid for c in started)] if whole else [c.pid for c in workers or started]
        return {}

    async def decode(self, prompts: list[list[int]], max_tokens: int, steps: int) -> dict[str, Any]:
        streams = [self._stream(prompt, max_tokens) for prompt in prompts]
        return asdict(await decode_window(streams, steps, self._cpu))

    async def answer(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        before, start = self._cpu(), time.perf_counter()
        times: list[float] = []
        async for count in self._stream(prompt, max_tokens):
            times += [time.perf_counter() - start] * (count - len(times))
        return {"times": times, "cpu": self._cpu() - before}

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()

    def _cpu(self) -> float:
        return sum(map(cpu_seconds, self._computing))

    async def _stream(self, prompt: Sequence[int], max_tokens: int) -> AsyncGenerator[int, None]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        count = 0
        async for output in self._engine.generate(
            TokensPrompt(prompt_token_ids=list(prompt)), sampling, str(next(self._ids))
        ):
            count += len(output.outputs[0].token_ids)
            yield count


async def main() -> None:
    # vLLM may print to stdout, which is for answers only: keep a copy of it, and redirect stdout to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    plain = PlainVllm()
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            request = json.loads(line)
            try:
                answer = await getattr(plain, request.pop("op"))(**request)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        plain.close()


if __name__ == "__main__":
    asyncio.run(main())
