"""Trials judge sampled answers: those of the engine are right, and a wrong token, seed or state is noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from chaos_answers import answered

from overfill.lab.chaos.load import SAMPLED, RequestMix, RequestResult
from overfill.lab.chaos.trial import TrialResult
from overfill.lab.chaos.trial_report import TrialReport
from overfill.pair.llm import LLM
from overfill.pair.reference import TwoStageReference
from overfill.request.params import SamplingParams
from overfill.routing.tier import DEFAULT_TIER
from overfill.telemetry.progress import silent

PROMPTS = [[20 + (7 * i * (seed + 3)) % 470 for i in range(30 + seed)] for seed in range(3)]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def references(tiny_pair: Path) -> dict[str, TwoStageReference]:
    return {DEFAULT_TIER: TwoStageReference(tiny_pair)}


@pytest.fixture(scope="module")
def results(tiny_pair: Path) -> list[RequestResult]:
    """Answers of the engine to every prompt with each kind of sampling."""
    llm = LLM(tiny_pair, dtype="float32", kv_memory=4 << 20)
    found = []
    for seed, sampling in enumerate(SAMPLED):
        asked = replace(sampling, seed=seed, max_tokens=MAX_TOKENS)
        for prompt, answer in zip(PROMPTS, llm.generate(PROMPTS, asked), strict=True):
            given = {"token_ids": tuple(answer.token_ids), "finish_reason": answer.finish_reason}
            received = answered((DEFAULT_TIER, 0), **given)
            found.append(RequestResult(f"{seed}-{len(prompt)}", prompt, sampling=asked, answer=received))
    return found


def judged(references: dict[str, TwoStageReference], results: list[RequestResult]) -> TrialReport:
    trial = TrialResult(results, freed_after=0.0)
    return TrialReport(trial, *trial.judge({"": references}, MAX_TOKENS, silent), {})


def test_answers_of_the_engine_are_right(
    references: dict[str, TwoStageReference], results: list[RequestResult]
) -> None:
    report = judged(references, results)
    assert report.passed, report.wrong
    assert report.as_dict()["sampled"] == {"answers": len(results), "right": len(results), "migrated": 0}
    assert len({one.answer.token_ids for one in results}) == len(results)


def test_a_wrong_token_is_noticed_wherever_it_is(
    references: dict[str, TwoStageReference], results: list[RequestResult]
) -> None:
    for index in (0, 1, 7):
        changed = []
        for one in results:
            ids = list(one.answer.token_ids)
            if index < len(ids):
                ids[index] = (ids[index] + 1) % 512
                changed.append(replace(one, answer=replace(one.answer, token_ids=tuple(ids))))
        report = judged(references, changed)
        assert len(changed) >= len(PROMPTS)
        assert report.wrong == {one.request for one in changed}
        assert not report.passed


@pytest.mark.parametrize("lost", [{"seed": 99}, {"sample_index": 1}, {"temperature": 5.0}], ids=str)
def test_an_answer_that_another_draw_made_is_wrong(
    references: dict[str, TwoStageReference], results: list[RequestResult], lost: dict[str, float]
) -> None:
    def drawn_otherwise(one: RequestResult) -> RequestResult:
        if "sample_index" in lost:
            return replace(one, **lost)
        return replace(one, sampling=replace(one.sampling, **lost))

    assert len(judged(references, [drawn_otherwise(one) for one in results]).wrong) > 0.8 * len(results)


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"])
def test_an_answer_without_its_penalty_or_bias_is_wrong(
    references: dict[str, TwoStageReference], results: list[RequestResult], name: str
) -> None:
    none = getattr(SamplingParams(), name)
    using = [one for one in results if getattr(one.sampling, name) != none]
    without = [replace(one, sampling=replace(one.sampling, **{name: none})) for one in using]
    assert judged(references, using).passed
    assert judged(references, without).wrong


def test_ties_are_bounded(
    monkeypatch: pytest.MonkeyPatch, references: dict[str, TwoStageReference], results: list[RequestResult]
) -> None:
    """Where every token counts as a tie, no answer is wrong, and the trial fails for its ties."""
    unfiltered = [one for one in results if one.sampling == replace(SAMPLED[0], seed=0, max_tokens=MAX_TOKENS)]
    other_seed = [replace(one, sampling=replace(one.sampling, seed=99)) for one in unfiltered]
    for module in ("margins", "reference"):
        monkeypatch.setattr(f"overfill.pair.{module}.TIE_MARGIN", 1e3)
    report = judged(references, other_seed)
    assert not report.wrong
    assert not report.passed
    assert judged(references, unfiltered).passed


def test_half_of_the_requests_are_sampled_and_depend_on_their_number_only() -> None:
    mix = RequestMix(PROMPTS, MAX_TOKENS, seed=5, sampled_share=0.5)
    chosen = [mix.request(number) for number in range(400)]
    sampled = [one for one in chosen if not one.sampling.greedy]
    assert 160 < len(sampled) < 240
    assert {replace(one.sampling, seed=None, max_tokens=None) for one in sampled} == set(SAMPLED)
    assert 0 < sum(one.sampling.seed is None for one in sampled) < len(sampled)
    assert [mix.request(number) for number in reversed(range(400))] == chosen[::-1]
