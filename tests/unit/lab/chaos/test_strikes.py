"""Strikes: the same seed draws the same, from anywhere; a matrix is complete; a report can be run again."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from overfill.lab.chaos.strikes import FAULTS, PHASES, TARGETS, draw, matrix, replayed
from overfill.lab.chaos.trial import Struck


def test_a_seed_draws_the_same_strikes_from_wherever_it_is_resumed() -> None:
    whole = list(itertools.islice(draw(7, 2.0), 50))
    assert list(itertools.islice(draw(7, 2.0, first=30), 20)) == whole[30:]
    assert list(itertools.islice(draw(8, 2.0), 50)) != whole
    assert {strike.fault for strike in itertools.islice(draw(7, 2.0), 500)} == set(FAULTS)
    assert all(strike.target in TARGETS[strike.fault] for strike in whole)


def test_strikes_keep_to_what_was_asked_for() -> None:
    drawn = list(itertools.islice(draw(0, 1.0, ["kill", "slow"], ["handoff"], ["decode"]), 40))
    assert {(s.fault, s.phase, s.target) for s in drawn} == {
        ("kill", "handoff", "decode"),
        ("slow", "handoff", "client"),  # which befalls nobody else
    }


def test_a_matrix_has_every_cell_as_often_as_asked_and_every_target() -> None:
    strikes = matrix(0, 6)
    cells = Counter((s.fault, s.phase) for s in strikes)
    assert cells == dict.fromkeys(itertools.product(FAULTS, PHASES), 6)
    assert {(s.fault, s.target) for s in strikes} == {(f, t) for f in FAULTS for t in TARGETS[f]}
    assert [s.number for s in strikes] == list(range(len(strikes)))
    assert matrix(0, 6) == strikes != matrix(1, 6)


def test_the_strikes_of_a_report_are_those_that_were_made(tmp_path: Path) -> None:
    strikes = list(itertools.islice(draw(3, 1.0), 9))
    report = tmp_path / "report.json"
    struck = [Struck(strike, 1.0, "decode-0", "chaos-1", 2.0).as_dict() for strike in strikes]
    report.write_text(json.dumps({"strikes": struck}), encoding="utf-8")
    assert replayed(report) == strikes


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"strikes": [{}]}'])
def test_what_is_no_report_is_refused_by_name(tmp_path: Path, text: str) -> None:
    report = tmp_path / "report.json"
    report.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"report\.json is no report of overfill chaos"):
        replayed(report)
