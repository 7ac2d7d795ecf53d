"""The session of a client to which a request belongs, by what agents send.

A session decides which worker is tried first and which request of a key goes next. It gives access to nothing, so a
client may name any.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable

from overfill.request.params import REQUEST_ID_CHARACTERS

MAX_SESSION_LENGTH = 128

HEADERS = (
    b"x-claude-code-session-id",  # Claude Code; its subagents send the same
    b"session-id",  # Codex; its subagents send the same
    b"session_id",  # Codex before 2026
    b"x-parent-session-id",  # opencode's subagents: the session that started them
    b"x-session-id",  # opencode
)
"""Headers with a session, the first that is sent counts. A subagent belongs to the session that has started it."""

_MAX_USER_ID = 4096
"""Characters of a user id in JSON. Reading more would delay other requests."""

_NAME = re.compile(f"{REQUEST_ID_CHARACTERS}{{1,{MAX_SESSION_LENGTH}}}")
_IN_USER_ID = re.compile(r"_session_([0-9a-f-]{36})$")


def session_name(text: str) -> str:
    """Returns ``text`` if it may be the name of a session, empty included, and otherwise a digest of it."""
    if not text or _NAME.fullmatch(text):
        return text
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def session_of(header: Callable[[bytes], str], named: str | None) -> str:
    """Returns the name of a request's session; empty without one.

    Args:
        header: returns the value of a header, empty without it.
        named: what the body names: its ``prompt_cache_key``, ``session_id`` or ``session_of_user``.
    """
    return session_name(next(filter(None, map(header, HEADERS)), named or ""))


def session_of_user(user_id: str) -> str:
    """Returns the session in the Messages API's ``metadata.user_id``, if Claude Code has written it; else all of it."""
    if found := _IN_USER_ID.search(user_id):  # Claude Code before 2026
        return found[1]
    if user_id.startswith("{") and len(user_id) <= _MAX_USER_ID:
        try:
            fields = json.loads(user_id)
        except (ValueError, RecursionError):
            return user_id
        if isinstance(fields, dict) and isinstance(session := fields.get("session_id"), str) and session:
            return session
    return user_id
