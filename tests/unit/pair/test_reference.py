from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from overfill.model.manifest import write_manifest
from overfill.pair.reference import JudgedAnswer, TwoStageReference, Verdict, judge, summarise
from overfill.pair.tiny import make_tiny_pair

PROMPTS = torch.randint(2, 512, (4, 40), generator=torch.Generator().manual_seed(4)).tolist()
EOS = 1


@pytest.fixture(scope="module")
def reference(tiny_pair: Path) -> TwoStageReference:
    return TwoStageReference(tiny_pair)


@pytest.fixture(scope="module")
def prompt(reference: TwoStageReference) -> list[int]:
    """A prompt that the reference answers with at least eight tokens."""
    return next(p for p in PROMPTS if len(reference.generate(p, 8)) == 8)


@torch.inference_mode()
def greedy(folder: Path, prompt: list[int], max_tokens: int) -> list[int]:
    """Computes the answer with one model, without a cache, token by token."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = list(prompt)
    while len(ids) < len(prompt) + max_tokens:
        token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == EOS:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_an_identity_pair_answers_as_the_model_alone(tmp_path: Path) -> None:
    folder = make_tiny_pair(tmp_path / "pair", identity=True)
    reference = TwoStageReference(folder)
    for prompt in PROMPTS:
        answer = reference.generate(prompt, 12)
        assert answer == greedy(folder / "full", prompt, 12)
        assert all(v.kind == "identical" for v in reference.score(prompt, answer))


def test_first_token_is_the_full_models_and_the_rest_are_not_its(tiny_pair: Path, reference: TwoStageReference) -> None:
    answers = [
        (reference.generate(p, 8), greedy(tiny_pair / "full", p, 8), greedy(tiny_pair / "decoder", p, 8))
        for p in PROMPTS
    ]
    assert all(two_stage[0] == full[0] for two_stage, full, _ in answers)
    assert all(two_stage != full for two_stage, full, _ in answers)
    assert all(two_stage != decoder for two_stage, _, decoder in answers)


def test_one_pass_scoring_agrees_with_token_by_token_decoding(reference: TwoStageReference) -> None:
    for prompt in PROMPTS:
        verdicts = reference.score(prompt, reference.generate(prompt, 16))
        assert [v.kind for v in verdicts] == ["identical"] * len(verdicts)


def test_the_decoder_reads_the_mapped_layers(fresh: Callable[[], Path], reference: TwoStageReference) -> None:
    folder = fresh()
    write_manifest(folder, layer_map=[0, 1, 2, 2])
    other = TwoStageReference(folder)
    assert [other.generate(p, 8)[0] for p in PROMPTS] == [reference.generate(p, 8)[0] for p in PROMPTS]
    assert all(other.generate(p, 8) != reference.generate(p, 8) for p in PROMPTS)


@pytest.mark.parametrize("index", [0, 1, 5, 7])
def test_a_changed_token_is_an_error_where_it_is(index: int, reference: TwoStageReference, prompt: list[int]) -> None:
    answer = reference.generate(prompt, 8)
    original = answer[index]
    answer[index] = (original + 1) % 512
    verdict = reference.score(prompt, answer)[index]
    assert (verdict.kind, verdict.index, verdict.reference_id) == ("error", index, original)
    assert verdict.margin > 1e-3
    assert not summarise([judge(reference, prompt, answer, "length", 8)]).passed


def test_a_lost_prompt_block_is_caught(reference: TwoStageReference) -> None:
    for prompt in PROMPTS:
        damaged = prompt[:16] + [2] * 16 + prompt[32:]
        assert not judge(reference, prompt, reference.generate(damaged, 8), "length", 8).correct


def test_an_answer_may_only_stop_where_the_reference_does(reference: TwoStageReference, prompt: list[int]) -> None:
    answer = reference.generate(prompt, 8)
    judged = judge(reference, prompt, answer[:4], "stop", 8)
    assert judged.first_error is not None
    assert (judged.first_error.index, judged.first_error.token_id) == (4, EOS)
    assert judged.first_error.reference_id == answer[4]


def test_a_stop_token_that_the_reference_chooses_is_right_whether_sent_or_not(
    reference: TwoStageReference, prompt: list[int]
) -> None:
    answer = reference.generate(prompt, 8)
    unsent = reference.score(prompt, answer[:4], stop_ids=[EOS, answer[4]])
    assert unsent == reference.score(prompt, answer[:5])
    assert [v.kind for v in unsent] == ["identical"] * 5
    assert len(judge(reference, prompt, [*answer[:4], EOS], "stop", 8).verdicts) == 5


def test_an_answer_that_stops_before_its_first_token_is_judged(reference: TwoStageReference, prompt: list[int]) -> None:
    verdicts = reference.score(prompt, [], stop_ids=[EOS])
    assert [(v.index, v.token_id, v.kind) for v in verdicts] == [(0, EOS, "error")]


def test_an_answer_that_is_too_short_is_a_problem(reference: TwoStageReference, prompt: list[int]) -> None:
    judged = judge(reference, prompt, reference.generate(prompt, 7), "length", 8)
    assert judged.problem is not None
    assert not judged.correct


def verdicts(*margins: float) -> JudgedAnswer:
    """Token 0 is the reference's choice; another token has the given margin."""
    return JudgedAnswer(tuple(Verdict(i, 1 if m else 0, 0, m) for i, m in enumerate(margins)))


def test_a_tie_is_within_a_thousandth_of_the_largest_logit() -> None:
    assert [v.kind for v in verdicts(0, 9e-4, 1.1e-3).verdicts] == ["identical", "tie", "error"]


def test_summary_counts_answers_and_ties() -> None:
    summary = summarise([verdicts(0, 0), verdicts(0, 5e-4), verdicts(0, 1), JudgedAnswer((), "no answer")])
    assert str(summary) == "2/4 correct (1 identical, 1 ties)"
    assert not summary.passed


@pytest.mark.parametrize(("tokens", "passed"), [(999, False), (1000, True)])
def test_at_most_one_token_in_a_thousand_may_be_a_tie(tokens: int, passed: bool) -> None:
    assert summarise([verdicts(5e-4, *[0.0] * (tokens - 1))]).passed is passed


def test_nothing_asked_is_not_a_pass() -> None:
    assert not summarise([]).passed
