"""One process of ours under load: both engines in turn, without sockets or a router. Requests are taken in between
two steps, and a token counts from the end of the step that made it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing

from overfill.engine.colocated import Request
from overfill.model.sampling import SampledToken
from overfill.pair.llm import LLM
from overfill.request.params import SamplingParams

Asked = tuple[float, list[int], int]
"""Seconds after the start at which a request is due, its prompt, and how many tokens it is answered with."""


def serve_colocated(
    llm: LLM, requests: Sequence[Asked], progress: Callable[[int, int], None] | None = None
) -> list[list[float]]:
    """Plays ``requests``; when each one's tokens came, in seconds since the start.

    Raises:
        InvalidRequest: a prompt is empty or too long.
        Overloaded: a request does not fit the KV cache.
    """
    waiting = sorted(range(len(requests)), key=lambda i: requests[i][0], reverse=True)
    made = [
        llm.request(i, prompt, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
        for i, (_, prompt, count) in enumerate(requests)
    ]
    times: list[list[float]] = [[] for _ in requests]
    came: list[int] = []

    def on_token(request: Request, token: SampledToken) -> None:
        came.append(request.index)

    start = time.perf_counter()
    with closing(llm.colocated(on_token)) as engines:
        while waiting or engines.num_unfinished:
            while waiting and requests[waiting[-1]][0] <= time.perf_counter() - start:
                engines.add(made[waiting.pop()])
            if not engines.num_unfinished:
                time.sleep(max(0.0, requests[waiting[-1]][0] - (time.perf_counter() - start)))
                continue
            engines.step()
            now = time.perf_counter() - start
            for index in came:
                times[index].append(now)
            came.clear()
            if progress is not None:
                progress(len(requests) - len(waiting) - engines.num_unfinished, len(requests))
    return times
