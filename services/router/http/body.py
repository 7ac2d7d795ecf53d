"""Reads request bodies within limits of size and time."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from overfill.api.openai.errors import not_json, too_large, too_slow
from overfill.api.openai.parse import parse
from services.router.bounded_executor import BoundedExecutor
from services.router.http.connection import Connection

R = TypeVar("R", bound=BaseModel)

BODY_TIMEOUT = 30.0
"""Seconds for a whole body to arrive."""

_LONG = 64 << 10
"""Size in bytes from which on a body is parsed in a thread, so that it does not delay other streams."""

_DISCARDED = 64 << 20
"""Maximum number of bytes of a refused body that are read and discarded: a client reads no answer while it sends."""


async def read(request: Request, kind: type[R], limit: int, executor: BoundedExecutor) -> R:
    """Reads the request's JSON as a ``kind``.

    Args:
        executor: threads in which long bodies are parsed.

    Raises:
        Overloaded: too many long requests wait for a thread.
        ApiError: the body is too large, too slow, not JSON, or not a valid ``kind``.
        ClientDisconnect: the client has disconnected.
    """
    # Blocks cross-site requests: a page of another site can send application/json only after a CORS preflight.
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise not_json(content_type)
    connection: Connection = request.scope["overfill.connection"]
    body = connection.take_body()
    if body is None:
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                body = await _bytes(request, limit)
        except TimeoutError:
            raise too_slow() from None
    if len(body) > limit:
        raise too_large(limit)
    return parse(kind, body) if len(body) < _LONG else await executor.run(len(body), parse, kind, body)


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
