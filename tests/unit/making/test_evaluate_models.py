"""Evaluations of tiny pairs against plain transformers."""

from __future__ import annotations

import json
import math
import re
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from overfill.api.tokenizer import Tokenizer
from overfill.cli.evaluate import compare_command, eval_command
from overfill.errors import InvalidRequest
from overfill.making.conversations import Conversation, Transcript
from overfill.making.evaluate import compare as comparison
from overfill.making.evaluate import greedy_answers
from overfill.making.evaluate.compare import compare
from overfill.making.evaluate.costs import PRECISIONS
from overfill.making.evaluate.evaluation import Evaluation, evaluate
from overfill.making.evaluate.evaluation_report import free_rows, save_summary
from overfill.making.evaluate.fake_quantization import fake_quantized_model
from overfill.making.evaluate.free_running import judge_answers
from overfill.making.evaluate.greedy_answers import Written
from overfill.making.pair_json import write_manifest
from overfill.making.seal import record_checksums
from overfill.making.tiny import make_tiny_pair
from overfill.model.loading import Weights, load_weights
from overfill.model.manifest import Pair
from overfill.model.pair_files import load_whole
from overfill.model.transformer import Transformer
from overfill.pair.checksums import checksums_match
from overfill.pair.hf_model import load_hf_model
from overfill.pair.reference import TwoStageReference, _forward

_GENERATOR = torch.Generator().manual_seed(8)
LENGTHS = ((30, 20), (5, 40), (1, 2), (700, 3), (12, 400), (40, 9))
KINDS = ("explain", "rewrite", "explain", "long", "explain", "rewrite")
TRANSCRIPTS = [
    Transcript(tuple(torch.randint(2, 512, (prompt + answer,), generator=_GENERATOR).tolist()), prompt, kind=kind)
    for (prompt, answer), kind in zip(LENGTHS, KINDS, strict=True)
]
ANSWER_TOKENS = sum(answer - 1 for _, answer in LENGTHS)


