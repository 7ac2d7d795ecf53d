"""Adapters in training: what they learn, the files that they leave, and what of them plain PEFT computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import DynamicCache

from overfill.api.chat import encode_with_generation_prompt
from overfill.api.tokenizer import Tokenizer
from overfill.cli.pair import pair_group
from overfill.errors import InvalidRequest
from overfill.making.conversations import Conversation, Transcript, append_jsonl, encode
from overfill.making.distill import train
from overfill.making.distill.data import load_task
from overfill.making.distill.model import PackedModel
from overfill.making.distill.packed_rows import PackedRows, learnt_tokens
from overfill.making.distill.recipe import Data, Training, read_recipe
from overfill.making.distill.student import HeldOutResult
from overfill.making.distill.teacher import LogitsForm, Teacher
from overfill.making.distill.train import Run, run_folder
from overfill.making.identity_pair import identity_pair
from overfill.model.adapter import read_adapter
from overfill.model.manifest import Pair
from overfill.pair.hf_model import cache_argument
from overfill.request.answer_start import answer_start
from overfill.v1 import inference_pb2
from tests.support.peft_adapters import load_peft

TRAINING = Training(
    lora=2, steps=8, batch_transcripts=4, learning_rate=3e-3, cross_entropy=1, kl=0, eval_steps=4, pack_rows=40
)
TAIL = 3


def make_transcripts(count: int, seed: int) -> list[Transcript]:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(2, 512, (14 + i % 5,), generator=generator).tolist() for i in range(count)]
    return [Transcript(tuple(ids), 6 + i % 3, tail=TAIL) for i, ids in enumerate(tokens)]


HELD_OUT = make_transcripts(3, 1)


@pytest.fixture
def tiny_identity(tiny_pair: Path) -> Iterator[Path]:
    with identity_pair(tiny_pair / "full") as folder:
        yield folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "plot_runs", lambda runs, out: out.touch())
    monkeypatch.setattr(train, "native_dtype", lambda device: "float32")


def run(pair: Path, out: Path, training: Training = TRAINING, **options: Any) -> Run:
    return Run(Pair.load(pair), out, HELD_OUT, HELD_OUT, training, **options)  # so that the held-out loss falls


def test_the_decoder_computes_the_tail_and_learns_the_whole_answer_and_nothing_else() -> None:
    transcript = Transcript((10, 11, 12, 13, 14, 15, 16), 4, tail=2)
    given, whole = PackedRows.of_answers([transcript]), PackedRows.of_whole([transcript])
    assert (given.token_ids.tolist(), given.prefixes) == ([12, 13, 14, 15], (2,))
    assert (whole.token_ids.tolist(), whole.prefixes) == ([10, 11, 12, 13, 14, 15], (0,))
    for rows in (given, whole):
        assert rows.targets.tolist() == [14, 15, 16]
        assert rows.positions[rows.predicting].tolist() == [3, 4, 5]
    assert learnt_tokens(transcript) == 3
    assert PackedRows.of_prompts([transcript]).token_ids.tolist() == [10, 11]


@pytest.mark.parametrize("own_prefill", [False, True])
@pytest.mark.parametrize("identity", [False, True])
def test_peft_computes_the_loss_that_was_recorded(
    tiny_pair: Path, tiny_identity: Path, tmp_path: Path, own_prefill: bool, identity: bool
) -> None:
    pair = Pair.load(tiny_identity if identity else tiny_pair)
    out = run(pair.folder, tmp_path / "task", standalone=own_prefill).train()

    record = json.loads((out / "overfill-adapter.json").read_text())
    assert (record["own_prefill"], record["tail_tokens"]) == (own_prefill, 0)
    assert (out / "training" / "metrics.jsonl").exists()
    assert read_adapter(out, pair.decoder_config).record.decoder_digest == pair.decoder_digest
    adapted = load_peft(pair, out)
    total, tokens = 0.0, 0
    for t in HELD_OUT:
        total += _nll(adapted, pair, t, own_prefill)
        tokens += learnt_tokens(t)
    best = record["training"]["best"]
    assert best["held_out"]["nll"] == pytest.approx(total / tokens, rel=1e-3)
    first = json.loads((out / "training" / "metrics.jsonl").read_text().splitlines()[0])
    assert best["held_out"]["nll"] < 0.9 * first["held_out"]["nll"]


@torch.inference_mode()
def _nll(adapted: Any, pair: Pair, t: Transcript, own_prefill: bool) -> float:
    """Negative log likelihood of the answer, by plain transformers and PEFT."""
    start = 0 if own_prefill else t.decoder_start
    cache = DynamicCache(config=adapted.config)
    if start:
        from transformers import AutoModelForCausalLM

        full = AutoModelForCausalLM.from_pretrained(pair.full_path)
        read: Any = DynamicCache(config=full.config)
        full(torch.tensor([t.token_ids[:start]]), use_cache=True, **{cache_argument(full): read})
        for layer, source in enumerate(pair.layer_map):
            cache.update(read.layers[source].keys, read.layers[source].values, layer)
    positions = torch.arange(start, len(t.token_ids))[None]
    name = cache_argument(adapted.base_model.model)
    output = adapted(torch.tensor([t.token_ids[start:]]), position_ids=positions, use_cache=True, **{name: cache})
    logits = output.logits[0]
    of_answer = logits[t.answer_start - 1 - start : -1].log_softmax(-1)
    return -float(of_answer.gather(1, torch.tensor(t.answer)[:, None]).sum())


def test_the_adapter_of_the_lowest_held_out_loss_is_written(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: HeldOutResult(next(losses), 0.0, 0.0, 1))
    running = run(tiny_pair, tmp_path / "task")
    out = running.train()
    assert json.loads((out / "overfill-adapter.json").read_text())["training"]["best"]["step"] == 4
    up = running._student.decoder.trained["model.layers.0.self_attn.q_proj.lora_B.default.weight"]
    written = read_adapter(out, Pair.load(tiny_pair).decoder_config).products[0, "q_proj"].up
    assert not torch.equal(written, up.detach())


def test_only_the_adapter_is_trained(tiny_identity: Path, tmp_path: Path) -> None:
    running = run(tiny_identity, tmp_path / "task")
    running.train()
    decoder, full = running._student.decoder, running._teacher.model
    assert all(".lora_" in name for name in decoder.trained)
    assert decoder.model.embed_tokens.weight.data_ptr() == full.model.embed_tokens.weight.data_ptr()


def test_an_adapter_and_a_rank_are_refused_together() -> None:
    with pytest.raises(ValueError, match="rank trains a decoder and lora an adapter"):
        Training(steps=1, learning_rate=1e-3, rank=4, lora=4)


def conversations(count: int) -> list[Conversation]:
    return [
        Conversation(({"role": "user", "content": f"Say {i // 2}"}, {"role": "assistant", "content": f"It is {i}."}))
        for i in range(count)
    ]


def test_conversations_with_one_prompt_are_all_on_one_side(tiny_pair: Path, tmp_path: Path) -> None:
    append_jsonl(tmp_path / "task.jsonl", conversations(40))
    data = Data(source=str(tmp_path / "task.jsonl"), tail_tokens=0, held_out_share=0.3)
    tokenizer = Tokenizer.load(tiny_pair / "full")
    loaded = load_task(data, tokenizer)
    judged = {c.prompt for c in loaded.judged}
    trained = {t.prompt for t in loaded.training if t is not None}
    assert len(loaded.judged) == 2 * len(judged)
    assert len(loaded.training) + len(loaded.judged) == 40
    assert not trained & {t.prompt for t in loaded.held_out}
    with pytest.raises(InvalidRequest, match="leaves no held-out conversation"):
        load_task(data.model_copy(update={"held_out_share": 0.0}), tokenizer)


@pytest.mark.parametrize("tail_tokens", [0, 5])
def test_training_and_serving_start_at_the_same_token(tiny_pair: Path, tail_tokens: int) -> None:
    tokenizer = Tokenizer.load(tiny_pair / "full")
    (transcript,) = encode(conversations(1), tokenizer, tail_tokens=tail_tokens)
    messages = [inference_pb2.ChatMessage(role="user", content="Say 0")]
    ids, opening = encode_with_generation_prompt(inference_pb2.Chat(messages=messages), tokenizer)
    assert opening > 1
    assert transcript.prompt == tuple(ids)
    assert transcript.decoder_start == answer_start(len(ids), tail_tokens, opening)


def test_the_command_trains_and_says_its_memory(tiny_pair: Path, tmp_path: Path) -> None:
    append_jsonl(tmp_path / "task.jsonl", conversations(12))
    arguments = ["finetune", str(tiny_pair), "--data", str(tmp_path / "task.jsonl"), "--lora", "2", "--threads", "1"]
    arguments += ["--held-out", str(tmp_path / "task.jsonl"), "--distill", "--tail-tokens", "2"]
    done = CliRunner().invoke(pair_group, [*arguments, "--steps", "2", "--out", str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    assert "peak memory: about 0.4 GiB on cpu" in done.stderr
    adapter = read_adapter(tmp_path / "a", Pair.load(tiny_pair).decoder_config)
    assert (adapter.record.tail_tokens, adapter.record.own_prefill, adapter.record.rank) == (2, False, 2)
    settings = json.loads((run_folder(tmp_path / "a") / "settings.json").read_text())
    assert (settings["cross_entropy"], settings["kl"]) == (0.0, 1.0)
    assert settings["learning_rate"] == read_recipe("adapter").training.learning_rate
    wrong = CliRunner().invoke(pair_group, [*arguments[:-1], "257", "--out", str(tmp_path / "b")])
    assert isinstance(wrong.exception, InvalidRequest)
    assert "tail_tokens" in str(wrong.exception)
    assert "256" in str(wrong.exception)


@pytest.mark.parametrize(("logits_form", "shared"), [("none", True), ("hidden", False)])
def test_the_cached_kv_of_prompts_is_that_of_every_task_on_them(
    tiny_pair: Path, logits_form: LogitsForm, shared: bool
) -> None:
    model = PackedModel.load(tiny_pair / "full", torch.float32, torch.device("cpu"))
    teacher = Teacher(model, range(4), with_prompt_kv=True, logits_form=logits_form)
    other_answers = [Transcript((*t.prompt, 7, 8, 9), t.answer_start, tail=TAIL) for t in HELD_OUT]
    other_tails = [Transcript(t.token_ids, t.answer_start, tail=TAIL - 1) for t in HELD_OUT]
    assert (teacher.reads(HELD_OUT) == teacher.reads(other_answers)) == shared
    assert teacher.reads(HELD_OUT) != teacher.reads(other_tails)
