"""Finds stop strings in streamed text: holds back text that may become one, and cuts exactly. Knows no tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the stop string that is complete first, independent of how the text is cut into pieces.

    If several are complete at the same character, the longest one wins. Callers push nothing after a match.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest_prefix = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""

    def push(self, text: str, *, may_end: bool = True) -> tuple[str, str | None]:
        """Text that may be shown, and the stop string that ended the answer, or None. The text excludes it.

        Args:
            may_end: Whether a stop string that ``text`` completes ends the answer. If not, it counts as text.
        """
        if not self._stops:  # a path that most tokens of a router take
            return text, None
        buffer, held = self._held + text, len(self._held)
        # A match must end in the new text, because earlier calls have searched the rest.
        places = ((s, buffer.find(s, max(0, held - len(s) + 1))) for s in self._stops)
        matches = [(start + len(s), start, s) for s, start in places if start >= 0]
        if matches and may_end:
            _, start, stop = min(matches)
            self._held = ""
            return buffer[:start], stop
        safe = len(buffer) - self._held_length(buffer)
        self._held = buffer[safe:]
        return buffer[:safe], None

    def finish(self) -> str:
        """The text that was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held

    def _held_length(self, buffer: str) -> int:
        for length in range(min(self._longest_prefix, len(buffer)), 0, -1):
            tail = buffer[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0
