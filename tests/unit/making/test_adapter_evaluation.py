"""An adapter's evaluation against plain transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from peft_adapters import add_tiny_adapter, load_peft

from overfill.cli.evaluate import eval_command
from overfill.making.conversations import Transcript
from overfill.making.evaluate.adapter_evaluation import evaluate_adapter
from overfill.making.tiny import make_tiny_pair
from overfill.model.adapter import read_adapter
from overfill.model.adapter_files import InvalidAdapter
from overfill.model.manifest import Pair
from overfill.pair.reference import TwoStageReference

TAIL = 5


@pytest.fixture(scope="module")
def folder(tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters with one."""
    directory = tmp_path_factory.mktemp("adapters") / "here"
    add_tiny_adapter(Pair.load(tiny_pair), directory, "planner", tail_tokens=TAIL)
    return directory


@torch.inference_mode()
def test_the_figures_are_those_of_plain_transformers_and_peft(tiny_pair: Path, folder: Path) -> None:
    pair = Pair.load(tiny_pair)
    adapter = read_adapter(folder / "planner", pair.decoder_config)
    plain = TwoStageReference(tiny_pair)
    (adapted,) = plain.with_adapters({"planner": folder / "planner"}).values()
    alone = load_peft(pair, folder / "planner")
    prompts = torch.randint(2, 512, (9, 40), generator=torch.Generator().manual_seed(3)).tolist()
    prompts = [prompt[: 8 + 4 * row] for row, prompt in enumerate(prompts)]
    # The adapter's own answers, so that they are right where it is served, and wrong otherwise.
    transcripts, sums, hits = [], dict.fromkeys(("full_kv", "own_prefill", "without"), 0.0), {}
    for prompt in prompts:
        if not (answer := adapted.generate(prompt, 6, len(prompt) - TAIL)):
            continue
        transcripts.append(Transcript((*prompt, *answer), len(prompt), tail=TAIL))
        logits = {"own_prefill": alone(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]}
        for variant, reference in (("full_kv", adapted), ("without", plain)):
            cache, first = reference._prefill(prompt, len(prompt) - TAIL)
            rest = reference._decode(answer[:-1], len(prompt), cache)
            logits[variant] = torch.cat([first, rest])
        for variant, rows in logits.items():
            targets = torch.tensor(answer)
            sums[variant] += float(torch.nn.functional.cross_entropy(rows, targets, reduction="sum"))
            hits[variant] = hits.get(variant, 0) + int((rows.argmax(-1) == targets).sum())
    found = evaluate_adapter(tiny_pair, adapter, transcripts, max_tokens=6, dtype="float32")
    count = sum(len(t.answer) for t in transcripts)
    assert len(transcripts) > 5
    for variant, figures in found.figures.items():
        assert figures.nll.overall.count == count
        assert figures.nll.overall.mean == pytest.approx(sums[variant] / count, rel=1e-4)
        assert figures.first.overall.mean == pytest.approx(hits[variant] / count)
    right = {variant: figures.right.mean for variant, figures in found.figures.items() if figures.right is not None}
    assert right["full_kv"] == 1
    assert max(right["own_prefill"], right["without"]) < 1


def test_an_adapter_is_judged_by_its_name(tiny_pair: Path, folder: Path, tmp_path: Path) -> None:
    texts = [("What is a block?", "Sixteen tokens."), ("And a table?", "A row."), ("Why?", "For speed.")]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts]
    data = tmp_path / "task.jsonl"
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))

    def run(*arguments: Any, pair: Path = tiny_pair) -> Any:
        line = [str(pair), "--adapters", str(folder), "--data", str(data), "--dtype", "float32", *map(str, arguments)]
        return CliRunner().invoke(eval_command, line, standalone_mode=False)

    result = json.loads(run("--adapter", "planner", "--json", "--max-tokens", 4).stdout)
    assert (result["adapter"], result["transcripts"], result["max_tokens"]) == ("planner", 3, 4)
    shown = run("--adapter", "planner", "--no-free-running").stdout
    for title in ("on the full model's KV", "with its own prefill", "decoder without it", "planner, 3 answers"):
        assert title in shown
    other = make_tiny_pair(tmp_path / "other", decoder_seed=1)
    for arguments, pair, error, says in (
        (["--adapter", "coder"], tiny_pair, InvalidAdapter, "has no adapter 'coder'; there are planner"),
        (["--adapter", "planner"], other, InvalidAdapter, "planner is of the decoder"),
        ([], tiny_pair, click.UsageError, "--adapters needs --adapter"),
        (["--adapter", "planner", "--save"], tiny_pair, click.UsageError, "--adapter conflicts with --save"),
    ):
        failed = run(*arguments, pair=pair).exception
        assert isinstance(failed, error)
        assert says in str(failed)
