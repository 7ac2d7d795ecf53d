from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from overfill.errors import InvalidPair
from overfill.making.checkpoint import write_decoder
from overfill.making.conversations import Transcript
from overfill.making.layer_selection import choose_layers
from overfill.making.layerwise import PackedTranscripts, fold_norms
from overfill.making.neuron_selection import removal_order
from overfill.making.prune import PruningPlan, Scores, leading_directions, make_pruning_plan, score, slice_weights
from overfill.making.sensitivity import measure_sensitivity
from overfill.making.tiny import Architecture, make_tiny_pair
from overfill.model.config import ModelConfig
from overfill.model.loading import Weights, load_weights
from overfill.pair.hf_model import load_hf_model

TOKENS = torch.randint(2, 512, (2, 20), generator=torch.Generator().manual_seed(0))
TRANSCRIPTS = [Transcript(tuple(TOKENS[0].tolist()), 5), Transcript(tuple(TOKENS[1, :12].tolist()), 9)]


def loaded(folder: Path) -> tuple[Weights, ModelConfig]:
    config = ModelConfig.load(folder)
    return fold_norms(load_weights(folder, config, torch.float32, torch.device("cpu"))), config


def some_scores(layers: int = 4, neurons: int = 128, hidden: int = 64) -> Scores:
    generator = torch.Generator().manual_seed(3)
    order = torch.stack([torch.randperm(neurons, generator=generator) for _ in range(layers)])
    directions = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator)).Q
    channels, channel_shares, direction_shares = torch.rand(3, hidden, generator=generator)
    return Scores(
        neurons=order,
        channels=channels,
        channel_shares=channel_shares / channel_shares.sum(),
        directions=directions,
        direction_shares=direction_shares / direction_shares.sum(),
        token_shares=torch.full((512,), 1 / 512),
    )


def plan_of(
    scores: Scores, hidden: int = 64, neurons: int = 128, layers: Sequence[int] = range(4), method: str = "rotate"
) -> PruningPlan:
    return make_pruning_plan(scores, hidden_size=hidden, intermediate_size=neurons, layers=layers, method=method)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_sliced_model_is_the_full_one_without_the_dropped_neurons_and_layers(
    architecture: Architecture, tmp_path: Path
) -> None:
    full = make_tiny_pair(tmp_path / "pair", architecture=architecture, identity=True) / "full"
    weights, _ = loaded(full)
    plan = plan_of(some_scores(), neurons=40, layers=[0, 1, 3])
    (tmp_path / "decoder").mkdir()
    write_decoder(tmp_path / "decoder", full, slice_weights(weights, plan))
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")

    model = AutoModelForCausalLM.from_pretrained(full)
    with torch.inference_mode():
        unpruned = model(TOKENS).logits
        model.model.layers[2].self_attn.o_proj.weight[:] = 0
        model.model.layers[2].mlp.down_proj.weight[:] = 0
        for index, kept in zip(plan.layers, plan.neurons, strict=True):
            dropped = torch.ones(128, dtype=torch.bool)
            dropped[kept] = False
            model.model.layers[index].mlp.down_proj.weight[:, dropped] = 0
        torch.testing.assert_close(decoder(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-4)
    assert not torch.allclose(decoder(TOKENS).logits, unpruned, atol=0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_norms_are_folded_without_a_second_copy_of_the_model(tied: bool, tiny_pair: Path) -> None:
    config = ModelConfig.load(tiny_pair / "full")
    weights = load_weights(tiny_pair / "full", config, torch.float32, torch.device("cpu"))
    if tied:
        weights = replace(weights, head=weights.embedding)
    embedding, head = weights.embedding.clone(), weights.head * weights.norm
    folded = fold_norms(weights)
    for before, after in zip(weights.layers, folded.layers, strict=True):
        assert all(getattr(before, name) is getattr(after, name) for name in ("qkv", "o", "gate_up", "down"))
    assert (folded.head is weights.head) != tied
    assert torch.equal(folded.head, head)
    assert torch.equal(folded.embedding, embedding)


def test_neurons_that_others_stand_in_for_go_first() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(400, 64, generator=generator)
    down = torch.randn(16, 64, generator=generator)
    outputs[:, 7] = outputs[:, 9] + 0.01 * torch.randn(
        400, generator=generator
    )  # 7 and 9 are nearly equal, so that one is superfluous
    down[:, 30] = 0  # feeds nothing
    down[:, 50] *= 50  # matters most
    places = removal_order(outputs.T @ outputs, down)
    assert sorted(places.tolist()) == list(range(64))
    assert places[30] < 48
    assert min(places[7], places[9]) < 48
    assert places[50] == 63


def test_scores_are_measured_on_answer_positions(tiny_pair: Path) -> None:
    weights, config = loaded(tiny_pair / "full")
    packed = PackedTranscripts.of(TRANSCRIPTS, rows_at_once=20)
    scores = score(weights, config, packed, measure_sensitivity(weights, config, packed))
    model = load_hf_model(tiny_pair / "full")
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            gain = norm.weight
            norm.register_forward_hook(lambda module, inputs, output, gain=gain: seen.append(output[0] / gain))
    with torch.inference_mode():
        logits = [model(torch.tensor([t.token_ids])).logits[0, t.answer_start :] for t in TRANSCRIPTS]
        answers = torch.cat([seen[i][5 if i < 8 else 9 :] for i in range(16)])
    torch.testing.assert_close(scores.channels, answers.abs().mean(0), rtol=1e-4, atol=1e-5)
    squares = answers.square().sum(0)
    torch.testing.assert_close(scores.channel_shares, squares / squares.sum(), rtol=1e-4, atol=1e-5)
    along = (answers @ scores.directions).square().sum(0)
    torch.testing.assert_close(scores.direction_shares, along / squares.sum(), rtol=1e-4, atol=1e-5)
    expected = torch.cat(logits).softmax(1).mean(0)
    torch.testing.assert_close(scores.token_shares, expected, rtol=1e-3, atol=1e-6)


def test_methods_choose_the_directions_they_say() -> None:
    scores = some_scores()
    channels = plan_of(scores, hidden=16, method="channel").basis
    assert channels.sum(0).tolist() == [1.0] * 16
    assert set(channels.argmax(0).tolist()) == set(scores.channels.topk(16).indices.tolist())
    assert torch.equal(plan_of(scores, hidden=16).basis, scores.directions[:, :16])


def test_a_cut_stream_is_scaled_to_its_size_before_it_was_normalised_again() -> None:
    stream = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 64)
    normed = stream / stream.square().mean(1, keepdim=True).sqrt()
    covariance = normed.T @ normed / len(normed)
    shares = covariance.diagonal() / covariance.trace()
    scores = replace(some_scores(), channels=shares, channel_shares=shares)
    plan = plan_of(scores, hidden=40, method="channel")
    cut = stream @ plan.basis
    again = cut / cut.square().mean(1, keepdim=True).sqrt() * plan.scale
    assert float((again - normed @ plan.basis).square().mean()) < 0.01


def reconstruction_error(basis: Tensor, covariance: Tensor, sensitivity: Tensor) -> float:
    """Error of reconstructing x from its measurements, weighted by the sensitivity."""
    solved = torch.linalg.solve(basis.T @ covariance @ basis, basis.T @ covariance)
    return float(torch.trace(sensitivity @ (covariance - covariance @ basis @ solved)))


def test_leading_directions_are_the_best_measurements_at_every_width() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 24, 24, generator=generator)
    covariance, sensitivity = first @ first.T, second @ second.T
    leading = leading_directions(covariance, sensitivity)
    torch.testing.assert_close(leading.T @ leading, torch.eye(24), atol=1e-4, rtol=0)
    principal = torch.linalg.eigh(covariance).eigenvectors.flip(1)
    for width in (2, 8, 20):
        best = reconstruction_error(leading[:, :width], covariance, sensitivity)
        assert best < reconstruction_error(principal[:, :width], covariance, sensitivity)
        for _ in range(20):
            other = leading[:, :width] + 0.05 * torch.randn(24, width, generator=generator)
            assert best <= reconstruction_error(other, covariance, sensitivity) * 1.0001
    plain = leading_directions(covariance, torch.eye(24))[:, :8]
    torch.testing.assert_close(plain @ plain.T, principal[:, :8] @ principal[:, :8].T, atol=1e-3, rtol=0)


