"""The text that a custom tool takes, read from the JSON of its arguments as it arrives."""

from __future__ import annotations

import json
import re

_HEAD = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_BODY = re.compile(r'(?:[^"\\]++|\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt]))*+')
_HIGH = re.compile(r"(?<!\\)(?:\\\\)*(\\u[dD][89abAB][0-9a-fA-F]{2})$")
_LONGEST = 64
"""Characters that may wait for more. Other arguments than these are not read to their end."""

_LONE = re.compile("[\ud800-\udfff]")


class InputText:
    """Reads the text of ``{"input": TEXT}``, of which pieces may end inside an escape or between two surrogates."""

    def __init__(self) -> None:
        self._rest = ""  # what cannot be read yet
        self._begun = False
        self._ended = False

    def push(self, piece: str) -> str:
        """Returns the text that is certain after ``piece``, a further part of the arguments."""
        if self._ended:
            return ""
        text = self._rest + piece
        if not self._begun:
            head = _HEAD.match(text)
            if head is None:
                self._rest, self._ended = text, len(text) > _LONGEST
                return ""
            self._begun, text = True, text[head.end() :]
        body = _BODY.match(text)
        assert body is not None  # it may be empty
        known = body[0]
        self._ended = text[len(known) : len(known) + 1] == '"'
        if not self._ended and (high := _HIGH.search(known)) is not None:
            known = known[: high.start(1)]  # its other half may come
        self._rest = text[len(known) :]
        self._ended |= len(self._rest) > _LONGEST
        if "\\" not in known:
            return known
        return _LONE.sub("\ufffd", json.loads(f'"{known}"', strict=False))
