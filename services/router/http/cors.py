"""Cross-origin requests of pages: which origins may send them, and what browsers want to hear about it."""

from __future__ import annotations

from collections.abc import Collection

from services.router.http.request import Request

_Headers = list[tuple[bytes, bytes]]

_EXPOSED = b"x-request-id, request-id, x-trace-id, x-overfill-left-out, retry-after"
_MAX_AGE = b"600"  # seconds for which a browser remembers a preflight


class Cors:
    """Answers preflights, and adds the headers that let a page of an allowed origin read a response.

    It never allows credentials: browsers send client certificates and the like for the router's own page only.

    Args:
        origins: allowed origins in lower case; ``*`` allows all. Without any, the browser allows only the own page.
    """

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(origins)
        self._all = "*" in self._origins

    def allows(self, origin: str) -> bool:
        return self._all or origin.lower() in self._origins

    def headers(self, request: Request) -> _Headers:
        """Returns the headers of every response to ``request``."""
        if not self._origins or b"origin" not in request.headers:
            return []
        if self._all:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
        headers = [(b"vary", b"Origin")]
        if self.allows(request.header(b"origin")):
            headers.append((b"access-control-allow-origin", request.headers[b"origin"]))
            headers.append((b"access-control-expose-headers", _EXPOSED))
        return headers

    def preflight(self, request: Request) -> bool:
        """Answers a preflight, which needs no API key. Returns False if it is none, or if no origin is allowed."""
        asked = request.headers.get(b"access-control-request-method")
        if not self._origins or request.method != "OPTIONS" or asked is None or b"origin" not in request.headers:
            return False
        headers: _Headers = [(b"vary", b"Origin"), (b"content-type", b"text/plain; charset=utf-8")]
        allowed = self.allows(request.header(b"origin"))
        refused = [] if allowed else ["origin"]
        if asked not in (b"GET", b"POST"):
            refused.append("method")
        if allowed:
            headers += [
                (b"access-control-allow-origin", b"*" if self._all else request.headers[b"origin"]),
                (b"access-control-allow-methods", b"GET, POST"),
                (b"access-control-allow-headers", request.headers.get(b"access-control-request-headers", b"")),
                (b"access-control-max-age", _MAX_AGE),
            ]
            if request.headers.get(b"access-control-request-private-network") == b"true":
                headers.append((b"access-control-allow-private-network", b"true"))
        if refused:
            request.respond(400, f"not allowed: {', '.join(refused)}\n".encode(), headers)
        else:
            request.respond(200, b"OK", headers)
        return True