@pytest.fixture(scope="module")
def evaluation(tiny_pair: Path) -> Evaluation:
    return evaluate(tiny_pair, TRANSCRIPTS, free_running=False, dtype="float32")


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pair(tmp_path_factory.mktemp("pairs") / "identity", identity=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three conversations in a file."""
    texts = [("What is a block?", "A block holds sixteen tokens."), ("And a table?", "A row."), ("Why?", "For speed.")]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return file


def through_int8(vectors: torch.Tensor) -> torch.Tensor:
    scale = vectors.abs().amax(-1, keepdim=True) / 127
    return (vectors / scale).round() * scale


@torch.inference_mode()
def plain_figures(pair_folder: Path, transcripts: list[Transcript]) -> dict[str, tuple[float, float, float]]:
    """(NLL, KL, agreement) of each variant over answer tokens 1 and up, one transcript at a time."""
    reference = TwoStageReference(pair_folder)
    decoder = load_hf_model(reference.pair.decoder_path)
    full = load_hf_model(reference.pair.full_path)
    names = ("full", "two_stage", "two_stage_int8", "two_stage_int8_cache", "decoder_alone")
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in names}
    total = 0
    for transcript in transcripts:
        whole = torch.tensor([transcript.token_ids[:-1]])
        logits = {
            "full": full(whole).logits[0, transcript.answer_start :],
            "decoder_alone": decoder(whole).logits[0, transcript.answer_start :],
        }
        for name, rounded in (
            ("two_stage", None),
            ("two_stage_int8", through_int8),
            ("two_stage_int8_cache", through_int8),
        ):
            cache, _ = reference._prefill(transcript.prompt)
            for layer in cache.layers if rounded is not None else ():
                layer.keys, layer.values = rounded(layer.keys), rounded(layer.values)
                if name == "two_stage_int8_cache":  # the decoder's own KV is int8 too
                    layer.update = partial(_update_through, layer.update, rounded)
            logits[name] = _forward(decoder, list(transcript.answer[:-1]), transcript.answer_start, cache)
        targets = torch.tensor(transcript.answer[1:])
        truth = logits["full"].double().log_softmax(-1)
        total += len(targets)
        for name, own in logits.items():
            q = own.double().log_softmax(-1)
            nll = -q[torch.arange(len(targets)), targets].sum()
            kl = (truth.exp() * (truth - q)).sum()
            sums[name] += torch.stack([nll, kl, (truth.argmax(-1) == q.argmax(-1)).sum()])
    return {name: tuple((values / total).tolist()) for name, values in sums.items()}


def _update_through(update, rounded, keys, values, *args, **kwargs):
    return update(rounded(keys), rounded(values), *args, **kwargs)


def figures(evaluation: Evaluation) -> dict[str, tuple[float, float, float]]:
    return {
        name: (f.nll.overall.mean, f.kl.overall.mean, f.agreement.overall.mean)
        for name, f in evaluation.teacher_forced.items()
    }


def test_figures_are_those_of_plain_transformers(tiny_pair: Path, evaluation: Evaluation) -> None:
    expected = plain_figures(tiny_pair, TRANSCRIPTS)
    assert figures(evaluation).keys() == expected.keys()
    for name, values in figures(evaluation).items():
        # The last bit of a value decides how its code is rounded.
        close = 1e-4 if name in ("full", "two_stage", "decoder_alone") else 5e-3
        assert values == pytest.approx(expected[name], rel=close, abs=close), name
    assert figures(evaluation)["two_stage_int8"] != figures(evaluation)["two_stage"]
    assert figures(evaluation)["two_stage_int8_cache"] != figures(evaluation)["two_stage_int8"]
    assert evaluation.teacher_forced["two_stage"].kl.overall.mean > 0.1


def test_the_layer_map_is_followed(fresh: Callable[[], Path], evaluation: Evaluation) -> None:
    folder = fresh()
    write_manifest(folder, layer_map=[0, 1, 2, 2])
    mapped = evaluate(folder, TRANSCRIPTS, free_running=False, dtype="float32")
    assert figures(mapped)["two_stage"] == pytest.approx(plain_figures(folder, TRANSCRIPTS)["two_stage"], abs=1e-4)
    assert figures(mapped)["two_stage"] != pytest.approx(figures(evaluation)["two_stage"], abs=1e-2)
    assert figures(mapped)["decoder_alone"] == figures(evaluation)["decoder_alone"]


def test_every_answer_token_but_the_first_is_counted_where_it_stands(evaluation: Evaluation) -> None:
    for forced in evaluation.teacher_forced.values():
        for metric in (forced.nll, forced.kl, forced.agreement):
            assert metric.overall.count == ANSWER_TOKENS
            counts = {b.first: b.estimate.count for b in metric.by_position}
            assert counts[1] == len(LENGTHS)
            assert counts[256] == 400 - 256
            assert sum(counts.values()) == ANSWER_TOKENS


def test_what_cannot_be_judged_is_refused_before_checkpoints_are_read(tiny_pair: Path) -> None:
    read: list[str] = []

    def report(step: str, done: int, total: int) -> None:
        read.append(step)

    with pytest.raises(InvalidRequest, match="data: holds no answer of two tokens"):
        evaluate(tiny_pair, [], report=report)
    with pytest.raises(InvalidRequest, match=f"pairs: 2 are named {tiny_pair.name}; rename their folders"):
        next(compare([tiny_pair, tiny_pair], TRANSCRIPTS, report=report))
    assert read == []


def test_an_identity_pair_is_the_full_model(identity: Path) -> None:
    result = evaluate(identity, TRANSCRIPTS[:3], dtype="float32", max_tokens=24)
    for name in ("full", "two_stage", "decoder_alone"):
        nll, kl, agreement = figures(result)[name]
        assert agreement == 1, name
        assert kl == pytest.approx(0, abs=1e-4)
        assert nll == pytest.approx(figures(result)["full"][0], rel=1e-5)
    assert result.decoder == result.full
    assert result.free_running["full"] == result.free_running["two_stage"]


def test_free_running_answers_are_scored_by_the_full_model(tiny_pair: Path) -> None:
    prompts = TRANSCRIPTS
    result = evaluate(tiny_pair, prompts, dtype="float32", max_tokens=24)
    reference = TwoStageReference(tiny_pair)
    answers = [reference.generate(t.prompt, 24) for t in prompts]
    written = [Transcript((*t.prompt, *answer), len(t.prompt)) for t, answer in zip(prompts, answers, strict=True)]
    total, count = 0.0, 0
    with torch.inference_mode():
        for transcript in written:
            logits = load_hf_model(tiny_pair / "full")(torch.tensor([transcript.token_ids[:-1]])).logits[0]
            rows = logits[transcript.answer_start - 1 :].double().log_softmax(-1)
            total -= float(rows[torch.arange(len(rows)), torch.tensor(transcript.answer)].sum())
            count += len(rows)
    found = result.free_running["two_stage"]
    assert [list(answer.token_ids) for answer in found.answers] == answers
    assert found.nll.overall.count == count
    assert found.nll.overall.mean == pytest.approx(total / count, rel=1e-4)
    assert found.tokens.overall.mean == count / len(answers)
    assert found.finished.overall.mean == sum(len(a) < 24 for a in answers) / len(answers)
    assert found.nll.by_position[0].first == 0
    assert len({figures.nll for figures in result.free_running.values()}) == 2  # two writers


def test_own_answers_are_compared_with_the_full_models_overall_and_by_kind(tiny_pair: Path) -> None:
    result = evaluate(tiny_pair, TRANSCRIPTS, dtype="float32", max_tokens=24)
    full, pair = result.free_running["full"], result.free_running["two_stage"]
    found = pair.beside(full)
    assert found.ratio == pytest.approx(found.perplexity / math.exp(full.nll.overall.mean))
    assert found.points == pytest.approx(100 * (pair.repeated.overall.mean - full.repeated.overall.mean))
    assert found.length == pytest.approx(pair.tokens.overall.mean / full.tokens.overall.mean)
    assert found.new_ratio == pytest.approx(math.exp(pair.new_nll.overall.mean - full.new_nll.overall.mean))
    own = full.beside(full)
    assert (own.ratio, own.ratio_error, own.points, own.length) == (1, 0, 0, 1)
    assert dict(result.kinds) == {"explain": 3, "rewrite": 2, "long": 1}
    lengths = [len(a.token_ids) for a, kind in zip(pair.answers, KINDS, strict=True) if kind == "explain"]
    printed = result.to_json()["free_running"]["two_stage"]["by_kind"]
    assert list(printed) == ["explain", "rewrite", "long"]
    assert printed["explain"]["tokens"] == sum(lengths) / len(lengths)
    kinds = result.teacher_forced["two_stage"].agreement.by_kind
    assert {kind: estimate.count for kind, estimate in kinds} == {"explain": 19 + 1 + 399, "rewrite": 39 + 8, "long": 2}


def test_answers_written_together_are_those_written_alone(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = evaluate(tiny_pair, TRANSCRIPTS, dtype="float32", max_tokens=24).free_running["two_stage"].answers
    monkeypatch.setattr(greedy_answers, "_CACHE_TOKENS", 16)  # the cache holds the longest sequence alone
    alone = evaluate(tiny_pair, TRANSCRIPTS, dtype="float32", max_tokens=24).free_running["two_stage"].answers
    assert [a.token_ids for a in alone] == [a.token_ids for a in together]


def test_the_limit_of_an_own_answer_is_that_of_the_given_answers_with_headroom(tiny_pair: Path) -> None:
    result = evaluate(tiny_pair, TRANSCRIPTS[:2], dtype="float32")
    assert result.max_tokens == 50  # the longest given answer has 40
    assert max(len(a.token_ids) for figures in result.free_running.values() for a in figures.answers) <= 50


def test_empty_answers_count_for_length_only(tiny_pair: Path) -> None:
    full = Transformer.load(tiny_pair / "full", torch.float32, torch.device("cpu"))
    transcripts = [Transcript((5, 6, 7, 8), 3)] * 3
    answers = [Written([8, 9, 10, 11, 12, 13]), Written([], finished=True), Written([8, 8, 8, 8, 8, 8])]
    found = judge_answers(full, Tokenizer.load(tiny_pair / "full"), transcripts, answers)
    assert (found.tokens.overall.mean, found.finished.overall.mean) == (4, pytest.approx(1 / 3))
    assert (found.nll.overall.count, found.repeated.overall.count) == (12, 6)
    assert [(b.first, b.estimate.mean) for b in found.repeated.by_position] == [(2, 0), (4, 0.5)]
    assert [round(a.repeated, 3) for a in found.answers] == [0, 0, 0.667]
    assert math.isnan(found.answers[1].nll)
    assert found.new_nll.overall.count == 6 + 4  # the last answer's second and third 4-gram repeat its first


def test_beside_empty_answers_a_length_is_no_number(tiny_pair: Path) -> None:
    full = Transformer.load(tiny_pair / "full", torch.float32, torch.device("cpu"))
    transcripts = [Transcript((5, 6, 7, 8), 3, kind="explain")] * 2
    written, nothing = (
        judge_answers(full, Tokenizer.load(tiny_pair / "full"), transcripts, [Written(tokens, finished=True)] * 2)
        for tokens in ([8, 9, 10, 11, 12], [])
    )
    found = written.beside(nothing, "explain")
    assert found.tokens == 5
    assert math.isnan(found.length)
    assert nothing.to_json(nothing)["length"] is None
    _, full_row, pair_row = free_rows(SimpleNamespace(free_running={"full": nothing, "two_stage": written}))  # type: ignore[arg-type]
    assert full_row == ["full model", "-", "-", "-", "-", "0", "100 %"]
    assert pair_row[2:] == ["-", "-", "-", "5", "100 %"]


def test_too_long_conversations_are_refused(tiny_pair: Path) -> None:
    with pytest.raises(InvalidRequest, match="3000 tokens; the pair's context is 2048"):
        evaluate(tiny_pair, [Transcript((5,) * 3000, 10)], free_running=False)


def test_comparison_judges_both_models_at_each_precision(tiny_pair: Path) -> None:
    points = list(compare([tiny_pair], TRANSCRIPTS, dtype="float32", max_tokens=24))
    found = {(p.name, p.precision): p for p in points}
    assert list(found) == [(n, p) for n in ("full model", "tiny") for p in PRECISIONS]
    full = [found["full model", p] for p in PRECISIONS]
    bf16, int8, *int4 = (p.agreement.mean for p in full)
    assert bf16 > int8 > max(int4)
    assert full[0].agreement.mean > 0.9  # random weights leave small margins
    assert full[0].kl.mean < full[1].kl.mean < min(p.kl.mean for p in full[2:])
    assert full[2].kl.mean != full[3].kl.mean
    assert [p.cost.bytes for p in full] == sorted((p.cost.bytes for p in full), reverse=True)
    assert len({p.cost.flops for p in full}) == 1
    assert found["tiny", "bf16"].cost.flops < full[0].cost.flops
    unrounded = plain_figures(tiny_pair, TRANSCRIPTS)
    assert found["tiny", "bf16"].kl.mean == pytest.approx(unrounded["two_stage"][1], rel=0.05)
    assert found["tiny", "bf16"].agreement.mean == pytest.approx(unrounded["two_stage"][2], abs=0.02)
    assert [p.precision for p in points if p.free is None] == ["int4", "int4"]
    assert found["full model", "bf16"].free.ratio == pytest.approx(1, rel=0.1)
    evaluated = evaluate(tiny_pair, TRANSCRIPTS, dtype="float32", max_tokens=24).free_running
    expected = evaluated["two_stage"].beside(evaluated["full"])
    assert found["tiny", "bf16"].free.ratio == pytest.approx(expected.ratio, rel=0.1)


def test_comparison_holds_one_decoder_and_one_copy_at_a_time(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(tiny_pair, tmp_path / "other"))
    copies: list[weakref.ref[torch.Tensor]] = []
    loaded: list[weakref.ref[torch.Tensor]] = []

    def rounded(*arguments: Any) -> Transformer:
        assert not any(copy() is not None for copy in copies)
        model = fake_quantized_model(*arguments)
        copies.append(weakref.ref(model.weights.head))
        return model

    def load(*arguments: Any) -> Weights:
        assert not any(decoder() is not None for decoder in loaded[1:])  # the first is the full model
        weights = load_weights(*arguments)
        loaded.append(weakref.ref(weights.head))
        return weights

    monkeypatch.setattr(comparison, "fake_quantized_model", rounded)
    monkeypatch.setattr(comparison, "load_weights", load)
    assert len(list(compare([tiny_pair, other], TRANSCRIPTS[:2], dtype="float32", max_tokens=4))) == 3 * len(PRECISIONS)
    assert (len(copies), len(loaded)) == (3 * len(PRECISIONS), 3)


def test_pairs_of_different_full_models_are_not_comparable(tiny_pair: Path, tmp_path: Path) -> None:
    other = make_tiny_pair(tmp_path / "other", seed=1)
    with pytest.raises(InvalidRequest, match="same full model"):
        list(compare([tiny_pair, other], TRANSCRIPTS))


def test_saving_keeps_a_valid_seal_and_a_loadable_pair(fresh: Callable[[], Path], evaluation: Evaluation) -> None:
    folder = fresh()
    record_checksums(folder)
    save_summary(folder, evaluation)
    assert checksums_match(folder)
    kept = load_whole(folder, digests=True).eval
    assert kept["two_stage"]["agreement"] == round(figures(evaluation)["two_stage"][2], 4)
    assert (kept["data"], kept["transcripts"]) == ("", len(TRANSCRIPTS))


def test_saving_does_not_bless_a_changed_folder(fresh: Callable[[], Path], evaluation: Evaluation) -> None:
    folder = fresh()
    record_checksums(folder)
    (folder / "full" / "generation_config.json").write_text("{}")
    save_summary(folder, evaluation)
    assert not checksums_match(folder)


def test_eval_prints_json_and_writes_a_report(fresh: Callable[[], Path], data: Path, tmp_path: Path) -> None:
    folder, out = fresh(), tmp_path / "report"
    arguments = [str(folder), "--data", str(data), "--max-tokens", "8", "--dtype", "float32", "--threads", "1"]
    result = CliRunner().invoke(eval_command, [*arguments, "--json", "--out", str(out), "--save"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads((out / "evaluation.json").read_text())
    assert printed["transcripts"] == 3
    assert printed["teacher_forced"]["two_stage"]["nll"]["by_position"][0]["count"] == 3
    assert printed["free_running"]["two_stage"]["perplexity"] > 1
    assert printed["max_tokens"] == 8
    assert [a["question"] for a in printed["answers"]] == ["What is a block?", "And a table?", "Why?"]
    assert printed["answers"][0]["two_stage"]["text"]
    page = (out / "report.md").read_text()
    images = re.findall(r"\]\((\S+\.png)\)", page)
    assert images == ["drift.png", "free_running.png"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in images)
    assert Pair.load(folder).eval["full"]["agreement"] == 1


def test_eval_shows_answers_side_by_side_in_80_columns(fresh: Callable[[], Path], data: Path) -> None:
    arguments = [str(fresh()), "--data", str(data), "--max-tokens", "8", "--threads", "1"]
    result = CliRunner().invoke(eval_command, arguments)
    assert result.exit_code == 0, result.output
    _, _, shown = result.stdout.partition("Answers of the pair are ordered")
    assert max(map(len, shown.splitlines())) <= 80
    for heading in ("median: perplexity", "most repetitive: perplexity", "least likely: perplexity"):
        assert f"\n{heading}" in shown
    assert shown.count("full model") == 4, "one in the rule, and one per example"
    assert all(f"\n{question}" in shown for question in ("What is a block?", "And a table?", "Why?"))


def test_the_judged_set_is_the_test_set_unless_another_is_named(
    tiny_pair: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def conversations(data: str) -> list[Conversation]:
        asked.append(data)
        return [Conversation(({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "For speed."}))]

    monkeypatch.setattr("overfill.making.conversations.judged_conversations", conversations)
    quick = ["--no-free-running", "--json"]
    for command in (eval_command, compare_command):
        for chosen in ([], ["--data", "development"]):
            result = CliRunner().invoke(command, [str(tiny_pair), *quick, *chosen])
            assert result.exit_code == 0, result.output
    assert asked == ["test", "development"] * 2


def test_compare_prints_json_lines_and_writes_a_plot(tiny_pair: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    arguments = [str(tiny_pair), "--data", str(data), "--max-tokens", "8", "--json", "--out", str(out)]
    result = CliRunner().invoke(compare_command, arguments)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["precision"] for line in lines] == [*PRECISIONS] * 2
    assert (out / "points.jsonl").read_text() == result.stdout
    assert (out / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert "4-bit layers" in (out / "report.md").read_text()


def test_int8_decoders_are_judged_as_they_are_served(identity: Path, tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    shutil.copytree(identity, folder)
    write_manifest(folder, decoder="full", recipe={"quantize": "int8"})
    result = evaluate(folder, TRANSCRIPTS, dtype="float32", max_tokens=8)
    points = compare([identity], TRANSCRIPTS, free_running=False, dtype="float32")
    point = next(p for p in points if p.precision == "int8")
    assert figures(result)["two_stage"] == pytest.approx(
        (point.nll.mean, point.kl.mean, point.agreement.mean), rel=1e-3
    )
    assert figures(result)["two_stage"][1] > 1e-3
    assert result.decoder == point.cost
    assert result.full.bytes > result.decoder.bytes
