"""Counts the tokens of concurrent streams while all of them decode. Knows neither stacks nor vLLM."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from overfill.errors import InternalError

_STARTED = 2
"""Tokens after which a sequence decodes: the first one may come from a prefill elsewhere."""


@dataclass(frozen=True, slots=True)
class DecodeWindow:
    """What arrived while all sequences decoded.

    Attributes:
        before: Tokens of each sequence before the window.
        tokens: Tokens of all sequences in the window.
        seconds: Length of the window.
        cpu: CPU seconds of the measured process in the window.
    """

    before: tuple[int, ...]
    tokens: int
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds per token."""
        return 1e3 * self.cpu / self.tokens


async def decode_window(
    streams: Sequence[AsyncGenerator[int, None]], steps: int, cpu: Callable[[], float]
) -> DecodeWindow:
    """Runs ``streams`` until each has brought ``steps`` tokens while all decode, then closes them.

    Args:
        streams: Each yields, with every message, the number of tokens received so far.
        cpu: Returns the CPU seconds of the measured process so far.

    Raises:
        InternalError: A sequence ended before.
    """
    counts = [0] * len(streams)
    begun: tuple[list[int], float, float] | None = None
    window: asyncio.Future[DecodeWindow] = asyncio.get_running_loop().create_future()

    def arrived() -> None:
        nonlocal begun
        if begun is None:
            if min(counts) >= _STARTED:
                begun = counts.copy(), time.perf_counter(), cpu()
            return
        before, started, cpu_before = begun
        tokens = [now - then for now, then in zip(counts, before, strict=True)]
        if min(tokens) >= steps and not window.done():
            seconds = time.perf_counter() - started
            window.set_result(DecodeWindow(tuple(before), sum(tokens), seconds, cpu() - cpu_before))

    async def read(index: int) -> None:
        async with aclosing(streams[index]) as stream:
            async for counts[index] in stream:
                arrived()
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
