"""Threads for work that would delay other streams: parsing, tokenizing and checking requests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

from overfill.errors import Overloaded
from overfill.kv.shielded import shielded

T = TypeVar("T")

MAX_CALLS = 1024
"""Calls that may run and wait at once."""

MAX_BYTES = 64 << 20
"""Bytes of requests for which calls may run and wait at once. A single call may be for more."""

_THREADS = min(4, os.cpu_count() or 1)  # more would take the interpreter from the event loop more often


class BoundedExecutor:
    """Runs functions in a few threads, and refuses a call when too many or too large ones wait already."""

    def __init__(self, threads: int = _THREADS, max_calls: int = MAX_CALLS, max_bytes: int = MAX_BYTES) -> None:
        self._executor = ThreadPoolExecutor(threads, "request")
        self._max_calls, self._max_bytes = max_calls, max_bytes
        self._calls = self._bytes = 0

    async def run(self, size: int, function: Callable[..., T], *args: object) -> T:
        """Calls ``function`` in a thread and returns its result.

        Nothing can stop a call that has begun. So a cancelled task waits for its end, and what the task holds, such as
        the quota of a key, limits the calls that run.

        Args:
            size: bytes of the request.

        Raises:
            Overloaded: too much waits.
        """
        if self._calls >= self._max_calls or (self._calls and self._bytes + size > self._max_bytes):
            raise Overloaded(
                f"this router prepares {self._calls} requests already, of {self._bytes} bytes together", 1.0,
                "router_busy",
            )  # fmt: skip
        self._calls += 1
        self._bytes += size
        try:
            call = self._executor.submit(copy_context().run, function, *args)
            result = asyncio.wrap_future(call)
            try:
                return await asyncio.shield(result)
            except asyncio.CancelledError:
                if not call.cancel():
                    with suppress(Exception):
                        await shielded(result)
                raise
            finally:
                # A traceback refers to this frame, and its locals must not refer to the exception. Such a circle would
                # hold what the function has made, megabytes for a long request, until the garbage collector runs.
                del call, result
        finally:
            self._calls -= 1
            self._bytes -= size
