"""Waiting that cancellation does not cut short: a block may only be freed when nothing touches it any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def shielded(work: Awaitable[T]) -> T:
    """The result of ``work``, which is never cancelled from here.

    When this task is cancelled meanwhile, however often, that takes effect once ``work`` has ended.
    """
    future = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    try:
        return await asyncio.shield(future)  # the common case, which costs least
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
            future.exception()  # looked at, so that asyncio does not report it as lost
        raise cancelled
    return future.result()
