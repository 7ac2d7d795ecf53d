"""Serves ``/ui``: one page with inline style and script, which sends requests to this endpoint only."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

_FILES = files("services.router.http") / "ui"


@cache
def page() -> tuple[str, dict[str, str]]:
    """Returns the page, and headers that let the browser run only its script and reach only this endpoint."""
    style, script = ((_FILES / name).read_text(encoding="utf-8") for name in ("style.css", "app.js"))
    html = (_FILES / "index.html").read_text(encoding="utf-8")
    html = html.replace("/* style */", style).replace("/* script */", script)
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


async def show(request: Request) -> Response:
    """Serves the page. It needs no key: the page has no data and asks the user for the key."""
    html, headers = page()
    return Response(html, headers=headers, media_type="text/html")


async def redirect_to_page(request: Request) -> Response:
    """Redirects ``/`` to the page."""
    return RedirectResponse("/ui")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
