"""Tests which adapters are read: PEFT's own files unchanged, and no others, each refused by name."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import load_peft, save_peft
from safetensors.torch import load_file, save_file

from overfill.model.adapter import PEFT_CONFIG, RECORD, WEIGHTS, read_adapter, read_record
from overfill.model.adapter_files import MAX_JSON_BYTES, InvalidAdapter
from overfill.model.manifest import Pair
from overfill.pair.adapters import adapter_names, add_adapter, remove_adapter, write_record

UP_0 = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def pair(tiny_pair: Path) -> Pair:
    return Pair.load(tiny_pair)


@pytest.fixture(scope="module")
def stored(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters with one of rank 4 on all projections."""
    folder = tmp_path_factory.mktemp("stored")
    add_adapter(folder, "planner", save_peft(pair, folder / ".peft"), pair, own_prefill=False)
    return folder


@pytest.fixture
def adapter(stored: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, which a test may damage."""
    copy = tmp_path / "planner"
    copy.mkdir()
    for file in (stored / "planner").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True, "r": 3, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 2]},
        {
            "target_modules": r".*\.(k|v|o|gate|up)_proj",
            "rank_pattern": {"k_proj": 2, r"^model\.layers\.0\.mlp\.up_proj$": 7},
            "alpha_pattern": {r".*\.o_proj": 5, "layers.3.self_attn.v_proj": 1.5},
        },
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "exclude_modules": ["up_proj"]},
    ],
)
def test_products_are_those_that_peft_computes(pair: Pair, tmp_path: Path, lora: dict[str, Any]) -> None:
    add_adapter(tmp_path / "adapters", "a", save_peft(pair, tmp_path / "peft", **lora), pair)
    folder = tmp_path / "adapters" / "a"
    read = read_adapter(folder, pair.decoder_config)
    peft = load_peft(pair, folder)
    found = {}
    for name, module in peft.named_modules():
        if hasattr(module, "get_delta_weight"):
            *_, layer, _, projection = name.split(".")
            found[int(layer), projection] = module.get_delta_weight("default")
    assert found.keys() == read.products.keys()
    for key, product in read.products.items():
        torch.testing.assert_close(product.up @ product.down, found[key].detach(), atol=1e-6, rtol=1e-5)
    assert read.record.rank == max(product.down.shape[0] for product in read.products.values())


def test_the_digest_identifies_weights_and_scales_only(pair: Pair, adapter: Path) -> None:
    def digest() -> str:
        return write_record(adapter, pair, own_prefill=True, training={}).digest

    digests = [read_record(adapter).digest, digest()]
    change_config(
        adapter, lora_dropout=0.5, base_model_name_or_path="x", target_modules=["q_proj"], inference_mode=False
    )
    digests.append(digest())
    assert len(set(digests)) == 1
    change_config(adapter, lora_alpha=9)
    digests.append(digest())
    change_config(adapter, lora_alpha=8)
    change_tensors(adapter, lambda tensors: tensors[f"{UP_0}.lora_A.weight"].mul_(2))
    digests.append(digest())
    assert len(set(digests)) == 3


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / PEFT_CONFIG).read_text())
    (folder / PEFT_CONFIG).write_text(json.dumps(config | fields))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("peft_type", "LOHA", "peft_type=LOHA is not supported: only LORA is"),
        ("peft_type", None, "peft_type=None is not"),
        ("use_dora", True, "use_dora=True is not supported: DoRA scales the decoder's own matrices"),
        ("modules_to_save", ["lm_head"], r"modules_to_save=\['lm_head'\] is not"),
        ("trainable_token_indices", [3], "trainable_token_indices"),
        ("alora_invocation_tokens", [1, 2], "alora_invocation_tokens"),
        ("layer_replication", [[0, 1], [0, 1]], "layer_replication"),
        ("bias", "all", "bias=all is not supported: only 'none' is"),
        ("lora_bias", True, "lora_bias=True is not supported: products have no bias"),
        ("target_parameters", ["x"], "target_parameters"),
        ("use_something_of_tomorrow", True, "use_something_of_tomorrow=True is not supported"),
        ("init_lora_weights", "pissa", "init_lora_weights=pissa .*path_initial_model_for_weight_conversion"),
        ("init_lora_weights", ["eva"], "init_lora_weights"),
        ("r", 0, "r=0 is not supported: a whole number from 1 to 512"),
        ("r", 10**30, "a whole number from 1 to 512"),
        ("r", True, "r=True"),
        ("r", 8, "has the shape .*rank 8 in adapter_config.json"),
        ("lora_alpha", "8", "lora_alpha=8 is not supported: a finite number"),
        ("lora_alpha", 10**400, "lora_alpha=1000"),
        ("lora_alpha", 1e41, "has NaN or infinite elements, or has them when scaled"),
        ("use_rslora", "yes", "use_rslora"),
        ("rank_pattern", {"q_proj": -1}, "rank_pattern=.* an object of module names and numbers"),
        ("rank_pattern", {"q_proj": 2}, r"q_proj.lora_A.weight has the shape \(4, 64\); rank 2"),
        ("rank_pattern", [4], "rank_pattern"),
        ("alpha_pattern", {"((a+)+)+$": 2}, "alpha_pattern=.* regular expressions are not evaluated"),
    ],
)
def test_a_config_that_is_no_plain_lora_is_refused(
    pair: Pair, adapter: Path, field: str, value: Any, says: str
) -> None:
    change_config(adapter, **{field: value})
    with pytest.raises(InvalidAdapter, match=says):
        read_adapter(adapter, pair.decoder_config)


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put(f"{UP_0}.lora_magnitude_vector", torch.ones(64)), "lora_magnitude_vector is not supported: DoRA"),
        (put(f"{UP_0}.lora_B.bias", torch.ones(64)), "products have no bias"),
        (put("base_model.model.lm_head.lora_A.weight", torch.ones(4, 64)), "the head has no products"),
        (
            put("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 9)),
            "the embedding has no products",
        ),
        (put("base_model.model.lm_head.modules_to_save.weight", torch.ones(4)), "is not supported"),
        (put("base_model.model.score.weight", torch.ones(4)), "score.weight is not supported"),
        (
            rename(f"{UP_0}.lora_A.weight", "base_model.model.layers.0.mlp.up_proj.lora_A.weight"),
            "causal language model",
        ),
        (
            put(f"{UP_0.replace('.0.', '.4.')}.lora_A.weight", torch.ones(4, 64)),
            "of layer 4; the decoder has layers 0 to 3",
        ),
        (put(f"{UP_0.replace('.0.', '.00.')}.lora_A.weight", torch.ones(4, 64)), "is not supported"),
        (put(f"{UP_0}.lora_A.weight", torch.ones(4, 65)), r"shape \(4, 65\); rank 4 .* imply \(4, 64\)"),
        (put(f"{UP_0}.lora_A.weight", torch.ones(0, 64)), r"shape \(0, 64\)"),
        (put(f"{UP_0}.lora_A.weight", torch.ones(4, 64, dtype=torch.float64)), "is F64; supported are F32, BF16, F16"),
        (put(f"{UP_0}.lora_A.weight", torch.full((4, 64), torch.nan)), f"tensor {UP_0}.lora_A.weight has NaN"),
        (put(f"{UP_0}.lora_B.weight", torch.full((64, 4), torch.inf)), f"tensor {UP_0}.lora_B.weight has NaN"),
        (lambda tensors: tensors.pop(f"{UP_0}.lora_B.weight"), f"tensor {UP_0}.lora_B.weight is missing"),
        (lambda tensors: tensors.clear(), "has no tensors"),
        (lambda tensors: tensors[f"{UP_0}.lora_B.weight"].add_(1), "the digest .* were changed after"),
    ],
)
def test_tensors_that_the_decoder_cannot_use_are_refused(
    pair: Pair, adapter: Path, change: Callable[[dict[str, torch.Tensor]], object], says: str
) -> None:
    change_tensors(adapter, change)
    with pytest.raises(InvalidAdapter, match=says):
        read_adapter(adapter, pair.decoder_config)


def header_of(length: int, content: bytes) -> bytes:
    return struct.pack("<Q", length) + content


TWICE = (
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}0000'
)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (PEFT_CONFIG, b"{", "cannot be read as JSON"),
        (PEFT_CONFIG, b"[" * 100_000, "cannot be read as JSON"),
        (PEFT_CONFIG, b"[]", "must hold a JSON object, got list"),
        (PEFT_CONFIG, rb'{"peft_type": "LORA", "a\ud800\n": 1}', r"a\\ud800\\n=1 is not supported"),
        (PEFT_CONFIG, b'{"lora_alpha": NaN}', "NaN is not a number of JSON"),
        (PEFT_CONFIG, b" " * (MAX_JSON_BYTES + 1), f"has {MAX_JSON_BYTES + 1} bytes; at most {MAX_JSON_BYTES}"),
        (PEFT_CONFIG, None, "adapter_config.json: missing"),
        (WEIGHTS, None, "adapter_model.safetensors: missing"),
        (WEIGHTS, b"", "not a safetensors file"),
        (WEIGHTS, header_of(1 << 40, b"{}"), "header of 1099511627776 bytes"),
        (WEIGHTS, header_of(2, b"[]"), "not a safetensors file"),
        (WEIGHTS, header_of(100_000, b"[" * 100_000), "not a safetensors file"),
        (WEIGHTS, header_of(100_000, b"\xff" * 100_000), "not a safetensors file: UnicodeDecodeError"),
        (WEIGHTS, header_of(len(TWICE) - 4, TWICE), "names a tensor twice"),
        (WEIGHTS, bytes(8 << 20), "bytes; at most"),
        (RECORD, None, "overfill-adapter.json: missing; add PEFT's files with `overfill pair adapter add`"),
        (RECORD, b"{}", "format is 'None'; it must be 'overfill-adapter/1'"),
    ],
)
def test_damaged_files_are_refused(pair: Pair, adapter: Path, name: str, content: bytes | None, says: str) -> None:
    (adapter / name).unlink()
    if content is not None:
        (adapter / name).write_bytes(content)
    with pytest.raises(InvalidAdapter, match=says) as caught:
        read_adapter(adapter, pair.decoder_config, max_rank=16)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1100


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("digest", "0" * 63, "digest is '0{63}'; it must be a SHA-256"),
        ("decoder_digest", None, "decoder_digest"),
        ("rank", 513, "a whole number from 1 to 512"),
        ("rank", 3, "rank is 3, but the largest of the products is 4"),
        ("rank", 17, "has rank 17; at most 16 .*--max-adapter-rank"),
        ("tail_tokens", 257, "a whole number from 0 to 256"),
        ("tail_tokens", True, "a whole number from 0 to 256"),
        ("own_prefill", 1, "true or false"),
    ],
)
def test_a_record_with_a_wrong_field_is_refused(pair: Pair, adapter: Path, field: str, value: Any, says: str) -> None:
    record = json.loads((adapter / RECORD).read_text())
    (adapter / RECORD).write_text(json.dumps(record | {field: value}))
    with pytest.raises(InvalidAdapter, match=says):
        read_adapter(adapter, pair.decoder_config, max_rank=16)


def test_pickled_weights_are_not_read(pair: Pair, adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(InvalidAdapter, match=r"adapter_model.bin is not read: loading it could run code"):
        read_adapter(adapter, pair.decoder_config)


@pytest.mark.parametrize(
    ("kind", "says"),
    [("fifo", "not a regular file"), ("folder", "not a regular file"), ("link", "is a link"), ("device", "is a link")],
)
def test_only_regular_files_of_the_folder_are_opened(pair: Pair, adapter: Path, kind: str, says: str) -> None:
    file, outside = adapter / WEIGHTS, adapter.with_name("outside")
    file.rename(outside)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else outside)
    with pytest.raises(InvalidAdapter, match=says):
        read_adapter(adapter, pair.decoder_config)


def test_a_link_to_an_adapter_is_no_adapter(pair: Pair, stored: Path, tmp_path: Path) -> None:
    (tmp_path / "planner").symlink_to(stored / "planner")
    with pytest.raises(InvalidAdapter, match="is a link, which is not followed"):
        read_adapter(tmp_path / "planner", pair.decoder_config)
    assert adapter_names(tmp_path) == []
    # The person who adds one may name it by a link: its files are copied.
    assert add_adapter(tmp_path, "copy", tmp_path / "planner", pair).digest == read_record(stored / "planner").digest


def test_a_folder_that_changes_while_it_is_read_gives_one_adapter_or_an_error(
    pair: Pair, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def replaced(path: Any, flags: int, *rest: Any, **how: Any) -> int:
        if path == WEIGHTS:
            change()
        return real(path, flags, *rest, **how)

    monkeypatch.setattr("overfill.model.adapter_files.os.open", replaced)
    expected, other = read_record(adapter).digest, adapter.with_name("other")

    def replace() -> None:  # as `remove` and `add` do
        adapter.rename(other)
        adapter.mkdir()

    change = replace
    assert read_adapter(adapter, pair.decoder_config).record.digest == expected
    adapter.rmdir()
    other.rename(adapter)
    change = partial(remove_adapter, adapter.parent, adapter.name)
    with pytest.raises(InvalidAdapter, match="missing"):
        read_adapter(adapter, pair.decoder_config)
