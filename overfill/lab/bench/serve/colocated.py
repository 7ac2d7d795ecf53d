"""Plays a load on both engines in this process, without sockets or a router.

Requests are added between two steps. A token's time is the end of the step that computed it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing

from overfill.engine.offline import OfflineRequest
from overfill.model.steps import SampledToken
from overfill.pair.llm import LLM
from overfill.request.params import SamplingParams

TimedRequest = tuple[float, list[int], int]
"""A request: when it is due (seconds after the start), its prompt, and the number of tokens of its answer."""


def serve_colocated(
    llm: LLM, requests: Sequence[TimedRequest], progress: Callable[[int, int], None] | None = None
) -> list[list[float]]:
    """Plays ``requests``.

    Returns:
        For each request, when each of its tokens was computed, in seconds since the start.

    Raises:
        InvalidRequest: A prompt is empty or too long.
        Overloaded: A request does not fit into the KV cache.
    """
    waiting = sorted(range(len(requests)), key=lambda i: requests[i][0], reverse=True)
    prepared = [
        llm.request(i, prompt, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
        for i, (_, prompt, count) in enumerate(requests)
    ]
    times: list[list[float]] = [[] for _ in requests]
    new_tokens: list[int] = []

    def on_token(request: OfflineRequest, token: SampledToken) -> None:
        new_tokens.append(request.index)

    start = time.perf_counter()
    with closing(llm.run(on_token)) as run:
        while waiting or run.num_unfinished:
            while waiting and requests[waiting[-1]][0] <= time.perf_counter() - start:
                run.add(prepared[waiting.pop()])
            if not run.num_unfinished:
                time.sleep(max(0.0, requests[waiting[-1]][0] - (time.perf_counter() - start)))
                continue
            run.step()
            now = time.perf_counter() - start
            for index in new_tokens:
                times[index].append(now)
            new_tokens.clear()
            if progress is not None:
                progress(len(requests) - len(waiting) - run.num_unfinished, len(requests))
    return times
