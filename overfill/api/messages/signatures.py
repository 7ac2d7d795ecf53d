"""Signatures of thinking blocks. If a client does not want to see the reasoning, the signature carries it.

Clients send blocks back unchanged, so that the model finds its reasoning in the next turn. The router stores nothing.
"""

from __future__ import annotations

import base64
import binascii

_MARK = b"overfill"


def signature(hidden: str = "") -> str:
    """Returns a signature that carries the text ``hidden``."""
    return base64.b64encode(_MARK + hidden.encode()).decode()


def hidden_text(signature: str) -> str:
    """Returns the text that a signature carries; empty for one of another server."""
    try:
        data = base64.b64decode(signature, validate=True)
        return data.removeprefix(_MARK).decode() if data.startswith(_MARK) else ""
    except (binascii.Error, ValueError):
        return ""
