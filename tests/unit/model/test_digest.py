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
from overfill.making.finite import check_finite
from overfill.model.digest import StoredTensor, checkpoint_digest, list_tensors
from overfill.model.manifest import tokenizer_digest


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


@pytest.mark.parametrize("length", [0, 7, 200, -1])
def test_truncated_file_is_named(length: int, fresh: Callable[[], Path]) -> None:
    file = fresh() / "full" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InvalidPair, match=r"full/model\.safetensors"):
        list_tensors(file.parent)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shape": [3, 4]}, "tensor a has .* bytes, which do not fit"),
        ({"dtype": "BF16"}, "tensor a has .* bytes, which do not fit"),
        ({"data_offsets": [0, 44]}, "tensor a has .* bytes, which do not fit"),
        # A long shape would take seconds to multiply; the others would fit.
        ({"shape": [3, 5, *[1] * 15]}, "the shape of a is not a list of at most 16 dimensions"),
        ({"shape": [-3, -5]}, "of a are not text and whole numbers"),
        ({"shape": [3, 5.0]}, "of a are not text and whole numbers"),
        ({"data_offsets": [0.0, 60]}, "of a are not text and whole numbers"),
        ({"dtype": 5}, "of a are not text and whole numbers"),
    ],
    ids=str,
)
def test_entries_of_a_header_that_describe_no_tensor_are_refused(
    change: dict[str, object], says: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "c", {"a": torch.ones(3, 5), "b": torch.ones(1)})
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:end])
    header["a"].update(change)
    packed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(packed)) + packed + raw[end:])
    with pytest.raises(InvalidPair, match=says):
        list_tensors(folder)


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LINK = r"is a link to \.\./elsewhere, which does not exist"


@pytest.mark.parametrize(
    ("files", "links", "message"),
    [
        ({INDEX: '{"weight_map": {}}'}, [], "lists no files"),
        (
            {WEIGHTS: "version https://git-lfs.github.com/spec/v1\noid sha256:abc\n"},
            [],
            r"Git LFS pointer.*git lfs pull",
        ),
        ({}, [WEIGHTS], rf"{WEIGHTS} {LINK}"),
        ({}, [INDEX], rf"{INDEX} {LINK}"),
        (
            {INDEX: '{"weight_map": {"a": "model-1.safetensors"}}'},
            ["model-1.safetensors"],
            rf"model-1.safetensors {LINK}",
        ),
    ],
)
def test_what_is_no_checkpoint_is_named(files: dict[str, str], links: list[str], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for name in links:
        (tmp_path / name).symlink_to("../elsewhere")
    with pytest.raises(InvalidPair, match=message):
        list_tensors(tmp_path)


FINITE = {
    "F64": (torch.float64, [1.7e308, -1.7e308]),
    "F32": (torch.float32, [3e38, -3e38]),
    "BF16": (torch.bfloat16, [3e38, -3e38]),
    "F16": (torch.float16, [65504.0, -65504.0]),
    "F8_E4M3": (torch.float8_e4m3fn, [448.0, -448.0]),
    "F8_E5M2": (torch.float8_e5m2, [57344.0, -57344.0]),
}


@pytest.mark.parametrize("dtype", FINITE)
def test_nan_and_infinity_of_either_sign_are_found(dtype: str, tmp_path: Path) -> None:
    kind, values = FINITE[dtype]
    bad = [float("nan"), -float("nan")] + ([] if dtype == "F8_E4M3" else [float("inf"), -float("inf")])

    def check(numbers: list[float]) -> None:
        data = torch.tensor(numbers, dtype=torch.float64).to(kind).view(torch.uint8).numpy().tobytes()
        check_finite(StoredTensor("w", dtype, (len(numbers),), tmp_path, 0, len(data)), data)

    check([0.0, *values])
    for value in bad:
        with pytest.raises(InvalidPair, match="tensor w holds NaN or infinity"):
            check([*values, value])


@pytest.mark.parametrize("place", [0, -1])
def test_every_part_of_a_large_tensor_is_checked(place: int, tmp_path: Path) -> None:
    tensor = torch.zeros(400_000)
    checkpoint_digest(write(tmp_path / "good", {"w": tensor}), check=check_finite)
    tensor[place] = float("nan")
    with pytest.raises(InvalidPair, match="tensor w holds NaN or infinity"):
        checkpoint_digest(write(tmp_path / "bad", {"w": tensor}), check=check_finite)


def test_tokenizer_digest_is_of_the_file(tiny_pair: Path, tmp_path: Path) -> None:
    content = (tiny_pair / "full" / "tokenizer.json").read_bytes()
    assert tokenizer_digest(tiny_pair / "full") == hashlib.sha256(content).hexdigest()
    with pytest.raises(InvalidPair, match=r"tokenizer\.json: missing"):
        tokenizer_digest(tmp_path)
