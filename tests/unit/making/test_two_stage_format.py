"""Decoders in the format of OverFill's authors: imported with sizes from their tensors, served right, or refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from imported_pairs import FORMATS, assert_right_answers, imported, quantise
from json_edits import edit
from published_configs import LLAMA_32_3B
from safetensors.torch import load_file, save_file
from two_stage_format import write_two_stage

from overfill.errors import InvalidPair, UnsupportedModel
from overfill.making.import_pair import plan_import
from overfill.making.pair_json import write_manifest
from overfill.making.recipe import KeptLayers, kept_layers
from overfill.model.config import ModelConfig
from overfill.model.loading import expected_shapes
from overfill.model.manifest import Pair
from overfill.model.pair_files import load_whole
from overfill.pair.hf_config import decoder_config


@pytest.mark.parametrize("teacher", [False, True], ids=["alone", "with-teacher"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_every_form_gives_the_built_decoder(sharded: bool, teacher: bool, tiny_pair: Path, tmp_path: Path) -> None:
    checkpoint = write_two_stage(tiny_pair, tmp_path / "published", sharded=sharded, teacher=teacher)
    pair = imported(tiny_pair, tmp_path / "out", checkpoint)
    assert pair.decoder_digest == Pair.load(tiny_pair).decoder_digest
    load_whole(pair.folder, digests=True)


@pytest.mark.parametrize(("strategy", "kept"), [("firstlast", (0, 2, 3)), ("first", (0, 1, 2)), ("last", (1, 2, 3))])
def test_dropped_layers(strategy: KeptLayers, kept: tuple[int, ...], tiny_pair: Path, tmp_path: Path) -> None:
    checkpoint = write_two_stage(tiny_pair, tmp_path / "published", kept=kept)
    with pytest.raises(InvalidPair, match="3 layers and the full model 4: say with --layer-map"):
        plan_import(tiny_pair / "full", checkpoint)
    pair = imported(tiny_pair, tmp_path / "out", checkpoint, layer_map=strategy)
    assert pair.layer_map == kept
    assert_right_answers(pair.folder)


def test_the_strategies_are_the_authors() -> None:
    # Computed with `get_kept_layers_prune` of the authors' code.
    assert kept_layers("firstlast", 28, 4) == (0, 25, 26, 27)
    assert kept_layers("first", 28, 4) == (0, 1, 2, 3)
    assert kept_layers("last", 28, 4) == (24, 25, 26, 27)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({}, None),
        ({"depth_prune_ratio": "0.25"}, None),
        ({"depth_prune_ratio": "0.5"}, r"depth_prune_ratio 0\.5 keeps 2 of 4 layers, but the tensors have 3"),
        ({"depth_prune_ratio": "half"}, "depth_prune_ratio is 'half'; it must be a number"),
        ({"depth_prune_strategy": "middle"}, "depth_prune_strategy is 'middle'; known are first, last, firstlast"),
    ],
)
def test_the_strategy_may_stand_in_config_json(
    change: dict[str, object], refusal: str | None, tiny_pair: Path, tmp_path: Path
) -> None:
    checkpoint = write_two_stage(tiny_pair, tmp_path / "published", kept=(1, 2, 3))
    config = {"depth_prune_strategy": "last", "depth_prune_ratio": 0.25, "embedding_transform_strategy": "kv_prune"}
    (checkpoint / "config.json").write_text(json.dumps(config | change))
    if refusal is None:
        assert plan_import(tiny_pair / "full", checkpoint).layer_map == (1, 2, 3)
        return
    with pytest.raises(InvalidPair, match=refusal):
        plan_import(tiny_pair / "full", checkpoint)


def test_a_layer_map_that_contradicts_the_strategy_gives_a_warning(tiny_pair: Path, tmp_path: Path) -> None:
    checkpoint = write_two_stage(tiny_pair, tmp_path / "published", kept=(1, 2, 3))
    (checkpoint / "config.json").write_text(json.dumps({"depth_prune_strategy": "last"}))
    plan = plan_import(tiny_pair / "full", checkpoint, "first")
    assert plan.layer_map == (0, 1, 2)
    (warning,) = plan.warnings
    assert "the layer map 0,1,2 was given, but depth_prune_strategy 'last'" in warning
    assert "means 1,2,3" in warning
    assert not plan_import(tiny_pair / "full", checkpoint, (1, 2, 3)).warnings


@pytest.mark.parametrize("stated", ["tensor", "config"])
def test_projected_kv_is_refused_by_name(stated: str, tiny_pair: Path, tmp_path: Path) -> None:
    checkpoint = write_two_stage(tiny_pair, tmp_path / "published")
    if stated == "config":
        (checkpoint / "config.json").write_text(json.dumps({"embedding_transform_strategy": "kv_proj_layer"}))
    else:
        change(checkpoint, {"embedding_proj.0.weight": torch.ones(32, 32)})
    with pytest.raises(UnsupportedModel, match="kv_proj_layer is not supported"):
        plan_import(tiny_pair / "full", checkpoint)


def test_another_teacher_is_refused(tiny_pair: Path, tmp_path: Path) -> None:
    checkpoint = write_two_stage(tiny_pair, tmp_path / "published", teacher=True)
    change(checkpoint, {"teacher.model.norm.weight": torch.zeros(64)})
    with pytest.raises(InvalidPair, match=r"teacher\.model\.norm\.weight differs.*another full model"):
        plan_import(tiny_pair / "full", checkpoint)


def test_frequencies_of_rope_in_the_teacher_are_no_weights(tiny_pair: Path, tmp_path: Path) -> None:
    checkpoint = write_two_stage(tiny_pair, tmp_path / "published", teacher=True)
    change(checkpoint, {"teacher.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    plan_import(tiny_pair / "full", checkpoint)


def test_the_teacher_of_a_quantised_full_model_is_compared_by_its_norms(
    fresh: Callable[[], Path], tmp_path: Path
) -> None:
    full = fresh() / "full"
    checkpoint = write_two_stage(full.parent, tmp_path / "published", teacher=True)
    quantise(full, "awq", FORMATS["awq"])
    plan_import(full, checkpoint)
    change(checkpoint, {"teacher.model.norm.weight": torch.zeros(64)})
    with pytest.raises(InvalidPair, match=r"teacher\.model\.norm\.weight differs"):
        plan_import(full, checkpoint)


@pytest.fixture
def tied(fresh: Callable[[], Path]) -> Path:
    """A pair whose halves' heads are their embeddings."""
    pair = fresh()
    for half in ("full", "decoder"):
        edit(pair / half / "config.json", lambda config: config.update(tie_word_embeddings=True))
        tensors = load_file(pair / half / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, pair / half / "model.safetensors")
    write_manifest(pair)
    return pair


