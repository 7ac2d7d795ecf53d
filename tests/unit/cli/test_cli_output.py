"""Tests how results are printed: parts of the time to first token, speed, migrations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from overfill.cli.output import answer_details, tokens_per_second
from overfill.client import Answer, AnswerPart, Timing, Usage


def shown(answer: Answer) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(answer_details(answer))
    return capture.get()


def test_every_part_has_a_row_and_the_rest_is_unattributed(answer: Callable[..., Answer]) -> None:
    rows = {line.split("  ")[0].strip(): line for line in shown(answer()).splitlines()}
    assert "80.00" in rows["prefill compute"]
    assert "80.0" in rows["prefill compute"]
    assert "2.00" in rows["unattributed"], "100 ms minus 10 + 1 + 4 + 80 + 3"
    assert {"router queue", "decode reservation", "prefill queue", "return path"} <= set(rows)


def test_handoff_and_first_step_are_shown_where_the_decoder_samples_the_first_token(
    answer: Callable[..., Answer],
) -> None:
    whole = answer()
    timing = replace(whole.timing, prefill_compute=0.070, handoff=0.006, first_step=0.004, handoff_exposed=None)
    rows = {line.split("  ")[0].strip(): line for line in shown(answer(timing=timing)).splitlines()}
    assert "6.00" in rows["handoff"]
    assert "4.00" in rows["first decode step"]
    assert "2.00" in rows["unattributed"]
    assert "second token" not in rows, "it waits for no handoff"
    assert not {"handoff", "first decode step"} & {line.split("  ")[0].strip() for line in shown(whole).splitlines()}


def test_unknown_times_are_question_marks_not_zeros(answer: Callable[..., Answer]) -> None:
    text = shown(answer(timing=Timing(), client_ttft=None))
    assert "0.00" not in text
    assert "?" in text


def test_speed_counts_the_tokens_after_the_first(answer: Callable[..., Answer]) -> None:
    whole = answer()
    assert tokens_per_second(whole) == pytest.approx(10.0)  # 10 tokens in 1.1 s - 0.1 s
    assert tokens_per_second(replace(whole, usage=Usage(20, 1, 0))) is None
    assert tokens_per_second(replace(whole, timing=Timing())) is None


def test_the_sources_of_cached_tokens_are_shown_where_some_were_imported(answer: Callable[..., Answer]) -> None:
    assert "20 in (16 from the prefix cache), 11 out" in shown(answer(usage=Usage(20, 11, 16)))
    text = shown(answer(usage=Usage(20, 11, 16, peer_tokens=8, disk_tokens=4)))
    assert "20 in (16 from the prefix cache: memory 4, peer 8, disk 4), 11 out" in text


def test_tiers_are_shown_when_they_tell_more_than_the_default(answer: Callable[..., Answer]) -> None:
    def tier_row(**fields: Any) -> str:
        rows = [line for line in shown(answer(**fields)).splitlines() if line.startswith("tier")]
        return " ".join(rows).removeprefix("tier").strip()

    default, fast = AnswerPart("default", 0), AnswerPart("fast", 7)
    assert tier_row() == tier_row(tier="default", parts=(default,)) == ""
    assert tier_row(tier="full", parts=(AnswerPart("full", 0),)) == "full"
    assert tier_row(tier="fast", parts=(default, fast)) == "default, then fast from token 7"
    browned_out = tier_row(tier="default", parts=(default,), brownout_from="full")
    assert browned_out == "default, because full is overloaded"
