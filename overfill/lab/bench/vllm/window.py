"""Counts the tokens of concurrent sequences while all of them decode. Knows neither stacks nor vLLM."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Self

from overfill.errors import InternalError

STARTED = 2
"""Tokens after which a sequence decodes: the first one may come from a prefill elsewhere."""

CpuTimes = Mapping[str, float]
"""Name -> CPU seconds so far: ``worker`` of the processes that compute, ``router``, and ``thread`` of the engine's
thread."""


@dataclass(frozen=True, slots=True)
class DecodeWindow:
    """What arrived while all sequences decoded.

    Attributes:
        rows: Number of sequences.
        before: Mean tokens of a sequence before the window.
        tokens: Tokens of all sequences in the window.
        seconds: Length of the window.
        cpu: CPU seconds in the window, by name.
    """

    rows: int
    before: float
    tokens: int
    seconds: float
    cpu: CpuTimes

    @classmethod
    def between(cls, before: Sequence[int], after: Sequence[int], seconds: float, cpus: tuple[CpuTimes, ...]) -> Self:
        """The window between two counts of the tokens of each sequence, and between two readings of CPU times."""
        before_window, after_window = cpus
        # Without threads that have ended in the window.
        spent = {name: after_window[name] - at for name, at in before_window.items() if name in after_window}
        return cls(len(before), sum(before) / len(before), sum(after) - sum(before), seconds, spent)

    @property
    def steps(self) -> int:
        """Steps of the engine; each one brings every sequence a token."""
        return self.tokens // self.rows

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def cpu_ms(self, name: str) -> float:
        """CPU milliseconds per token."""
        return 1e3 * self.cpu[name] / self.tokens


async def decode_window(
    streams: Sequence[AsyncGenerator[int, None]],
    steps: int,
    cpu: Callable[[], CpuTimes],
    *,
    seconds: float = 0.0,
    most: int = 0,
) -> DecodeWindow:
    """Runs ``streams`` until each has brought ``steps`` tokens while all decode, then closes them.

    Args:
        streams: Each yields, with every message, the number of tokens received so far.
        cpu: Returns the CPU times so far.
        seconds: Minimum length of the window, unless a stream has brought ``most`` tokens.

    Raises:
        InternalError: A sequence ended before.
    """
    counts, goals = [0] * len(streams), [STARTED] * len(streams)
    waiting = set(range(len(streams)))  # those below their goals; a comparison of all would cost too much per message
    begun: tuple[list[int], float, CpuTimes] | None = None
    window: asyncio.Future[DecodeWindow] = asyncio.get_running_loop().create_future()

    def arrived(index: int) -> None:
        nonlocal begun
        if counts[index] >= goals[index]:
            waiting.discard(index)
        if waiting or window.done():
            return
        if begun is None:
            begun = counts.copy(), time.perf_counter(), cpu()
            goals[:] = [count + steps for count in counts]
            waiting.update(range(len(streams)))
            return
        before, started, cpu_before = begun
        passed = time.perf_counter() - started
        if passed >= seconds or counts[index] >= most:
            window.set_result(DecodeWindow.between(before, counts, passed, (cpu_before, cpu())))

    async def read(index: int) -> None:
        async with aclosing(streams[index]) as stream:
            async for counts[index] in stream:
                arrived(index)
        raise InternalError(f"a sequence ended after {counts[index]} tokens, before all had decoded {steps} together")

    readers: list[asyncio.Future[Any]] = [asyncio.ensure_future(read(index)) for index in range(len(streams))]
    try:
        await asyncio.wait({window, *readers}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for reader in readers:
            reader.cancel()
        ended = await asyncio.gather(*readers, return_exceptions=True)
    if not window.done():
        raise next(error for error in ended if isinstance(error, Exception))
    return window.result()