def test_a_tied_head_is_found(tied: Path, tmp_path: Path) -> None:
    checkpoint = write_two_stage(tied, tmp_path / "published", teacher=True)
    pair = imported(tied, tmp_path / "out", checkpoint)
    assert pair.decoder_config.tie_embeddings
    assert pair.decoder_digest == Pair.load(tied).decoder_digest


def test_a_tied_head_may_be_stored_apart_from_its_embedding(tied: Path, tmp_path: Path) -> None:
    checkpoint = write_two_stage(tied, tmp_path / "published")
    embedding = load_file(checkpoint / "model.safetensors")["student.model.embed_tokens.weight"]
    change(checkpoint, {"student.lm_head.weight": embedding.clone()})
    pair = imported(tied, tmp_path / "out", checkpoint)
    assert pair.decoder_digest == Pair.load(tied).decoder_digest
    embedding[-1] += 1  # beyond the first rows
    change(checkpoint, {"student.lm_head.weight": embedding})
    assert not plan_import(tied / "full", checkpoint).decoder.config.tie_embeddings


def test_a_head_without_an_embedding(tiny_pair: Path, tmp_path: Path) -> None:
    checkpoint = write_two_stage(tiny_pair, tmp_path / "published")
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["student.model.embed_tokens.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(InvalidPair, match=r"has no matrix student\.model\.embed_tokens\.weight"):
        plan_import(tiny_pair / "full", checkpoint)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer.step", r"optimizer\.step is neither student\.… nor teacher\.…"),
        (
            "student.model.layers.9.mlp.up_proj.weight",
            r"missing are \[4, 5, 6, 7, 8\]",
        ),
        ("student.extra", r"extra is not part of"),
    ],
)
def test_a_tensor_that_does_not_belong_is_named(name: str, message: str, tiny_pair: Path, tmp_path: Path) -> None:
    checkpoint = write_two_stage(tiny_pair, tmp_path / "published")
    change(checkpoint, {name: torch.ones(2, 2)})
    with pytest.raises(InvalidPair, match=message):
        plan_import(tiny_pair / "full", checkpoint)


def test_a_two_stage_checkpoint_is_no_full_model(tiny_pair: Path, tmp_path: Path) -> None:
    checkpoint = write_two_stage(tiny_pair, tmp_path / "published")
    (checkpoint / "config.json").write_text((tiny_pair / "full" / "config.json").read_text())
    with pytest.raises(InvalidPair, match="give it as --decoder, not as --full"):
        plan_import(checkpoint, tiny_pair / "decoder")


def write_sparse(file: Path, config: ModelConfig, prefix: str = "") -> None:
    """Writes bfloat16 zeros as a sparse file, which takes no space."""
    header, offset = {}, 0
    for name, shape in expected_shapes(config).items():
        end = offset + 2 * shape.numel()
        header[prefix + name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    packed = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(packed)) + packed)
        stream.truncate(8 + len(packed) + offset)


def test_a_released_decoder_at_full_size_is_checked_from_headers(tiny_pair: Path, tmp_path: Path) -> None:
    full, decoder = tmp_path / "full", tmp_path / "decoder"
    full.mkdir()
    decoder.mkdir()
    (full / "config.json").write_text(json.dumps(LLAMA_32_3B))
    (full / "tokenizer.json").write_bytes((tiny_pair / "full" / "tokenizer.json").read_bytes())
    write_sparse(full / "model.safetensors", ModelConfig.from_dict(LLAMA_32_3B))
    sizes = {"hidden_size": 1689, "intermediate_size": 4505, "num_layers": 28, "tie_word_embeddings": True}
    write_sparse(decoder / "model.safetensors", ModelConfig.from_dict(decoder_config(LLAMA_32_3B, **sizes)), "student.")
    assert (full / "model.safetensors").stat().st_size > 6e9
    before = bytes_read()
    config = plan_import(full, decoder).decoder.config
    assert bytes_read() - before < 16e6
    assert (config.hidden_size, config.intermediate_size, config.tie_embeddings) == (1689, 4505, True)


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def change(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = checkpoint / "model.safetensors"
    save_file(load_file(file) | tensors, file)
