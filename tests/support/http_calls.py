"""HTTP requests of tests: any status is an answer, and no redirect is followed."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from contextlib import closing
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Reply(NamedTuple):
    """An answer; the names of its headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


def call(url: str, body: Any = None, headers: Mapping[str, str] | None = None, method: str = "") -> Reply:
    """Makes a request, a POST if it has a ``body``: bytes, or what is sent as JSON."""
    place = urlsplit(url)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    kind = {} if body is None else {"content-type": "application/json"}
    with closing(http.client.HTTPConnection(place.netloc, timeout=60)) as connection:
        path = url.partition(place.netloc)[2] or "/"
        connection.request(method or ("GET" if body is None else "POST"), path, data, kind | dict(headers or {}))
        answer = connection.getresponse()
        return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())


def bearer(key: str) -> dict[str, str]:
    """The header that shows an API key."""
    return {"authorization": f"Bearer {key}"}


def num_held(url: str) -> int:
    """The number of requests that the router at ``url`` and the workers of both stages have."""
    status = json.loads(call(f"{url}/status").body)
    return sum(place["running"] + place["waiting"] for place in (status, *status["workers"]))
