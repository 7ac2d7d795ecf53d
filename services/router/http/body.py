"""Reads the JSON of a request, and parses it without delaying other requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from overfill.api.openai.errors import not_json
from overfill.api.openai.parse import check_items, parse
from overfill.api.openai.schema import Strict
from services.router.bounded_executor import BoundedExecutor
from services.router.http.request import Request

B = TypeVar("B", bound=Strict)
T = TypeVar("T")

_LONG = 64 << 10
"""Size in bytes from which on a body is parsed in a thread, so that it does not delay other streams."""


async def read(request: Request, kind: type[B], convert: Callable[[B], T], parser: BoundedExecutor) -> T:
    """Reads the request's JSON as a ``kind``, and returns what ``convert`` makes of it.

    Args:
        parser: one thread, in which long bodies are parsed and converted. Parsing holds the interpreter's lock, so
            that with several threads the event loop would wait for each of them.

    Raises:
        Overloaded: too many long bodies are received or wait for the thread.
        ApiError: the body is too large, too slow, not JSON, or not a valid ``kind``; or one of ``convert``.
    """
    # Blocks cross-site requests: a page of another site can send application/json only after a CORS preflight.
    content_type = request.header(b"content-type")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise not_json(content_type)
    body = await request.body()
    if len(body) < _LONG:
        return convert(parse(kind, body))
    return await parser.run(len(body), _parse_long, kind, body, convert)


def _parse_long(kind: type[B], body: bytes, convert: Callable[[B], T]) -> T:
    check_items(body, kind.ITEMS)
    return convert(parse(kind, body))
