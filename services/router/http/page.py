"""Serves ``/ui``: one page with inline style and script, which sends requests to this endpoint only."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

_FILES = files("services.router.http") / "ui"


@cache
def page() -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
    """Returns the page, and headers that let the browser run only its script and reach only this endpoint.

    The page needs no key: it has no data, and asks the user for the key.
    """
    style, script = ((_FILES / name).read_text(encoding="utf-8") for name in ("style.css", "app.js"))
    html = (_FILES / "index.html").read_text(encoding="utf-8")
    html = html.replace("/* style */", style).replace("/* script */", script)
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), (
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache"),
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
