"""Reasoning that a client sends back without reading it, so that the model finds it in the next turn.

The router stores nothing, so the ``signature`` of a thinking block in the Messages API and the ``encrypted_content``
of a reasoning item in the Responses API carry the text. It is encoded, not encrypted.
"""

from __future__ import annotations

import base64

_MARK = b"overfill"
"""Begins the text before it is encoded, so that this server tells its own from those of other servers."""


def encode_reasoning(text: str = "") -> str:
    """Returns ``text`` in base64, behind a mark of this server."""
    return base64.b64encode(_MARK + text.encode()).decode()


def decode_reasoning(encoded: str) -> str:
    """Returns the text in ``encoded``; empty if another server wrote it, or if it is damaged."""
    try:
        data = base64.b64decode(encoded, validate=True)
        return data.removeprefix(_MARK).decode() if data.startswith(_MARK) else ""
    except ValueError:
        return ""
