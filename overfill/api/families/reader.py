"""Separates tool calls from other text in an answer that arrives in pieces."""

from __future__ import annotations

import re
from collections.abc import Sequence

from overfill.api.families.call_text import CallText, without_markers
from overfill.api.families.parameters import KnownTools
from overfill.api.families.tool_format import ToolFormat
from overfill.api.stop import StopStrings
from overfill.api.tools import ToolDefinition
from overfill.v1.inference_pb2 import ToolCallDelta


class ToolCallReader:
    """Separates tool calls from the text before them, and ends that text at stop strings.

    It drops white space around calls. Text that only begins like a call counts as text. Nothing but calls follows the
    first one, so stop strings count before it only. A stop string that may be the beginning of a call is found once
    more text shows that it is not.

    Attributes:
        stop: Stop string that ended the answer, or None. Callers push nothing after it.
    """

    def __init__(self, stops: StopStrings, format: ToolFormat, tools: Sequence[ToolDefinition]) -> None:
        self.stop: str | None = None
        self._stops = stops
        self._buffer = ""
        self._line_begins = self._blank = True  # blank: the answer has only white space so far
        self._space: list[str] = []  # white space at the end of the text so far, in pieces
        self._openings = format.openings(tools)
        self._longest = max(map(len, self._openings))
        self._first = re.compile(f"[{re.escape(''.join({opening[0] for opening in self._openings}))}]")
        self._calls = CallText()
        self._reading = format.read(self._calls, KnownTools(tools))
        self._began = False

    @property
    def calls(self) -> int:
        """Number of complete calls."""
        return self._calls.calls

    @property
    def has_call(self) -> bool:
        """True once the answer has a call, complete or not."""
        return self._began

    def push(self, text: str, *, may_end: bool = True) -> tuple[str, list[ToolCallDelta]]:
        """Adds a piece. Returns text that is certainly outside of calls, and new parts of calls, without ids.

        Args:
            may_end: As for ``StopStrings.push``.
        """
        if self._began:
            return "", self._read(text)
        buffer = self._buffer + text
        end, self._began = self._find_call(buffer)
        self._buffer = buffer[end:]
        if end:
            self._blank = self._blank and buffer[:end].isspace()
            self._line_begins = self._blank or buffer[end - 1] == "\n"
        outside = self._text(buffer[:end], may_end)
        if not self._began or self.stop is not None:
            return outside, []
        outside += "".join([*self._space, self._stops.finish()]).rstrip()
        return outside, self._read(self._buffer)

    def finish(self, *, may_end: bool = True) -> str:
        """The text that was held back, at the end of the answer. Drops the rest of an incomplete call."""
        if self._began:
            return ""
        text = self._text(self._buffer, may_end)
        return text if self.stop is not None else "".join([text, *self._space, self._stops.finish()])

    def _read(self, text: str) -> list[ToolCallDelta]:
        self._calls.add(text)
        next(self._reading, None)
        return self._calls.taken()

    def _find_call(self, text: str) -> tuple[int, bool]:
        """The place where a call begins or may begin, or the end of ``text``; and whether a call surely begins."""
        blank = len(text) - len(text.lstrip()) if self._blank else -1
        for found in self._first.finditer(text):
            place = found.start()
            line_begins = text[place - 1] == "\n" if place else self._line_begins
            line_begins = line_begins or place <= blank
            rest = text[place : place + self._longest]
            for opening, begins_line in self._openings.items():
                if line_begins or not begins_line:
                    if rest.startswith(opening):
                        return place, True
                    if opening.startswith(rest):  # then the text ends here
                        return place, False
        return len(text), False

    def _text(self, text: str, may_end: bool) -> str:
        """What may be shown of the text after more ``text``: white space only if no call can follow it."""
        text, self.stop = self._stops.push(without_markers(text), may_end=may_end)
        shown = text.rstrip() if self.stop is None else text
        space = text[len(shown) :]
        if shown or self.stop is not None:
            shown, self._space = "".join([*self._space, shown]), []
        if space:
            self._space.append(space)
        return shown
