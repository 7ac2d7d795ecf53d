"""The adapter for the lm-evaluation-harness, against the harness's own model, on local task files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from harness_tasks import QUESTIONS, flat, run_harness, write_tasks

from overfill.errors import InvalidRequest
from overfill.making.tiny import make_tiny_pair
from overfill.pair.hf_model import load_hf_model, load_tokenizer
from overfill.pair.reference import TwoStageReference, _forward

pytest.importorskip("lm_eval", reason="needs the extra `eval`")
# The harness and its data sets emit warnings of their own.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pair(tmp_path_factory.mktemp("pairs") / "identity", identity=True)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def instances(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in args]


@torch.inference_mode()
def two_stage(folder: Path, context: str, continuation: str) -> tuple[float, bool]:
    """The likelihood of a continuation, computed with plain transformers."""
    reference, tokenizer = TwoStageReference(folder), load_tokenizer(folder / "full")
    prompt = tokenizer(context)["input_ids"]
    answer = tokenizer(context + continuation)["input_ids"][len(prompt) :]
    cache, logits = reference._prefill(prompt)
    if len(answer) > 1:
        own = _forward(load_hf_model(reference.pair.decoder_path), answer[:-1], len(prompt), cache)
        logits = torch.cat([logits, own])
    targets = torch.tensor(answer)
    values = logits.double().log_softmax(-1)[torch.arange(len(answer)), targets]
    return float(values.sum()), bool((logits.argmax(-1) == targets).all())


def test_an_identity_pair_scores_as_the_harness_own_model(identity: Path, tasks: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from overfill.making.evaluate.lm_eval_adapter import LocalLM

    theirs = HFLM(pretrained=str(identity / "full"), dtype="float32", device="cpu", batch_size=3)
    expected, expected_answers = run_harness(theirs, tasks)
    found, answers = run_harness(LocalLM(identity, dtype="float32"), tasks)
    assert answers["tiny_write"] == expected_answers["tiny_write"]
    assert any("e" not in text and text for ((text,),) in answers["tiny_write"])
    for task in ("tiny_choose", "tiny_read"):
        assert flat(answers[task]) == pytest.approx(flat(expected_answers[task]), rel=1e-4, abs=1e-4)
    for task, metric in (("tiny_choose", "acc"), ("tiny_choose", "acc_norm"), ("tiny_read", "bits_per_byte")):
        assert found[task][f"{metric},none"] == pytest.approx(expected[task][f"{metric},none"], rel=1e-4)


def test_the_first_token_is_the_full_models_and_the_rest_the_decoders(tiny_pair: Path) -> None:
    from overfill.making.evaluate.lm_eval_adapter import LocalLM

    pairs = [(f"Question: {q['question']}?", f" {choice}") for q in QUESTIONS for choice in q["choices"]]
    found = LocalLM(tiny_pair, dtype="float32").loglikelihood(instances(*pairs), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        expected, expected_greedy = two_stage(tiny_pair, context, continuation)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert greedy is expected_greedy


def test_greedy_answers_are_greedy(tiny_pair: Path) -> None:
    """Scoring finds each token of the pair's own answer most likely."""
    from overfill.making.evaluate.lm_eval_adapter import LocalLM

    model = LocalLM(tiny_pair, dtype="float32")
    contexts = ["Numbers such as 0", "Write a short story", "x"]
    written = model.generate_until(instances(*((c, {"until": [], "max_gen_toks": 6}) for c in contexts)))
    reference, tokenizer = TwoStageReference(tiny_pair), load_tokenizer(tiny_pair / "full")
    expected = [reference.generate(tokenizer(c)["input_ids"], 6) for c in contexts]
    assert written == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]


def test_long_texts_are_read_in_windows(identity: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from overfill.making.evaluate import lm_eval_adapter

    model = lm_eval_adapter.LocalLM(identity, dtype="float32")
    monkeypatch.setattr(model, "max_length", 8)
    text = "The full model reads the whole prompt and the decoder writes the answer. " * 2
    ids = model.tok_encode(text)
    assert len(ids) > 16
    plain, total = load_hf_model(identity / "full"), 0.0
    for start in range(0, len(ids), 8):
        predicted = ids[start : start + 8]
        # The last window starts with tokens that were predicted before.
        context = ([0] if start == 0 else ids[max(0, start + len(predicted) - 9) : start])[-(9 - len(predicted)) :]
        with torch.inference_mode():
            logits = plain(torch.tensor([[*context, *predicted][:-1]])).logits[0, len(context) - 1 :]
        total += float(logits.double().log_softmax(-1)[torch.arange(len(predicted)), torch.tensor(predicted)].sum())
    assert model.loglikelihood_rolling(instances((text,))) == [pytest.approx(total, rel=1e-4)]


def test_options_that_nothing_reads_are_refused(tiny_pair: Path) -> None:
    from overfill.making.evaluate.lm_eval_adapter import LocalLM

    model = LocalLM(tiny_pair, dtype="float32")
    with pytest.raises(InvalidRequest, match="num_beams is not supported"):
        model.generate_until(instances(("a", {"num_beams": 4})))
    with pytest.raises(InvalidRequest, match="context of 2048"):
        model.generate_until(instances(("a", {"max_gen_toks": 4000})))


def test_the_command_prints_json(tiny_pair: Path, tasks: Path) -> None:
    from overfill.cli.evaluate import lm_eval_command

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = [str(tiny_pair), "--tasks", "tiny_choose", "--include-path", str(tasks), "--limit", "4", "--json"]
        result = CliRunner().invoke(lm_eval_command, arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)["tiny_choose"]
    assert figures["acc"]["value"] in (0, 0.25, 0.5, 0.75, 1)
    assert figures["acc"]["stderr"] is not None
