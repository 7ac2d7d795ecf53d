"""Tiny pairs must be sensitive to every block of the prompt; other tests rely on that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Pair
from overfill.pair.reference import load_references
from overfill.settings.tiers import TierSpec

NUM_PROMPTS, PROMPT_TOKENS, BLOCK, ANSWER_TOKENS = 30, 48, 16, 8


@pytest.fixture(scope="module")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_pair(tmp_path_factory.mktemp("pairs") / "tiny")


def answers(model: torch.nn.Module, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy answers [prompts, tokens] and top-1 margins of the same shape."""
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=ANSWER_TOKENS,
        min_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.stack(output.logits, dim=1).topk(2).values
    return output.sequences[:, prompts.shape[1] :], top[..., 0] - top[..., 1]


@pytest.mark.parametrize("half", ["full", "decoder"])
@pytest.mark.parametrize("block", range(PROMPT_TOKENS // BLOCK))
def test_replacing_one_prompt_block_changes_the_answers(tiny_pair: Path, half: str, block: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_pair / half)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, 512, (NUM_PROMPTS, PROMPT_TOKENS), generator=generator)
    other = prompts.clone()
    other[:, block * BLOCK : (block + 1) * BLOCK] = torch.randint(2, 512, (NUM_PROMPTS, BLOCK), generator=generator)
    before, _ = answers(model, prompts)
    after, _ = answers(model, other)
    changed = (before != after).any(dim=1).float().mean().item()
    assert changed >= 0.9


def test_answers_do_not_hang_on_the_last_bits(tiny_pair: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_pair / "full")
    prompts = torch.randint(2, 512, (NUM_PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(2))
    _, margins = answers(model, prompts)
    assert (margins > 1e-2).float().mean().item() >= 0.98


def test_equal_arguments_give_equal_pairs(tiny_pair: Path, tmp_path: Path) -> None:
    first, again, other = Pair.load(tiny_pair), make_tiny_pair(tmp_path / "a"), make_tiny_pair(tmp_path / "b", seed=1)
    assert Pair.load(again).full_digest == first.full_digest
    assert Pair.load(again).decoder_digest == first.decoder_digest
    assert Pair.load(again).tokenizer_digest == first.tokenizer_digest
    assert Pair.load(other).full_digest != first.full_digest


def test_the_answers_of_tiny_tiers_differ_and_depend_on_every_block(tiny_tiers: tuple[TierSpec, ...]) -> None:
    """Otherwise a trial could not tell which tier wrote a token, or that a block of the prompt is lost."""
    references = load_references(tiny_tiers)
    prompts = torch.randint(2, 512, (12, PROMPT_TOKENS), generator=torch.Generator().manual_seed(3)).tolist()
    for name, reference in references.items():
        own = [reference.generate(prompt, 24) for prompt in prompts]
        others = [r for other, r in references.items() if other != name]
        verdicts = [v for r in others for p, a in zip(prompts, own, strict=True) for v in r.score(p, a)[1:]]
        assert sum(v.kind == "error" for v in verdicts) >= 0.95 * len(verdicts)
        for start in range(0, PROMPT_TOKENS, BLOCK):
            damaged = [[*p[:start], *[2] * BLOCK, *p[start + BLOCK :]] for p in prompts]
            # A greedy answer changes where a token of the old one is not the greedy one after those before it.
            changed = [any(v.kind == "error" for v in reference.score(d, a)) for d, a in zip(damaged, own, strict=True)]
            assert sum(changed) >= 0.9 * len(changed)
