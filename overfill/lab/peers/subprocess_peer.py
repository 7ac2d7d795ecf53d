"""A script that runs vLLM in an environment of its own, driven by JSON lines on stdin.

It imports nothing of overfill, which is not installed there. Each line on stdin is a request; each line on stdout is
its answer::

    {"op": "load", "vocab_size", ...}                   -> {}
    {"op": "begin", "batch", "prompt_tokens", "steps"}  -> {}
    {"op": "steps", "count"}                            -> {"seconds": [...]}
    {"op": "end"}                                       -> {}
    {"op": "prefill", "lengths"}                        -> {"seconds"}

or ``{"error": ...}``. The engine's own output goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any


class Vllm:
    """vLLM's engine in this process, with a checkpoint folder."""

    def __init__(
        self,
        model: str,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        kv_bytes: int,
        dtype: str,
        context: int,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_KVCACHE_SPACE=str(max(1, -(-kv_bytes // 2**30))),
            VLLM_LOGGING_LEVEL="ERROR",
            VLLM_NO_USAGE_STATS="1",
        )
        import vllm

        self._vllm = vllm
        self._engine = vllm.LLM(
            model,
            dtype=dtype,
            max_model_len=context,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(max_num_batched_tokens, context),
            enable_prefix_caching=False,
            disable_log_stats=True,
            **(engine_args or {}),
        ).llm_engine
        self._seen: dict[int, int] = {}

    def add(self, id: int, prompt: list[int], max_tokens: int) -> None:
        from vllm.inputs import TokensPrompt

        sampling = self._vllm.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(id), TokensPrompt(prompt_token_ids=prompt), sampling)
        self._seen[id] = 0

    def step(self) -> dict[int, int]:
        new_tokens: dict[int, int] = {}
        for output in self._engine.step():
            id, length = int(output.request_id), len(output.outputs[0].token_ids)
            if id in self._seen:
                new_tokens[id] = length - self._seen[id]
                self._seen[id] = length
        return new_tokens

    def drop(self, ids: list[int]) -> None:
        self._engine.abort_request([str(id) for id in ids])
        for id in ids:
            del self._seen[id]
        while not self._seen and self._engine.has_unfinished_requests():
            self._engine.step()


class Peer:
    """Executes the requests of the protocol above with one engine.

    An engine has three methods: ``add(id, prompt, max_tokens)``; ``step()``, which returns the number of new tokens by
    request id; and ``drop(ids)``, which removes requests, finished or not.
    """

    def __init__(self, new_engine: Callable[..., Any]) -> None:
        self._new_engine = new_engine
        self._engine: Any = None
        self._vocab_size = 0
        self._running: list[int] = []
        self._next_id = 0

    def load(self, vocab_size: int, **options: Any) -> dict[str, Any]:
        self._vocab_size = vocab_size
        self._engine = self._new_engine(**options)
        return {}

    def begin(self, batch: int, prompt_tokens: int, steps: int) -> dict[str, Any]:
        # More tokens than are measured, so that no sequence ends during the measurement, nor while others begin.
        self._add([prompt_tokens] * batch, steps + batch + 8)
        waiting = set(self._running)
        while waiting:
            waiting -= self._engine.step().keys()
        return {}

    def steps(self, count: int) -> dict[str, Any]:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self._until(len(self._running))
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def end(self) -> dict[str, Any]:
        self._engine.drop(self._running)
        self._running = []
        return {}

    def prefill(self, lengths: list[int]) -> dict[str, Any]:
        start = time.perf_counter()
        self._add(lengths, 1)
        self._until(len(lengths))
        seconds = time.perf_counter() - start
        self.end()
        return {"seconds": seconds}

    def _add(self, lengths: list[int], max_tokens: int) -> None:
        for length in lengths:
            # Every prompt is different, so that no engine can reuse KV between them.
            prompt = [random.randrange(self._vocab_size) for _ in range(length)]
            self._engine.add(self._next_id, prompt, max_tokens)
            self._running.append(self._next_id)
            self._next_id += 1

    def _until(self, tokens: int) -> None:
        while tokens > 0:
            tokens -= sum(self._engine.step().values())


def main(new_engine: Callable[..., Any] = Vllm) -> None:
    # Engines print to stdout, which is for answers only: keep a copy of it, and redirect stdout to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = Peer(new_engine)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(peer, request.pop("op"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        with contextlib.suppress(BrokenPipeError):
            answers.flush()


if __name__ == "__main__":
    main()
