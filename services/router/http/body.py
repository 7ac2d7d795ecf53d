"""A request's body: as large as is allowed, as soon as is allowed."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from overfill.api.openai.errors import not_json, too_large, too_slow
from overfill.api.openai.parse import parse

R = TypeVar("R", bound=BaseModel)

BODY_TIMEOUT = 30.0
"""Seconds for a whole body to arrive."""

_LONG = 64 << 10
"""Bytes from which on a body is parsed in a thread, so that the streams of others go on meanwhile."""

_DISCARDED = 64 << 20
"""Bytes of a refused body that are read all the same: a client that is still sending would not see the answer."""


async def read(request: Request, kind: type[R], limit: int) -> R:
    """The request's JSON as ``kind``.

    Raises:
        ApiError: it is too large, too slow, not JSON or not what ``kind`` wants.
        ClientDisconnect: the client has gone.
    """
    # What a page of another site can have a browser send without being asked has another type, or none.
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise not_json(content_type)
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            body = await _bytes(request, limit)
            return parse(kind, body) if len(body) < _LONG else await asyncio.to_thread(parse, kind, body)
    except TimeoutError:
        raise too_slow() from None


async def _bytes(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > _DISCARDED:
        raise too_large(limit)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > _DISCARDED:
            break
        else:
            parts.clear()
    if size > limit:
        raise too_large(limit)
    return b"".join(parts)
