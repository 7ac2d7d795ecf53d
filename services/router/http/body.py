"""Reads the JSON of a request, and parses it without delaying other requests."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel

from overfill.api.openai.errors import not_json
from overfill.api.openai.parse import parse
from services.router.bounded_executor import BoundedExecutor
from services.router.http.request import Request

B = TypeVar("B", bound=BaseModel)

_LONG = 64 << 10
"""Size in bytes from which on a body is parsed in a thread, so that it does not delay other streams."""


async def read(request: Request, kind: type[B], parser: BoundedExecutor) -> B:
    """Reads the request's JSON as a ``kind``.

    Args:
        parser: one thread, in which long bodies are parsed. The parser holds the interpreter's lock for as long as it
            runs, so that several threads would only make the event loop wait for each of them.

    Raises:
        Overloaded: too many long bodies are received or wait for the thread.
        ApiError: the body is too large, too slow, not JSON, or not a valid ``kind``.
    """
    # Blocks cross-site requests: a page of another site can send application/json only after a CORS preflight.
    content_type = request.header(b"content-type")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise not_json(content_type)
    body = await request.body()
    return parse(kind, body) if len(body) < _LONG else await parser.run(len(body), parse, kind, body)
