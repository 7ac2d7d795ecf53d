"""Trials over several tiers notice an answer that changed its tier unasked, and spread their requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from chaos_answers import answered, parts

from overfill.lab.chaos.load import RequestMix, RequestResult
from overfill.lab.chaos.trial import TrialResult
from overfill.lab.chaos.trial_report import TrialReport
from overfill.lab.commands.chaos import make_adapters
from overfill.pair.reference import Summary, TwoStageReference, load_references
from overfill.settings.tiers import TierSpec
from overfill.telemetry.progress import silent

SWITCHED = (("full", 0), ("fast", 3))
TOLD = (("fast", 3),)


def result(written: tuple[tuple[str, int], ...], told: tuple[tuple[str, int], ...], fallback: str) -> RequestResult:
    return RequestResult("r", [5], "full", fallback, answer=answered(*written), told_parts=parts(*told))


@pytest.mark.parametrize(
    ("one", "problem"),
    [
        (result((("full", 0),), (), "none"), None),
        (result(SWITCHED, TOLD, "fast"), None),
        (result((("fast", 0),), (("fast", 0),), "fast"), None),
        (result(SWITCHED, TOLD, "none"), "tier full was asked, but fast wrote a part"),
        (result(SWITCHED, TOLD, "default"), "tier full was asked, but fast wrote a part"),
        (result(SWITCHED, (), "fast"), "the stream told of []"),
        (result(SWITCHED, (("fast", 4),), "fast"), "told of [AnswerPart(tier='fast', first_index=4)], and the end of"),
    ],
)
def test_a_change_of_tier_must_be_asked_for_and_told_as_it_is(one: RequestResult, problem: str | None) -> None:
    assert (one.tier_problem is None) == (problem is None)
    assert problem is None or problem in str(one.tier_problem)
    trial = TrialResult([one], freed_after=0.0)
    right = Summary(answers=1, correct=1, identical=1, ties=0, tokens=1)
    assert TrialReport(trial, right, set(), {}).passed == (problem is None)


def test_each_part_is_judged_at_the_token_that_the_answer_names(tiny_tiers: tuple[TierSpec, ...]) -> None:
    references = load_references(tiny_tiers)
    prompt = [20 + 7 * i for i in range(30)]
    answer: list[int] = []
    for tier in ["full"] * 3 + ["fast"] * 3:
        answer.append(references[tier].score(prompt, [*answer, 0])[-1].reference_id)
    good = RequestResult("good", prompt, "full", "fast", answer=answered(*SWITCHED, token_ids=tuple(answer)))
    late, early = (
        replace(good, request=f"at {at}", answer=replace(good.answer, parts=parts(("full", 0), ("fast", at))))
        for at in (4, 2)
    )
    summary, wrong = TrialResult([good, late, early]).judge({"": references}, 6, silent)
    assert (summary.correct, wrong) == (1, {"at 4", "at 2"})
    other = RequestResult("other", prompt, "default", "none", answer=answered(("default", 0)))
    counts = TrialReport(TrialResult([good, late, other]), summary, wrong, {}).tiers()
    assert (counts["full"]["answers"], counts["full"]["right"], counts["full"]["changed_within"]) == (2, 1, 2)
    assert (counts["default"]["changed_tier"], counts["default"]["with_fallback"]) == (0, 0)


def test_requests_are_spread_over_adapters_which_nothing_replaces() -> None:
    mix = RequestMix([[5]], 6, tiers=["full", "fast"], adapters=["a", "b"], fallback_share=1.0)
    asked = [mix.request(number) for number in range(200)]
    assert {one.tier for one in asked} == {"full", "fast", "a", "b"}
    assert {(one.tier, one.fallback) for one in asked if one.tier in "ab"} == {("a", "none"), ("b", "none")}
    assert {one.fallback for one in asked if one.tier == "full"} == {"fast"}


def test_an_adapters_answer_is_judged_from_where_its_decoder_began(tiny_pair: Path, tmp_path: Path) -> None:
    reference = TwoStageReference(tiny_pair)
    folders = make_adapters(reference.pair, tmp_path / "adapters", 2)
    references = {"default": reference} | reference.with_adapters(folders)
    prompt = [20 + 7 * i for i in range(30)]
    answer = references["task-1"].generate(prompt, 6, 25)
    given = {"token_ids": tuple(answer), "finish_reason": "length" if len(answer) == 6 else "stop"}
    good, wrong_start, wrong_writer = (
        RequestResult(name, prompt, "task-1", answer=answered((writer, 0), answer_start=start, **given))
        for name, writer, start in (("good", "task-1", 25), ("start", "task-1", 29), ("writer", "task-0", 25))
    )
    summary, wrong = TrialResult([good, wrong_start, wrong_writer]).judge({"": references}, 6, silent)
    assert (summary.correct, wrong) == (1, {"start", "writer"})
    assert wrong_writer.tier_problem == "writer: tier task-1 was asked, but task-0 wrote a part"
