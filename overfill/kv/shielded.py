"""Awaiting work to its end despite cancellation. Blocks may be released only when no thread touches them any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def shielded(work: Awaitable[T]) -> T:
    """Awaits ``work`` and returns its result. Unlike ``asyncio.shield``, does not return before ``work`` has ended.

    If this task is cancelled meanwhile, once or several times, CancelledError is raised after ``work`` has ended.
    """
    future = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    try:
        return await asyncio.shield(future)  # the common case, and the cheapest way
    except asyncio.CancelledError as error:
        if future.done():
            raise
        cancelled = error
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # marks the exception as retrieved, so that asyncio does not log it
        raise cancelled
    return future.result()
