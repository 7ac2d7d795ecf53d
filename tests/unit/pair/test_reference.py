from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_adapters import save_peft
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from overfill.errors import InvalidPair
from overfill.making.pair_json import write_manifest
from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Pair
from overfill.pair.hf_model import load_hf_model
from overfill.pair.reference import (
    JudgedAnswer,
    TwoStageReference,
    Verdict,
    _forward,
    judge,
    judge_parts,
    load_references,
    summarise,
)
from overfill.settings.tiers import TierSpec

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


@torch.inference_mode()
def merged(pair: Pair, peft: Path) -> PreTrainedModel:
    """Returns the decoder with an adapter that is added to its matrices by hand."""
    decoder = load_hf_model(pair.decoder_path)
    tensors = load_file(peft / "adapter_model.safetensors")
    for name, down in tensors.items():
        if ".lora_A." in name:
            module = decoder.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight += 2 * tensors[name.replace("lora_A", "lora_B")] @ down  # alpha ÷ rank is 2
    return decoder


@torch.inference_mode()
def on_full_kv(
    full: PreTrainedModel, decoder: PreTrainedModel, prompt: list[int], max_tokens: int, start: int
) -> list[int]:
    """Computes the answer token by token, each from the full model's KV up to ``start``. Layers map to themselves."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_tokens:
        cache = DynamicCache(config=full.config)
        _forward(full, prompt[:start], 0, cache)
        token = int(_forward(decoder, ids[start:], start, cache)[-1].argmax())
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


@pytest.fixture(scope="module")
def tiers(tiny_tiers: tuple[TierSpec, ...]) -> dict[str, TwoStageReference]:
    return load_references(tiny_tiers)


def written(tiers: dict[str, TwoStageReference], prompt: list[int], parts: list[tuple[str, int]]) -> list[int]:
    """Returns an answer of ten tokens, token by token: each of the tier whose part it is in."""
    answer: list[int] = []
    for index in range(10):
        tier = next(tier for tier, start in reversed(parts) if start <= index)
        answer.append(tiers[tier].score(prompt, [*answer, 0])[index].reference_id)
    return answer


PARTS = [[("full", 0), ("fast", 4)], [("fast", 0), ("default", 1), ("full", 9)], [("default", 0), ("full", 6)]]


@pytest.mark.parametrize("parts", PARTS)
def test_each_part_of_an_answer_is_judged_by_its_own_tier(
    parts: list[tuple[str, int]], tiers: dict[str, TwoStageReference]
) -> None:
    for prompt in PROMPTS:
        answer = written(tiers, prompt, parts)
        judged = judge_parts(tiers, parts, prompt, answer, "length", 10)
        assert judged.identical
        assert [v.index for v in judged.verdicts] == [*range(10)]
        assert not any(judge(reference, prompt, answer, "length", 10).correct for reference in tiers.values())


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_part_that_begins_one_token_off_is_found(
    shift: int, parts: list[tuple[str, int]], tiers: dict[str, TwoStageReference]
) -> None:
    last, start = parts[-1]
    told = [*parts[:-1], (last, start + shift)]
    for prompt in PROMPTS:
        error = judge_parts(tiers, told, prompt, written(tiers, prompt, parts), "length", 10).first_error
        assert error is not None
        assert error.index == min(start, start + shift)


def test_the_stop_token_is_of_the_last_part(tiers: dict[str, TwoStageReference], prompt: list[int]) -> None:
    """Also when it is all that the tier wrote: workers do not send it."""
    answer = written(tiers, prompt, [("full", 0)])[:4]
    for parts in ([("full", 0), ("fast", 2)], [("full", 0), ("fast", 4)]):
        judged = judge_parts(tiers, parts, prompt, answer, "stop", 10)
        assert [v.index for v in judged.verdicts] == [*range(5)]
        assert judged.verdicts[-1] == tiers["fast"].score(prompt, answer, [EOS])[-1]


@pytest.mark.parametrize("parts", [[], [("full", 1)], [("full", 0), ("fast", 0)], [("full", 0), ("fast", 11)]])
def test_parts_that_do_not_divide_the_answer_are_a_problem(
    parts: list[tuple[str, int]], tiers: dict[str, TwoStageReference], prompt: list[int]
) -> None:
    assert judge_parts(tiers, parts, prompt, [5] * 10, "length", 10).problem == (
        f"has parts from {[start for _, start in parts]}, which do not divide 10 tokens"
    )


def test_a_tier_without_a_reference_is_a_problem(tiers: dict[str, TwoStageReference], prompt: list[int]) -> None:
    judged = judge_parts(tiers, [("full", 0), ("cheap", 3)], prompt, [5] * 10, "length", 10)
    assert judged.problem == "was written by the tier 'cheap', whose pair was not given"


def test_tiers_share_the_full_model_and_may_round_their_own_decoder(tiny_tiers: tuple[TierSpec, ...]) -> None:
    full, _, fast = tiny_tiers
    references = load_references(
        [full, full.model_copy(update={"name": "rounded", "settings": {"quantize": "int8"}}), fast]
    )
    assert len({id(reference._full) for reference in references.values()}) == 1
    margins = {name: [v.margin for v in reference.score(PROMPTS[0], [5] * 8)] for name, reference in references.items()}
    unrounded = [v.margin for v in TwoStageReference(Path(full.pair)).score(PROMPTS[0], [5] * 8)]
    assert margins["full"] == unrounded != margins["rounded"]


def test_tiers_of_another_full_model_are_refused(tiny_tiers: tuple[TierSpec, ...], tmp_path: Path) -> None:
    other = TierSpec(name="other", pair=str(make_tiny_pair(tmp_path / "pair", seed=1)))
    with pytest.raises(InvalidPair, match="different full models"):
        load_references([*tiny_tiers, other])


def test_an_adapter_answers_from_answer_start_on_the_full_models_kv(tiny_pair: Path, tmp_path: Path) -> None:
    pair = Pair.load(tiny_pair)
    folders = {name: save_peft(pair, tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two.b"))}
    reference = TwoStageReference(tiny_pair)
    full, written = load_hf_model(pair.full_path), set()
    for name, one in reference.with_adapters(folders).items():
        decoder = merged(pair, folders[name])
        for prompt in PROMPTS[:2]:
            for start in (1, 30, 39):
                answer = one.generate(prompt, 8, start)
                assert answer == on_full_kv(full, decoder, prompt, 8, start)
                verdicts = one.score(prompt, answer, (EOS,) if len(answer) < 8 else (), answer_start=start)
                assert {v.kind for v in verdicts} == {"identical"}
                written.add(tuple(answer))
    assert len(written) == 2 * 2 * 3, "adapters and starts have answers of their own"
    tensors = load_file(folders["one"] / "adapter_model.safetensors")
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, folders["one"] / "adapter_model.safetensors")
    (nothing,) = reference.with_adapters({"one": folders["one"]}).values()
    assert nothing.generate(PROMPTS[0], 8) == reference.generate(PROMPTS[0], 8), "the decoder alone is as it was"
