"""The head of a request, as it arrives: its target, its headers, and what a valid one may say. Knows no sockets."""

from __future__ import annotations

import re
import secrets
from typing import Any

import httptools

from overfill.api.messages.errors import error_body, is_anthropic
from overfill.api.openai.errors import ApiError, wrong_method

MAX_HEAD = 64 << 10
"""Maximum size of a request's head in bytes. It is also that of a body's trailers, and of one chunk's extensions."""

MAX_TARGET = 16 << 10
"""Maximum size of a request's target in bytes."""

MAX_HEADERS = 256
"""Maximum number of headers of a request, and of its trailers."""

_SINGLE = frozenset({b"host", b"origin", b"authorization", b"x-api-key"})
"""Headers that decide who may do what. If one stood twice, a proxy might obey one value and this server the other."""

_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|([A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*)(:[0-9]*)?")


class RequestHead:
    """Collects a head, or counts the trailers of a body. Its methods raise ApiError for what the server refuses.

    Attributes:
        headers: values by name in lower case; the values of one name are joined by commas.
    """

    __slots__ = ("_num_headers", "_size", "_target", "headers")

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self._target = b""
        self._size = self._num_headers = 0

    def add_target(self, part: bytes) -> None:
        """Adds a part of the target."""
        self._target += part
        if len(self._target) > MAX_TARGET:
            raise ApiError(414, f"the request target is longer than {MAX_TARGET} bytes")
        self._count(len(part))

    def add_header(self, name: bytes, value: bytes) -> None:
        """Adds a header."""
        self.add_trailer(name, value)
        name, value = name.lower(), value.rstrip(b" \t")  # the parser leaves tabs
        known = self.headers.get(name)
        if known is None:
            self.headers[name] = value
        elif name in _SINGLE:
            raise ApiError(400, f"the request has several headers {name.decode('latin-1')!r}")
        else:
            self.headers[name] = known + b", " + value

    def add_trailer(self, name: bytes, value: bytes) -> None:
        """Counts a header, which nothing may trust."""
        self._num_headers += 1
        self._count(len(name) + len(value) + 4)

    def path(self, method: str, version: str) -> bytes:
        """Returns the path, without the query, of a head that has arrived. ``version`` is such as "1.1"."""
        headers, target = self.headers, self._target
        if version not in ("1.0", "1.1"):
            raise ApiError(505, f"HTTP {version} is not supported; use HTTP/1.1")
        if method == "CONNECT":
            raise wrong_method(method, target.decode("latin-1"))
        if (encoding := headers.get(b"transfer-encoding")) is not None:
            _check_encoding(encoding.lower(), version)
        if version == "1.1" and b"host" not in headers:
            raise ApiError(400, "the request has no Host")
        if b"#" in target:
            raise ApiError(400, "the request target has a fragment")
        if not target.startswith(b"/") and (method, target) != ("OPTIONS", b"*"):
            target = self._path_of_url(target)
        if not _HOST.fullmatch(headers.get(b"host", b"")):
            raise ApiError(400, "the request has an invalid Host")
        return target.partition(b"?")[0]

    def refusal(self, error: ApiError) -> tuple[dict[str, Any], list[tuple[bytes, bytes]]]:
        """Returns the JSON of ``error`` and its headers, for the API that the part of the head so far asks for."""
        if not is_anthropic(self._target.decode("latin-1"), self.headers):
            return error.body, []
        id = f"req_{secrets.token_hex(16)}"
        return error_body(error, id), [(b"request-id", id.encode())]

    def _path_of_url(self, target: bytes) -> bytes:
        """Returns the path of an absolute URL, as clients send it to proxies. Its host becomes that of the request."""
        try:
            url = httptools.parse_url(target)
        except httptools.HttpParserInvalidURLError:
            url = None
        if url is None or url.schema not in (b"http", b"https") or url.userinfo is not None or not url.host:
            raise ApiError(400, "the request target is not a valid URL")
        # RFC 9112, section 3.2.2: this host replaces that of the header.
        host = b"[%b]" % url.host if b":" in url.host else url.host
        self.headers[b"host"] = host if url.port is None else b"%b:%d" % (host, url.port)
        path: bytes = url.path or b"/"
        return path

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > MAX_HEAD or self._num_headers > MAX_HEADERS:
            raise too_large_head()


def too_large_head() -> ApiError:
    """Returns the answer to a head, trailers or the extensions of a chunk above their limits."""
    return ApiError(
        431,
        f"the head of the request is larger than {MAX_HEAD} bytes, or has more than {MAX_HEADERS} headers; "
        "trailers and the extensions of a chunk have the same limits",
    )


def _check_encoding(encoding: bytes, version: str) -> None:
    if version == "1.0":
        raise ApiError(400, "HTTP/1.0 has no transfer-encoding")
    if encoding.rpartition(b",")[2].strip(b" \t") != b"chunked":
        raise ApiError(400, "the last transfer-encoding is not chunked")
    if encoding != b"chunked":
        raise ApiError(501, "the only transfer-encoding that this server supports is chunked")
