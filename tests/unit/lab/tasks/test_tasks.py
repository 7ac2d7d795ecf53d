"""The four tasks over one prompt: their data, and the judge of what adapters answer."""

from __future__ import annotations

import json
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from overfill.api.tokenizer import Tokenizer
from overfill.lab.commands.bench_tasks import tasks_command
from overfill.lab.tasks.cases import TASKS, cases
from overfill.lab.tasks.judge import MAX_ANSWER, Judge, TaskWriter
from overfill.making.conversations import Transcript, encode, read_conversations
from overfill.making.identity_pair import identity_pair
from overfill.model.manifest import Pair
from tests.support.peft_adapters import add_tiny_adapter, load_peft


def test_all_tasks_have_the_same_prompts_of_about_the_wanted_length(tiny_pair: Path, tmp_path: Path) -> None:
    with identity_pair(tiny_pair / "full") as folder:
        done = CliRunner().invoke(tasks_command, ["--pair", str(folder), "--write", str(tmp_path)])
    assert done.exit_code == 0, done.output
    tokenizer = Tokenizer.load(tiny_pair / "full")
    by_task = {task: read_conversations(tmp_path / f"{task}.jsonl") for task in TASKS}
    prompts = {task: [c.prompt for c in conversations] for task, conversations in by_task.items()}
    assert all(each == prompts["row"] for each in prompts.values())
    assert len(set(prompts["row"])) == 1000
    held_out = [c.prompt for c in read_conversations(tmp_path / "row.held-out.jsonl")]
    assert not set(held_out) & set(prompts["row"])
    for conversations in by_task.values():
        transcripts = encode(conversations[:50], tokenizer)
        assert len({t.answer for t in transcripts}) > 40


def test_every_answer_follows_from_its_case() -> None:
    for case, _ in islice(cases(seed=3), 200):
        answer = json.loads(TASKS["extract"](case))
        assert (answer["product"], answer["order"]) == (case.order.product, case.order.number)
        assert sum(order.product == case.order.product for order in case.orders) == 1


def test_the_judge_counts_the_greedy_answers_of_transformers(tiny_pair: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    prompts = [tuple(torch.randint(2, 512, (n,), generator=generator).tolist()) for n in (7, 12, 9)]
    with identity_pair(tiny_pair / "full") as folder:
        pair = Pair.load(folder)
        adapter = add_tiny_adapter(pair, tmp_path / "adapters", "task")
        adapted = load_peft(pair, adapter)
        judge = Judge(pair, {"task": adapter}, 12 + MAX_ANSWER, "float32")
        own, base = TaskWriter("task", "task", own_prefill=True), TaskWriter("task", "", own_prefill=False)
        kept = TaskWriter("task", "task", own_prefill=False)
        counted = {}
        for name, writer in {"own": own, "base": base}.items():
            expected = []
            for prompt in prompts:
                with adapted.disable_adapter() if writer is base else torch.no_grad():
                    expected.append(_greedy(adapted, prompt, pair.full_config.eos_token_ids))
            transcripts = [Transcript((*p, *a), len(p), tail=2) for p, a in zip(prompts, expected, strict=True)]
            counted[name] = judge.scores([own, kept, base], {"task": transcripts}, "judging", lambda *_: None)
    assert counted["own"] == {own: 3, kept: 0, base: 0}
    assert counted["base"] == {own: 0, kept: 0, base: 3}


@torch.inference_mode()
def _greedy(model: Any, prompt: tuple[int, ...], stop: Collection[int]) -> tuple[int, ...]:
    ids = list(prompt)
    while len(ids) < len(prompt) + MAX_ANSWER:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return tuple(ids[len(prompt) :])


def test_a_pruned_pair_is_refused(tiny_pair: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(tasks_command, ["--pair", str(tiny_pair), "--write", str(tmp_path)])
    assert done.exit_code == 2
    assert "must be an identity pair" in done.output


@pytest.mark.parametrize("options", [[], ["--write", "a", "--adapters", "."]])
def test_it_either_writes_or_scores(options: list[str]) -> None:
    done = CliRunner().invoke(tasks_command, options)
    assert done.exit_code == 2
    assert "give --write FOLDER or --adapters FOLDER" in done.output
