"""A script that runs another engine in the engine's own environment, driven by JSON lines on stdin.

It imports nothing of overfill, which is not installed there. Each line on stdin is a request; each line on stdout is
its answer::

    {"op": "load", "vocab_size", ...}                   -> {"version"}
    {"op": "begin", "batch", "prompt_tokens", "steps"}  -> {}
    {"op": "steps", "count"}                            -> {"seconds": [...]}
    {"op": "end"}                                       -> {}
    {"op": "prefill", "lengths"}                        -> {"seconds"}
    {"op": "serve", "requests": [[due, prompt, max_tokens], ...]} -> {"times": [[...], ...]}

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


class OpenVino:
    """OpenVINO GenAI's continuous batching pipeline, with a GGUF file."""

    def __init__(
        self, model: str, threads: int, max_num_seqs: int, max_num_batched_tokens: int, kv_bytes: int, **_: Any
    ) -> None:
        import numpy
        import openvino
        import openvino_genai

        self._tensor: Callable[[list[int]], Any] = lambda ids: openvino.Tensor(numpy.array([ids], dtype=numpy.int64))
        self._genai = openvino_genai
        self.version = openvino_genai.get_version()
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = max_num_seqs
        scheduler.max_num_batched_tokens = max_num_batched_tokens
        scheduler.cache_size = max(1, -(-kv_bytes // 2**30))  # GiB
        scheduler.enable_prefix_caching = False
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler_config=scheduler, device="CPU", properties={"INFERENCE_NUM_THREADS": threads}
        )
        self._handles: dict[int, Any] = {}

    def add(self, id: int, prompt: list[int], max_tokens: int) -> None:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        self._handles[id] = self._pipeline.add_request(id, self._tensor(prompt), config)

    def step(self) -> dict[int, int]:
        self._pipeline.step()
        new_tokens: dict[int, int] = {}
        for id, handle in self._handles.items():
            while handle.can_read():
                new_tokens[id] = new_tokens.get(id, 0) + sum(
                    len(output.generated_ids) for output in handle.read().values()
                )
        return new_tokens

    def drop(self, ids: list[int]) -> None:
        for id in ids:
            self._handles.pop(id).cancel()
        while not self._handles and self._pipeline.has_non_finished_requests():
            self._pipeline.step()


class Vllm:
    """vLLM's engine in this process, with a checkpoint folder."""

    def __init__(
        self,
        model: str,
        threads: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        kv_bytes: int,
        dtype: str,
        context: int,
    ) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_KVCACHE_SPACE=str(max(1, -(-kv_bytes // 2**30))),
            VLLM_LOGGING_LEVEL="ERROR",
            VLLM_NO_USAGE_STATS="1",
        )
        import vllm

        self._vllm = vllm
        self.version = vllm.__version__
        self._engine = vllm.LLM(
            model,
            dtype=dtype,
            max_model_len=context,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(max_num_batched_tokens, context),
            enable_prefix_caching=False,
            disable_log_stats=True,
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


ENGINES: dict[str, Callable[..., Any]] = {"openvino": OpenVino, "vllm": Vllm}


class Peer:
    """Executes the requests of the protocol above with one engine.

    An engine has three methods: ``add(id, prompt, max_tokens)``; ``step()``, which returns the number of new tokens by
    request id; and ``drop(ids)``, which removes requests, finished or not.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._engine: Any = None
        self._vocab_size = 0
        self._running: list[int] = []
        self._next_id = 0

    def load(self, vocab_size: int, **options: Any) -> dict[str, Any]:
        self._vocab_size = vocab_size
        self._engine = ENGINES[self._kind](**options)
        return {"version": self._engine.version}

    def begin(self, batch: int, prompt_tokens: int, steps: int) -> dict[str, Any]:
        # More tokens than are measured, so that no sequence ends during the measurement.
        self._add([prompt_tokens] * batch, steps + 8)
        self._until(batch)
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

    def serve(self, requests: list[tuple[float, list[int], int]]) -> dict[str, Any]:
        """Adds each request when it is due, between two steps.

        Returns when the tokens of each request arrived, in seconds since the start.
        """
        waiting = sorted(range(len(requests)), key=lambda i: requests[i][0], reverse=True)
        times: list[list[float]] = [[] for _ in requests]
        indices: dict[int, int] = {}
        start = time.perf_counter()
        while waiting or indices:
            while waiting and requests[waiting[-1]][0] <= time.perf_counter() - start:
                index = waiting.pop()
                indices[self._new(*requests[index][1:])] = index
            if not indices:
                time.sleep(max(0.0, requests[waiting[-1]][0] - (time.perf_counter() - start)))
                continue
            new_tokens = self._engine.step()
            now = time.perf_counter() - start
            for id, count in new_tokens.items():
                index = indices[id]
                times[index] += [now] * count
                if len(times[index]) >= requests[index][2]:
                    self._engine.drop([id])
                    del indices[id]
        return {"times": times}

    def _add(self, lengths: list[int], max_tokens: int) -> None:
        for length in lengths:
            # Every prompt is different, so that no engine can reuse KV between them.
            prompt = [random.randrange(self._vocab_size) for _ in range(length)]
            self._running.append(self._new(prompt, max_tokens))

    def _new(self, prompt: list[int], max_tokens: int) -> int:
        id = self._next_id
        self._next_id += 1
        self._engine.add(id, prompt, max_tokens)
        return id

    def _until(self, tokens: int) -> None:
        while tokens > 0:
            tokens -= sum(self._engine.step().values())


def main() -> None:
    # Engines print to stdout, which is for answers only: keep a copy of it, and redirect stdout to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = Peer(sys.argv[1])
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
