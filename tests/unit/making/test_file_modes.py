"""The modes of a pair's files and folders follow the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from overfill.making.build import build_pair
from overfill.making.conversations import Conversation, Transcript
from overfill.making.distill import train
from overfill.making.distill.recipe import Training
from overfill.making.distill.train import Run
from overfill.making.recipe import DecoderRecipe
from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Pair

CHATS = [
    Conversation(
        ({"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}, a number."})
    )
    for n in range(40)
]


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check(root: Path, umask: int) -> None:
    found = {path: path.lstat().st_mode for path in root.rglob("*") if not path.is_symlink()}
    assert any(path.suffix == ".safetensors" for path in found)
    expected = {path: (0o777 if stat.S_ISDIR(mode) else 0o666) & ~umask for path, mode in found.items()}
    wrong = [f"{p.relative_to(root)} {stat.S_IMODE(m):o}" for p, m in found.items() if stat.S_IMODE(m) != expected[p]]
    assert wrong == []


def test_a_built_pair_with_its_scores(umask: int, tmp_path: Path) -> None:
    root = tmp_path / "root"
    full = make_tiny_pair(root / "tiny") / "full"
    build_pair(full, root / "built", DecoderRecipe(hidden_size=50, intermediate_size=64), CHATS)
    assert (root / "built" / "scores.safetensors").exists()
    check(root, umask)


def test_a_distilled_pair_with_its_checkpoints(
    umask: int, tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "plot_runs", lambda runs, out: out.touch())  # drawing takes seconds
    root = tmp_path / "root"
    transcripts = [Transcript(tuple(torch.arange(2 + i, 16 + i).tolist()), 4) for i in range(4)]
    training = Training(steps=2, batch_transcripts=2, eval_steps=2, checkpoint_steps=1, pack_rows=40)
    Run(Pair.load(tiny_pair), root / "out", transcripts, transcripts, training).train()
    check(root, umask)
