"""Tests the digest of a checkpoint: its layout, and that any change of a tensor changes it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from overfill.errors import InvalidPair
from overfill.model.config import ModelConfig
from overfill.model.digest import checkpoint_digest, list_tensors, tokenizer_digest
from overfill.model.loading import count_parameters


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_digest_is_the_documented_layout(tmp_path: Path) -> None:
    tensors = {"b": torch.tensor([[1.0, -2.0]]), "a": torch.tensor([3], dtype=torch.bfloat16)}
    expected = hashlib.sha256()
    for name, dtype, shape, data in (
        (b"a", b"BF16", (1,), bytes.fromhex("4040")),
        (b"b", b"F32", (1, 2), struct.pack("<2f", 1.0, -2.0)),
    ):
        expected.update(struct.pack("<Q", len(name)) + name)
        expected.update(struct.pack("<Q", len(dtype)) + dtype)
        expected.update(struct.pack(f"<{1 + len(shape)}Q", len(shape), *shape) + data)
    assert checkpoint_digest(write(tmp_path / "c", tensors)) == expected.hexdigest()


def test_digest_does_not_depend_on_files_or_metadata(tiny_pair: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_pair / "full" / "model.safetensors")
    names = sorted(tensors, reverse=True)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({n: tensors[n] for n in members}, tmp_path / file, metadata={"format": "pt", "note": file})
    weight_map = {n: file for file, members in shards.items() for n in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert checkpoint_digest(tmp_path) == checkpoint_digest(tiny_pair / "full")


@pytest.mark.parametrize(
    "changed",
    [
        {"w": torch.tensor([[1.0, 2.5]])},
        {"w": torch.tensor([1.0, 2.0])},
        {"w": torch.tensor([[1.0, 2.0]], dtype=torch.float64)},
        {"v": torch.tensor([[1.0, 2.0]])},
        {"w": torch.tensor([[1.0, 2.0]]), "x": torch.tensor([0.0])},
    ],
    ids=["value", "shape", "dtype", "name", "extra"],
)
def test_digest_sees_every_change(changed: dict[str, torch.Tensor], tmp_path: Path) -> None:
    before = checkpoint_digest(write(tmp_path / "a", {"w": torch.tensor([[1.0, 2.0]])}))
    assert checkpoint_digest(write(tmp_path / "b", changed)) != before


def test_progress_reaches_the_total(tiny_pair: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint_digest(tiny_pair / "full", lambda step, done, total: seen.append((done, total)))
    total = sum(t.end - t.start for t in list_tensors(tiny_pair / "full"))
    assert seen[-1] == (total, total)
    assert total == 4 * count_parameters(ModelConfig.load(tiny_pair / "full"))


@pytest.mark.parametrize("length", [0, 7, 200, -1])
def test_truncated_file_is_named(length: int, fresh: Callable[[], Path]) -> None:
    file = fresh() / "full" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InvalidPair, match=r"full/model\.safetensors"):
        list_tensors(file.parent)


def test_index_may_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    index = {"weight_map": {"w": "../other/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidPair, match="not a file name"):
        list_tensors(tmp_path)


def test_tokenizer_digest_is_of_the_file(tiny_pair: Path, tmp_path: Path) -> None:
    content = (tiny_pair / "full" / "tokenizer.json").read_bytes()
    assert tokenizer_digest(tiny_pair / "full") == hashlib.sha256(content).hexdigest()
    with pytest.raises(InvalidPair, match=r"tokenizer\.json: missing"):
        tokenizer_digest(tmp_path)
