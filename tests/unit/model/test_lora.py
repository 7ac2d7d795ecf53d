"""Tests that a step with adapters computes what transformers and PEFT compute, and what slots refuse."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from random_adapters import random_adapter
from small_models import CPU, SHAPE
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from overfill.errors import InvalidRequest
from overfill.model import lora
from overfill.model.adapter import LoraAdapter, LowRank
from overfill.model.lora import RowTiles
from overfill.model.transformer import Transformer

# PEFT 0.21 asks transformers for a property that version 6 removes.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen2-tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE | {"head_dim": 10}),
}
PROMPT = torch.randint(0, 96, (60,), generator=torch.Generator().manual_seed(3)).tolist()


def with_peft(model: PreTrainedModel, adapter: LoraAdapter) -> PeftModel:
    """The model with the adapter's products in PEFT's modules."""
    names = sorted({projection for _, projection in adapter.products})
    wrapped = get_peft_model(
        model, LoraConfig(r=adapter.record.rank, lora_alpha=adapter.record.rank, target_modules=names)
    )
    with torch.no_grad():
        for (layer, projection), product in adapter.products.items():
            part = wrapped.base_model.model.model.layers[layer]
            module = getattr(part.self_attn if projection[0] in "qkvo" else part.mlp, projection)
            module.lora_A["default"].weight.copy_(product.down)
            module.lora_B["default"].weight.copy_(product.up)
    return wrapped.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_mixed_steps_equal_transformers_with_peft(name: str, save_model, runner, tmp_path: Path) -> None:
    """Prompts, single tokens and several tokens of two adapters and of the plain model, in the same steps."""
    plain = save_model(CONFIGS[name])
    model = Transformer.load(tmp_path, torch.float32, CPU)
    adapters = {"a": random_adapter(model.config, 1, 8), "b": random_adapter(model.config, 2, 3, ["q_proj", "v_proj"])}
    slots = model.new_adapter_slots(3, 8)
    slots.stage(2, random_adapter(model.config, 9, 8))  # of which the next one must leave nothing
    slots.stage(2, adapters["b"])
    slots.stage(0, adapters["a"])
    lengths = {"a": 20, "plain": 31, "b": 7, "second a": 18}
    used = {"a": 0, "b": 2, "second a": 0}
    run = runner(model)
    logits = {key: [] for key in lengths}

    def step(count: dict[str, int]) -> None:
        new = {key: PROMPT[run._lengths.get(key, 0) :][:many] for key, many in count.items()}
        rows = run.step(new, adapters=used).split([len(tokens) for tokens in new.values()])
        for key, part in zip(new, rows, strict=True):
            logits[key].append(part)

    step(lengths)
    step(dict.fromkeys(lengths, 1))
    step({"a": 1, "second a": 3, "plain": 2, "b": 1})
    step({"plain": 1, "b": 5})
    for key in lengths:
        whole = torch.cat(logits[key])
        adapter = adapters.get(key[-1]) if key != "plain" else None
        theirs = plain if adapter is None else with_peft(plain, adapter)
        with torch.no_grad():
            expected = theirs(torch.tensor([PROMPT[: len(whole)]])).logits[0]
        torch.testing.assert_close(whole, expected, atol=2e-4, rtol=1e-4)
        if adapter is not None:
            theirs.unload()


def test_copies_into_a_slot_wait_for_nine_tenths_of_the_time(save_model, monkeypatch, tmp_path: Path) -> None:
    save_model(CONFIGS["llama"])
    model = Transformer.load(tmp_path, torch.float32, CPU)
    adapter = random_adapter(model.config, 1, 4, ["q_proj", "down_proj"])
    slots = model.new_adapter_slots(1, 4)
    clock, rests = itertools.count(), []
    monkeypatch.setattr(lora, "time", SimpleNamespace(thread_time=lambda: next(clock), sleep=rests.append))
    slots.stage(0, adapter)
    assert rests == [9] * 7 * 3, "one after each projection of each layer"


def test_tiles_have_rows_of_one_slot_each() -> None:
    slots = torch.tensor([3, -1, 0, 3, 3, -1, *[0] * 35])
    tiles = RowTiles.of(slots, CPU)
    assert sorted(tiles.rows.tolist()) == [i for i, slot in enumerate(slots.tolist()) if slot >= 0]
    assert tiles.gathered[tiles.places].tolist() == tiles.rows.tolist()
    assert (tiles.slots.repeat_interleave(tiles.height)[tiles.places] == slots[tiles.rows]).all()
    assert len(tiles.slots) == 4, "36 rows of slot 0 in three tiles, and one of slot 3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda products: (9, None), "has rank 9, more than this worker's --max-adapter-rank 8"),
        (lambda products: (4, {(3, "q_proj"): products[0, "q_proj"]}), "has layer 3; the decoder has 3 layers"),
        (
            lambda products: (4, {(1, "k_proj"): products[0, "q_proj"]}),
            r"has a k_proj of \[48, 4\] × \[4, 48\] in layer 1; the decoder's is \[16, 48\]",
        ),
        (
            lambda products: (4, {(1, "k_proj"): LowRank(torch.zeros(4, 48), torch.zeros(16, 3))}),
            r"has a k_proj of \[16, 3\] × \[4, 48\] in layer 1",
        ),
    ],
    ids=["rank", "layer", "shape", "inner"],
)
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(
    change, message: str, save_model, runner, tmp_path: Path
) -> None:
    save_model(CONFIGS["llama"])
    model = Transformer.load(tmp_path, torch.float32, CPU)
    slots = model.new_adapter_slots(1, 8)
    slots.stage(0, random_adapter(model.config, 1, 8))
    before = runner(model).step({"a": PROMPT}, adapters={"a": 0})
    rank, products = change(random_adapter(model.config, 2, 4).products)
    other = random_adapter(model.config, 2, rank)
    with pytest.raises(InvalidRequest, match=message):
        slots.stage(0, other if products is None else replace(other, products=products))
    assert torch.equal(runner(model).step({"a": PROMPT}, adapters={"a": 0}), before)
