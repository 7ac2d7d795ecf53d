"""Tests that logits equal Hugging Face's, for any division of a sequence into steps and any placement of its blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import CPU, PROMPT, SHAPE
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from overfill.model.transformer import Transformer

TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama-head-dim": LlamaConfig(**SHAPE, head_dim=16),
    "llama-multi-head": LlamaConfig(**SHAPE | {"num_key_value_heads": 6}),
    "llama-linear": LlamaConfig(**SHAPE, rope_parameters=dict(LINEAR)),
    "llama-llama3": LlamaConfig(**SHAPE, rope_parameters=dict(LLAMA3)),
    "llama-yarn": LlamaConfig(**SHAPE, rope_parameters=dict(YARN)),
    "llama-yarn-options": LlamaConfig(
        **SHAPE,
        rope_parameters=YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False},
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral-odd-hidden": MistralConfig(**SHAPE | {"hidden_size": 50}, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "llama-head-in-two-parts": LlamaConfig(**SHAPE, overfill_head={"tokens": 40, "tail_rank": 5}),
    "qwen3-odd-hidden-biases": Qwen3Config(**SHAPE | {"hidden_size": 50}, head_dim=16, attention_bias=True),
}


@pytest.fixture
def tiny(save_model, tmp_path: Path) -> Transformer:
    save_model(LlamaConfig(**SHAPE))
    return Transformer.load(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, save_model, runner, tmp_path: Path) -> None:
    reference = save_model(CONFIGS[name])
    with torch.inference_mode():
        want = reference(torch.tensor([PROMPT])).logits[0]

    model = Transformer.load(tmp_path, torch.float32, CPU)
    got = runner(model).step({"a": PROMPT})

    difference = (got - want).abs().max().item()
    print(f"{name}: max |difference| {difference:.2e}, logits up to {want.abs().max().item():.1f}")
    assert want.std() > 0.3  # logits that are all alike would prove nothing
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_decode_steps_continue_as_transformers_would(name: str, save_model, runner, tmp_path: Path) -> None:
    reference = save_model(CONFIGS[name])
    with torch.inference_mode():
        want = reference(torch.tensor([PROMPT])).logits[0]

    run = runner(Transformer.load(tmp_path, torch.float32, CPU))
    got = [run.step({"a": PROMPT[:20]})] + [run.step({"a": [token]}) for token in PROMPT[20:]]

    torch.testing.assert_close(torch.cat(got), want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunks", [[13, 28], [4, 4, 33], [40, 1], [1, 1, 39]])
def test_chunked_prefill_equals_one_pass(chunks: list[int], tiny: Transformer, runner) -> None:
    whole = runner(tiny).step({"a": PROMPT})

    run, parts = runner(tiny), torch.tensor(PROMPT).split(chunks)
    got = torch.cat([run.step({"a": part.tolist()}) for part in parts])

    torch.testing.assert_close(got, whole, atol=1e-5, rtol=0)


def test_a_sequence_does_not_see_its_neighbours(tiny: Transformer, runner) -> None:
    prompts = {"a": PROMPT[:3], "b": PROMPT[5:36], "c": PROMPT[10:11], "d": PROMPT[20:]}
    answers = {"a": [1, 2], "b": [3, 4], "c": [5, 6], "d": [7, 8]}
    alone = {}
    for name, prompt in prompts.items():
        run = runner(tiny)
        alone[name] = [run.step({name: prompt})] + [run.step({name: [token]}) for token in answers[name]]

    run = runner(tiny)
    lengths = [len(prompt) for prompt in prompts.values()]
    steps = [run.step(prompts).split(lengths)]
    steps += [run.step({name: [answers[name][i]] for name in answers}).split(1) for i in range(2)]

    for row, name in enumerate(prompts):
        for step in range(3):
            torch.testing.assert_close(steps[step][row], alone[name][step], atol=1e-5, rtol=0)


@pytest.mark.parametrize("new", [[1], [1, 2, 3]], ids=["decode", "chunk"])
def test_a_sequence_of_nan_keeps_to_itself(new: list[int], tiny: Transformer, runner) -> None:
    """A failed sequence leaves NaN in its blocks."""
    run, alone = runner(tiny), runner(tiny)
    run.step({"a": PROMPT[:9], "bad": PROMPT[:11]})
    alone.step({"a": PROMPT[:9]})
    for part in run.floating:
        part[:, torch.tensor(run._tables["bad"])] = float("nan")
    got = run.step({"a": new, "bad": new})
    torch.testing.assert_close(got[: len(new)], alone.step({"a": new}), atol=1e-5, rtol=0)
    assert got[len(new) :].isnan().all()


def test_decode_and_prefill_share_a_step(tiny: Transformer, runner) -> None:
    run = runner(tiny)
    run.step({"old": PROMPT[:9], "replayed": PROMPT[:6]})
    got = run.step({"old": PROMPT[9:10], "new": PROMPT[:12], "replayed": PROMPT[6:11]})

    whole = runner(tiny).step({"a": PROMPT})
    want = torch.cat([whole[9:10], whole[:12], whole[6:11]])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_only_the_logits_asked_for_are_computed(tiny: Transformer, runner) -> None:
    whole = runner(tiny).step({"a": PROMPT})
    run = runner(tiny)

    none = run.step({"a": PROMPT[:20]}, logits=[])
    some = run.step({"a": PROMPT[20:]}, logits=[20, 3])

    assert none.shape == (0, 96)
    assert none.dtype == some.dtype == torch.float32
    torch.testing.assert_close(some, whole[[40, 23]], atol=1e-5, rtol=0)


def test_hooks_see_each_layer_start_and_its_kv_written(tiny: Transformer, runner) -> None:
    run = runner(tiny)
    calls: list[tuple[str, int, int]] = []

    def record(kind: str, layer: int) -> None:
        written = run.cache.k[layer].isnan().logical_not().any(dim=(-1, -2)).sum()  # tokens
        calls.append((kind, layer, int(written)))

    run.step(
        {"a": PROMPT},
        layer_start=lambda layer: record("start", layer),
        kv_written=lambda layer: record("written", layer),
    )

    tokens = len(PROMPT)
    assert calls == [event for layer in range(3) for event in (("start", layer, 0), ("written", layer, tokens))]


@pytest.mark.parametrize("hook", ["layer_start", "kv_written"])
def test_a_hook_that_raises_aborts_the_step(hook: str, tiny: Transformer, runner) -> None:
    class Aborted(Exception):
        pass

    def abort(layer: int) -> None:
        if layer == 1:
            raise Aborted

    run = runner(tiny)
    with pytest.raises(Aborted):
        run.step({"a": PROMPT}, **{hook: abort})
    assert run.cache.k[2].isnan().all()  # layer 2 never ran


def test_bfloat16_is_close(save_model, runner, tmp_path: Path) -> None:
    save_model(CONFIGS["llama"])
    exact = runner(Transformer.load(tmp_path, torch.float32, CPU)).step({"a": PROMPT})
    model = Transformer.load(tmp_path, torch.bfloat16, CPU)

    run = runner(model)
    got = torch.cat([run.step({"a": PROMPT[:40]}), run.step({"a": PROMPT[40:]})])

    assert got.dtype == torch.float32
    assert run.cache.k.dtype == torch.bfloat16
    assert (got - exact).abs().mean() < 0.05 * exact.std()


def test_a_cache_of_another_shape_is_refused(tiny: Transformer, runner, save_model, tmp_path: Path) -> None:
    save_model(LlamaConfig(**SHAPE | {"num_hidden_layers": 2}))
    run = runner(Transformer.load(tmp_path, torch.float32, CPU))
    run.model = tiny
    with pytest.raises(ValueError, match=r"\(2, 2, 8, torch.float32\); the model's are \(3, 2, 8"):
        run.step({"a": PROMPT})


def test_more_positions_than_the_checkpoint_allows_are_refused(tiny: Transformer) -> None:
    assert tiny.max_positions == 128
    with pytest.raises(ValueError, match=r"max_positions=129; this checkpoint allows 1\.\.128"):
        Transformer(tiny.config, tiny.weights, 129)
