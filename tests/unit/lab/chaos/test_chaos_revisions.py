"""Trials over two revisions judge each answer by the pair of the revision that it names, and need answers of both."""

from __future__ import annotations

from pathlib import Path

from chaos_answers import answered

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
    first, second = (tuple(reference.generate(PROMPT, 6)) for reference in (old, new))
    assert len(first) == len(second) == 6
    old_right, new_right, mixed, unknown = (
        RequestResult(name, PROMPT, answer=answered(("default", 0), token_ids=token_ids, revision=revision))
        for name, token_ids, revision in (
            ("r1", first, "r1"), ("r2", second, "r2"), ("mixed", first, "r2"), ("unknown", first, "r3"),
        )
    )  # fmt: skip
    result = TrialResult([old_right, new_right, mixed, unknown], freed_after=0.0)
    summary, wrong = result.judge({"r1": {"default": old}, "r2": {"default": new}}, 6, silent)
    assert (summary.correct, wrong) == (2, {"mixed", "unknown"})
    assert TrialReport(result, summary, wrong, {}, REVISIONS).as_dict()["revisions"] == {"r1": 1, "r2": 2, "r3": 1}
    only_old = TrialResult([old_right], freed_after=0.0)
    summary, wrong = only_old.judge({"r1": {"default": old}}, 6, silent)
    assert TrialReport(only_old, summary, wrong, {}).passed
    assert TrialReport(only_old, summary, wrong, {}, REVISIONS).unused == ["r2"]
    assert not TrialReport(only_old, summary, wrong, {}, REVISIONS).passed
