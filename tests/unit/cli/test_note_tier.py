"""Tests what the client commands say when another tier than the one asked has written an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from overfill.cli.answering import note_tier
from overfill.client import AnswerPart


def answer(*parts: tuple[str, int], brownout_from: str | None = None) -> Any:
    return SimpleNamespace(parts=tuple(AnswerPart(*part) for part in parts), brownout_from=brownout_from)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (answer(("full", 0)), ""),
        (answer(("full", 0), ("fast", 41)), "overfill: tier full has no worker; fast wrote from token 41 on\n"),
        (answer(("fast", 0), brownout_from="full"), "overfill: tier full is overloaded; fast wrote from token 0 on\n"),
    ],
)
def test_the_reader_is_told(given: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    note_tier(given, "full")
    note_tier(given, "")  # no tier was asked for
    assert capsys.readouterr().err == said
