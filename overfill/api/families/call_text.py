"""The text of an answer from its first call on, which arrives in pieces, and the parts of calls read from it."""

from __future__ import annotations

import json
import re
from collections.abc import Generator

from overfill.v1.inference_pb2 import ToolCallDelta

Waits = Generator[None, None, None]
"""A function that yields where it needs more text."""
WaitsFor = Generator[None, None, str]

_FIRST_MARKER, _MOST_MARKERS = 0xDC00, 8
_NO_MARKERS = dict.fromkeys(range(_FIRST_MARKER, _FIRST_MARKER + _MOST_MARKERS))

_WORD = re.compile(r"[A-Za-z0-9+.\-]*")
_JSON_WORDS = {"True": "true", "False": "false", "None": "null"}


def marker_character(number: int) -> str:
    """A character that stands for a special token. It is a lone surrogate, to which no tokenizer decodes bytes."""
    return chr(_FIRST_MARKER + number)


def without_markers(text: str) -> str:
    """``text`` without such characters. A grammar allows them only where a format reads them.

    Tokens that a client gives to resume an answer are read before a worker checks them against the grammar.
    """
    return text if text.isascii() else text.translate(_NO_MARKERS)


class CallText:
    """Text that a format reads, and the parts of calls that it has read.

    Attributes:
        calls: number of complete calls.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._rest = ""
        self._parts: list[ToolCallDelta] = []

    def add(self, text: str) -> None:
        """Adds a piece of the answer."""
        self._rest += text

    def taken(self) -> list[ToolCallDelta]:
        """The parts of calls since the last time, without ids."""
        parts, self._parts = self._parts, []
        return parts

    def begin(self, name: str) -> None:
        """Begins a call of ``name``."""
        self._parts.append(ToolCallDelta(index=self.calls, name=without_markers(name)))

    def arguments(self, text: str) -> None:
        """Adds JSON text to the arguments of the call."""
        text = without_markers(text)
        if self._parts and self._parts[-1].index == self.calls and not self._parts[-1].name:
            self._parts[-1].arguments += text
        elif text:
            self._parts.append(ToolCallDelta(index=self.calls, arguments=text))

    def end(self) -> None:
        """Ends the call."""
        self.calls += 1

    def until(self, end: str) -> WaitsFor:
        """Takes the text before the next ``end``, and ``end``. Returns the text before it."""
        searched = 0
        while (place := self._rest.find(end, searched)) < 0:
            searched = max(0, len(self._rest) - len(end) + 1)
            yield
        before, self._rest = self._rest[:place], self._rest[place + len(end) :]
        return before

    def json_calls(self, head: str, arguments: str, end: str) -> Waits:
        """Takes calls without end: ``head``, a name, ``arguments``, a JSON value and ``end``, with any text between."""
        while True:
            yield from self.until(head)
            self.begin((yield from self.until(arguments)))
            yield from self.value()
            yield from self.until(end)
            self.end()

    def first_of(self, *texts: str) -> WaitsFor:
        """Takes that one of ``texts`` with which the rest begins, and returns it; "" if none does."""
        while True:
            for text in texts:
                if self._rest.startswith(text):
                    self._rest = self._rest[len(text) :]
                    return text
            if not any(text.startswith(self._rest) for text in texts):
                return ""
            yield

    def value(self) -> Waits:
        """Takes a JSON value and adds it to the arguments. True, False and None become JSON."""
        while not self._rest:
            yield
        if self._rest[0] in '{["':
            yield from self._nested()
            return
        word: list[str] = []  # in pieces: numbers may be long
        while (part := _WORD.match(self._rest)) and part.end() == len(self._rest):
            word.append(part[0])
            self._rest = ""
            yield
        assert part is not None  # the pattern matches everywhere
        self._rest = self._rest[part.end() :]
        text = "".join([*word, part[0]])
        self.arguments(_JSON_WORDS.get(text, text))

    def text(self, end: str) -> Waits:
        """Takes the text before the next ``end``, and ``end``. Adds the text to the arguments, as in a JSON string."""
        while (place := self._rest.find(end)) < 0:
            safe = self._rest.find(end[0], max(0, len(self._rest) - len(end) + 1))
            while safe >= 0 and not end.startswith(self._rest[safe:]):
                safe = self._rest.find(end[0], safe + 1)
            safe = len(self._rest) if safe < 0 else safe
            self.arguments(_escaped(self._rest[:safe]))
            self._rest = self._rest[safe:]
            yield
        self.arguments(_escaped(self._rest[:place]))
        self._rest = self._rest[place + len(end) :]

    def _nested(self) -> Waits:
        """Takes an object, an array or a string."""
        depth, in_string, escaped = 0, False, False
        while True:
            for position, character in enumerate(self._rest):
                if escaped:
                    escaped = False
                elif in_string:
                    escaped = character == "\\"
                    in_string = character != '"'
                elif character == '"':
                    in_string = True
                elif character in "{[":
                    depth += 1
                elif character in "}]":
                    depth -= 1
                if depth == 0 and not in_string:
                    self.arguments(self._rest[: position + 1])
                    self._rest = self._rest[position + 1 :]
                    return
            self.arguments(self._rest)
            self._rest = ""
            yield


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
