"""The differentiable forward pass and the fused loss, compared with plain transformers and plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from json_edits import edit
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from overfill.errors import UnsupportedModel
from overfill.making.conversations import Transcript
from overfill.making.distill import attention
from overfill.making.distill.attention import Padded, PerTranscript
from overfill.making.distill.loss import (
    LossSums,
    LossWeights,
    TeacherView,
    compare_with_teacher,
    distillation_loss,
    top_k_distillation_loss,
)
from overfill.making.distill.model import Layer, PackedModel
from overfill.making.distill.packed_rows import PackedRows, in_packs
from overfill.making.distill.sampled_vocabulary import sample_vocabulary
from overfill.making.distill.teacher import Teacher
from overfill.making.pair_json import write_manifest
from overfill.making.tiny import Architecture, make_tiny_pair
from overfill.model.manifest import Pair
from overfill.pair.hf_model import load_hf_model
from overfill.pair.reference import TwoStageReference, _forward

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(7)


def transcript(prompt: int, answer: int) -> Transcript:
    return Transcript(tuple(torch.randint(2, 512, (prompt + answer,), generator=GENERATOR).tolist()), prompt)


TRANSCRIPTS = [transcript(9, 6), transcript(17, 2), transcript(1, 12)]


def load(folder: Path) -> PackedModel:
    return PackedModel.load(folder, torch.float32, CPU)


def two_stage_logits(folder: Path) -> torch.Tensor:
    pair = Pair.load(folder)
    decoder = load(pair.decoder_path)
    teacher = Teacher(load(pair.full_path), pair.layer_map, with_prompt_kv=True, logits_form="none")
    teacher_outputs = teacher(dict(enumerate(TRANSCRIPTS)))
    rows = PackedRows.of_answers(TRANSCRIPTS)
    with torch.no_grad():
        return decoder(rows, teacher_outputs.prefix)[rows.predicting] @ decoder.head.T


@torch.inference_mode()
def reference_logits(folder: Path) -> torch.Tensor:
    reference = TwoStageReference(folder)
    logits = []
    for t in TRANSCRIPTS:
        cache, _ = reference._prefill(t.prompt, None)
        logits.append(_forward(reference._decoder, list(t.answer[:-1]), len(t.prompt), cache))
    return torch.cat(logits)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_two_stage_logits_are_the_references(architecture: Architecture, tmp_path: Path) -> None:
    folder = make_tiny_pair(tmp_path / "pair", architecture=architecture)
    torch.testing.assert_close(two_stage_logits(folder), reference_logits(folder), rtol=0, atol=1e-4)


def test_the_decoder_reads_the_mapped_layers(tmp_path: Path) -> None:
    folder = make_tiny_pair(tmp_path / "pair")
    straight = two_stage_logits(folder)
    write_manifest(folder, layer_map=[0, 1, 2, 2])
    assert not torch.allclose(two_stage_logits(folder), straight, atol=0.1)
    torch.testing.assert_close(two_stage_logits(folder), reference_logits(folder), rtol=0, atol=1e-4)


def test_reading_prompts_itself_is_the_plain_model(tiny_pair: Path) -> None:
    decoder, plain = load(tiny_pair / "decoder"), load_hf_model(tiny_pair / "decoder")
    rows = PackedRows.of_whole(TRANSCRIPTS)
    with torch.no_grad():
        found = decoder(rows)[rows.predicting] @ decoder.head.T
        expected = [plain(torch.tensor([t.token_ids])).logits[0, t.answer_start : -1] for t in TRANSCRIPTS]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-4)
    assert rows.targets.tolist() == [token for t in TRANSCRIPTS for token in t.answer[1:]]


def test_gradients_are_plain_transformers(tiny_pair: Path) -> None:
    decoder, plain = load(tiny_pair / "decoder"), load_hf_model(tiny_pair / "decoder")
    rows = PackedRows.of_whole(TRANSCRIPTS)
    sums = distillation_loss(decoder(rows)[rows.predicting], decoder.head, rows.targets, None, LossWeights(1, 0))
    sums.loss.backward()
    for t in TRANSCRIPTS:
        logits = plain(torch.tensor([t.token_ids])).logits[0, t.answer_start : -1]
        cross_entropy(logits, torch.tensor(t.answer[1:]), reduction="sum").backward()
    expected = dict(plain.named_parameters())
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None
        scale = float(expected[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-4 * scale)


def test_low_rank_training_changes_factors_and_vectors_alone(tiny_pair: Path) -> None:
    decoder, before = load(tiny_pair / "decoder"), load(tiny_pair / "decoder")
    decoder.train_low_rank(4, seed=0)
    rows = PackedRows.of_whole(TRANSCRIPTS)

    def loss(model: PackedModel) -> torch.Tensor:
        return distillation_loss(model(rows)[rows.predicting], model.head, rows.targets, None, LossWeights(1, 0)).loss

    assert loss(decoder) == loss(before)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.01, weight_decay=0)
    for _ in range(2):
        loss(decoder).backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in decoder.trained.values())
    assert all(p.grad is None for p in decoder.parameters() if not p.requires_grad)
    merged, start = decoder.checkpoint(), before.checkpoint()
    assert merged.keys() == start.keys()
    changed = {name for name in merged if not torch.equal(merged[name], start[name])}
    assert merged.keys() - changed <= {"model.embed_tokens.weight"}
    ranks = {torch.linalg.matrix_rank(merged[n] - start[n], rtol=1e-3).item() for n in changed if merged[n].ndim == 2}
    assert ranks == {4}


def test_recomputing_activations_changes_no_gradient(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Layer] = []
    forward = Layer.forward

    def counted(layer: Layer, *given: Any) -> torch.Tensor:
        computed.append(layer)
        return forward(layer, *given)

    def gradients(remember: bool) -> list[torch.Tensor]:
        decoder = load(tiny_pair / "decoder")
        decoder.save_activations = remember
        decoder(PackedRows.of_whole(TRANSCRIPTS)).square().sum().backward()
        return [p.grad for p in decoder.model.parameters()]

    monkeypatch.setattr(Layer, "forward", counted)
    saved, once = gradients(True), len(computed)
    recomputed = gradients(False)
    assert len(computed) == 3 * once > 0
    assert all(torch.equal(one, other) for one, other in zip(saved, recomputed, strict=True))


@pytest.mark.parametrize("with_prefix", [True, False])
def test_all_forms_of_attention_agree(with_prefix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = PackedRows.of_answers(TRANSCRIPTS) if with_prefix else PackedRows.of_whole(TRANSCRIPTS)
    total, before = sum(rows.lengths), sum(rows.prefixes)
    inputs = [torch.randn(total, heads, 8, generator=GENERATOR, requires_grad=True) for heads in (6, 2, 2)]
    prefix = torch.randn(2, before, 2, 8, generator=GENERATOR) if with_prefix else None
    found = []
    for plan in (PerTranscript.of(rows), Padded.of(rows)):
        out = plan(*inputs, prefix)
        found.append([out.detach(), *torch.autograd.grad((out * torch.arange(48.0)).sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(PerTranscript.of(rows)(*inputs, prefix), found[0][0], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(attention, "_MAX_SAVED_CONTEXT", 1)  # the path of long transcripts
    out = PerTranscript.of(rows)(*inputs, prefix)
    long = [out, *torch.autograd.grad((out * torch.arange(48.0)).sum(), inputs)]
    for one, other in zip(long, found[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("ce", "kl"), [(0.3, 0.7), (1.0, 0.0), (0.0, 1.0)])
def test_the_fused_loss_is_cross_entropy_plus_kl(temperature: float, ce: float, kl: float) -> None:
    rows, vocab = 300, 61  # more than two chunks
    hidden = torch.randn(rows, 16, generator=GENERATOR, requires_grad=True)
    head = torch.randn(vocab, 16, generator=GENERATOR, requires_grad=True)
    teacher = TeacherView(torch.randn(rows, 24, generator=GENERATOR), torch.randn(vocab, 24, generator=GENERATOR))
    targets = torch.randint(0, vocab, (rows,), generator=GENERATOR)

    sums = distillation_loss(hidden, head, targets, teacher, LossWeights(ce, kl, temperature))
    found = torch.autograd.grad(sums.loss / rows, [hidden, head])

    logits, theirs = hidden @ head.T, teacher.hidden @ teacher.head.T
    plain_ce = cross_entropy(logits, targets, reduction="sum")
    soft, their_soft = (log_softmax(x / temperature, -1) for x in (logits, theirs))
    plain_kl = kl_div(soft, their_soft, log_target=True, reduction="sum") * temperature**2
    expected = torch.autograd.grad((ce * plain_ce + kl * plain_kl) / rows, [hidden, head])

    torch.testing.assert_close(sums.loss, ce * plain_ce + kl * plain_kl)
    torch.testing.assert_close(sums.cross_entropy.float(), plain_ce)
    torch.testing.assert_close(sums.kl.float(), plain_kl)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    compared = compare_with_teacher(hidden, head, targets, teacher)
    assert compared.nll == pytest.approx(plain_ce.item(), rel=1e-5)
    assert compared.agreed == int((logits.argmax(-1) == theirs.argmax(-1)).sum())


def test_a_checkpoint_that_is_stored_quantised_is_refused(fresh: Callable[[], Path]) -> None:
    folder = fresh() / "full"
    edit(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(UnsupportedModel, match="the weights are stored in fp8"):
        PackedModel.load(folder, torch.float32, CPU)


def test_packs_hold_everything_once_and_no_more_rows_than_allowed() -> None:
    sizes = [5, 50, 20, 7, 30, 1]
    packs = list(in_packs(range(6), sizes.__getitem__, 40))
    assert sorted(i for pack in packs for i in pack) == list(range(6))
    assert all(len(pack) == 1 or sum(sizes[i] for i in pack) <= 40 for pack in packs)
    assert packs == [[5, 0, 3, 2], [4], [1]]


def short_loss(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, teacher: TeacherView, k: int, sampled: int
) -> LossSums:
    top = (teacher.hidden @ teacher.head.T).softmax(-1).topk(k)
    generator = torch.Generator().manual_seed(0)
    shortlist = sample_vocabulary(targets, top.indices, len(head), sampled, generator)
    return top_k_distillation_loss(hidden, head, shortlist, top.values, LossWeights(0.3, 0.7))


def problem(rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TeacherView]:
    hidden = torch.randn(rows, 16, generator=GENERATOR, requires_grad=True)
    head = torch.randn(vocab, 16, generator=GENERATOR) * 0.3
    head.requires_grad_()
    teacher = TeacherView(torch.randn(rows, 24, generator=GENERATOR), torch.randn(vocab, 24, generator=GENERATOR))
    return hidden, head, torch.randint(0, vocab, (rows,), generator=GENERATOR), teacher


def test_all_tokens_as_top_tokens_give_the_whole_loss() -> None:
    hidden, head, targets, teacher = problem(150, 61)
    whole = distillation_loss(hidden, head, targets, teacher, LossWeights(0.3, 0.7))
    short = short_loss(hidden, head, targets, teacher, 61, 0)
    torch.testing.assert_close(short.loss, whole.loss, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(short.loss, [hidden, head]), torch.autograd.grad(whole.loss, [hidden, head]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_top_tokens_count_the_rest_as_one() -> None:
    hidden, head, targets, teacher = problem(150, 61)
    short = short_loss(hidden, head, targets, teacher, 5, 0)
    logits, theirs = (hidden @ head.T).softmax(-1), (teacher.hidden @ teacher.head.T).softmax(-1)
    top = theirs.topk(5)
    ours = logits.gather(1, top.indices)
    p = torch.cat([top.values, 1 - top.values.sum(1, keepdim=True)], 1)
    q = torch.cat([ours, 1 - ours.sum(1, keepdim=True)], 1)
    kl = (p * (p.log() - q.log())).sum()
    loss = 0.3 * cross_entropy(hidden @ head.T, targets, reduction="sum") + 0.7 * kl
    torch.testing.assert_close(short.kl.float(), kl, rtol=1e-4, atol=1e-4)
    for one, other in zip(
        torch.autograd.grad(short.loss, [hidden, head]), torch.autograd.grad(loss, [hidden, head]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_sampled_shortlist_estimates_the_loss() -> None:
    hidden, head, targets, teacher = problem(20, 4000)
    whole = short_loss(hidden, head, targets, teacher, 8, 0)
    short = short_loss(hidden, head, targets, teacher, 8, 1000)
    assert short.cross_entropy.item() == pytest.approx(whole.cross_entropy.item(), rel=0.03)
    assert short.loss.item() != whole.loss.item()
    gradients = [torch.autograd.grad(sums.loss, hidden)[0].flatten() for sums in (short, whole)]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95
    (found,) = torch.autograd.grad(short_loss(hidden, head, targets, teacher, 8, 1000).loss, head)
    assert 1000 < int((found != 0).any(1).sum()) <= 1000 + 9 * 20
