"""Trials over two revisions judge each answer by the pair of the revision that it names, and need answers of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from overfill.lab.chaos.load import RequestResult
from overfill.lab.chaos.trial import TrialResult
from overfill.lab.chaos.trial_report import TrialReport
from overfill.lab.commands.chaos import REVISIONS
from overfill.making.tiny import make_tiny_pair
from overfill.pair.reference import TwoStageReference
from overfill.telemetry.progress import silent

PROMPT = [20 + 7 * i for i in range(30)]


def test_an_answer_is_judged_by_the_pair_of_the_revision_that_it_names(tiny_pair: Path, tmp_path: Path) -> None:
    old, new = (TwoStageReference(pair) for pair in (tiny_pair, make_tiny_pair(tmp_path / "new", seed=1)))
    parts = (("default", 0),)
    old_right, new_right = (
        RequestResult(name, PROMPT, token_ids=tuple(reference.generate(PROMPT, 6)), parts=parts, revision=name)
        for name, reference in (("r1", old), ("r2", new))
    )
    assert len(old_right.token_ids) == len(new_right.token_ids) == 6
    mixed = replace(new_right, request="mixed", token_ids=old_right.token_ids)
    unknown = replace(old_right, request="unknown", revision="r3")
    result = TrialResult([old_right, new_right, mixed, unknown], freed_after=0.0)
    summary, wrong = result.judge({"r1": {"default": old}, "r2": {"default": new}}, 6, silent)
    assert (summary.correct, wrong) == (2, {"mixed", "unknown"})
    assert TrialReport(result, summary, wrong, {}, REVISIONS).as_dict()["revisions"] == {"r1": 1, "r2": 2, "r3": 1}
    only_old = TrialResult([old_right], freed_after=0.0)
    summary, wrong = only_old.judge({"r1": {"default": old}}, 6, silent)
    assert TrialReport(only_old, summary, wrong, {}).passed
    assert TrialReport(only_old, summary, wrong, {}, REVISIONS).unused == ["r2"]
    assert not TrialReport(only_old, summary, wrong, {}, REVISIONS).passed