def test_sensitivity_tells_what_the_answers_depend_on(tiny_pair: Path) -> None:
    weights, config = loaded(tiny_pair / "full")
    packed = PackedTranscripts.of(TRANSCRIPTS, rows_at_once=20)
    for layer in weights.layers[2:]:
        layer.qkv[:, 5] = 0
        layer.gate_up[:, 5] = 0
    weights.head[:, 5] = 0
    blind = measure_sensitivity(weights, config, packed)
    # Directions that nothing reads still matter through the size of the stream.
    assert float(blind.streams[3, 5, 5]) < 0.2
    assert float(blind.streams[3].diagonal().mean()) == pytest.approx(1, abs=0.01)


def test_sensitivity_keeps_the_streams_and_no_other_activations_of_all_layers(tiny_pair: Path) -> None:
    """MLP activations of all layers would take 12 MB per token at 8B, the streams take 4."""
    weights, config = loaded(tiny_pair / "full")
    packed = PackedTranscripts.of(TRANSCRIPTS)
    widths: Counter[int] = Counter()

    def note(tensor: Tensor) -> Tensor:
        if tensor.dim() == 2 and len(tensor) == len(packed.token_ids):
            widths[tensor.shape[1]] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        measure_sensitivity(weights, config, packed)
    assert widths[config.hidden_size] > config.num_layers
    assert widths.keys() <= {1, config.hidden_size}


def test_scores_survive_saving_and_know_their_checkpoint(tmp_path: Path) -> None:
    scores = some_scores()
    scores.save(tmp_path / "scores.safetensors", "abc")
    again = Scores.load(tmp_path / "scores.safetensors", "abc")
    assert again is not None
    for field in fields(Scores):
        assert torch.equal(getattr(again, field.name), getattr(scores, field.name))
    assert Scores.load(tmp_path / "scores.safetensors", "other") is None
    with pytest.raises(InvalidPair, match=r"none\.safetensors"):
        Scores.load(tmp_path / "none.safetensors", "abc")


def test_the_layer_that_does_least_goes_first(tiny_pair: Path) -> None:
    weights, config = loaded(tiny_pair / "full")
    weights.layers[2].o.zero_()
    weights.layers[2].down.mul_(0.01)
    assert choose_layers(weights, config, PackedTranscripts.of(TRANSCRIPTS), 3) == [0, 1, 3]
