"""Tests that text is cut exactly before a stop string, and that only text which may become one is held back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from overfill.api.stop import StopStrings

short = st.text(alphabet="ab", max_size=12)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopStrings(stops)
    shown = ""
    for piece in pieces:
        safe, matched = matcher.push(piece)
        shown += safe
        if matched is not None:
            return shown, matched
    return shown + matcher.finish(), None


def cut(stops: list[str], text: str) -> tuple[str, str | None]:
    """The specification: looks for stop strings one character at a time."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(stops=stop_lists, pieces=st.lists(short, max_size=6))
def test_text_is_cut_exactly_however_it_arrives(stops: list[str], pieces: list[str]) -> None:
    assert run(stops, pieces) == cut(stops, "".join(pieces))


@given(stops=stop_lists, text=short)
def test_only_text_that_may_become_a_stop_string_is_held_back(stops: list[str], text: str) -> None:
    matcher = StopStrings(stops)
    safe, matched = matcher.push(text)
    if matched is None and safe != text:
        held = text[len(safe) :]
        assert any(stop.startswith(held) and stop != held for stop in stops)


def test_other_text_passes_at_once() -> None:
    matcher = StopStrings(["</answer>"])
    assert matcher.push("hello < world") == ("hello < world", None)
    assert matcher.push(" </ans") == (" ", None)
    assert matcher.push("wers>") == ("</answers>", None)


def test_a_stop_string_may_be_text_as_long_as_the_answer_may_not_end() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("an END, E", may_end=False) == ("an END, ", None)
    assert matcher.push("N", may_end=False) == ("", None)
    assert matcher.push("D at last") == ("", "END"), "it began earlier and is complete now"
    matcher = StopStrings(["a", "ab"])
    assert matcher.push("xa", may_end=False) == ("x", None)
    assert matcher.push("c") == ("ac", None), "it was complete while the answer could not end"
