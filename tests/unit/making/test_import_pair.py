"""Importing a pair: halves that fit are written with the right digests; all others are refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from imported_pairs import FORMATS, assert_right_answers, edit_tensors, imported, quantise
from json_edits import edit
from safetensors.torch import load_file, save_file
from two_stage_format import write_two_stage

from overfill import LLM
from overfill.errors import InvalidPair, UnsupportedModel
from overfill.making import import_pair
from overfill.making.import_pair import plan_import, write_import
from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Pair
from overfill.model.pair_files import load_whole
from overfill.pair.reference import TwoStageReference

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def source(fresh: Callable[[], Path]) -> Path:
    """A built pair whose halves the test may change."""
    return fresh()


def test_a_pair_imported_from_two_folders_equals_the_built_one(tiny_pair: Path, tmp_path: Path) -> None:
    built, pair = Pair.load(tiny_pair), imported(tiny_pair, tmp_path / "out")
    for name in ("full_digest", "decoder_digest", "tokenizer_digest", "layer_map", "full_config", "decoder_config"):
        assert getattr(pair, name) == getattr(built, name)
    load_whole(pair.folder, digests=True)
    assert pair.recipe == {"method": "imported"}


def test_the_files_are_links_that_survive_a_move_of_everything(tiny_pair: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pair, tmp_path / "a" / "built")
    imported(tmp_path / "a" / "built", tmp_path / "a" / "out")
    assert (tmp_path / "a" / "out" / "decoder" / "model.safetensors").is_symlink()
    (tmp_path / "a").rename(tmp_path / "b")
    load_whole(tmp_path / "b" / "out", digests=True)


def test_copies_do_not_need_the_source(source: Path, tmp_path: Path) -> None:
    write_import(plan_import(source / "full", source / "decoder"), tmp_path / "out", {}, copy=True)
    shutil.rmtree(source)
    load_whole(tmp_path / "out", digests=True)


def test_one_checkpoint_as_both_halves_is_an_identity_pair(tiny_pair: Path, tmp_path: Path) -> None:
    pair = imported(tiny_pair, tmp_path / "out", tiny_pair / "full")
    assert pair.identity
    assert pair.decoder_path == pair.full_path


def test_one_checkpoint_with_another_layer_map_is_no_identity_pair(tiny_pair: Path, tmp_path: Path) -> None:
    pair = imported(tiny_pair, tmp_path / "out", tiny_pair / "full", layer_map=(0, 1, 1, 3))
    assert not pair.identity
    assert pair.decoder_path == pair.full_path
    assert_right_answers(pair.folder)


def test_sharded_halves(source: Path, tmp_path: Path) -> None:
    digest = Pair.load(source).decoder_digest
    tensors = load_file(source / "decoder" / "model.safetensors")
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        part = {name: tensors[name] for name in places if places[name] == file}
        save_file(part, source / "decoder" / file, metadata={"format": "pt"})
    (source / "decoder" / "model.safetensors").unlink()
    (source / "decoder" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert imported(source, tmp_path / "out").decoder_digest == digest
    load_whole(tmp_path / "out", digests=True)
    (source / "decoder" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidPair, match=r"not in the folder: model-00002-of-00002\.safetensors"):
        plan_import(source / "full", source / "decoder")


def test_a_decoder_without_a_tokenizer_gets_the_full_model_s(source: Path, tmp_path: Path) -> None:
    (source / "decoder" / "tokenizer.json").unlink()
    pair = imported(source, tmp_path / "out")
    assert (pair.decoder_path / "tokenizer.json").read_bytes() == (source / "full" / "tokenizer.json").read_bytes()


def test_a_tokenizer_with_the_same_vocabulary_fits(source: Path, tmp_path: Path) -> None:
    edit(source / "decoder" / "tokenizer.json", lambda t: t.update(version="1.1", truncation=None))
    imported(source, tmp_path / "out")


def test_the_tokenizer_may_come_from_elsewhere(source: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    for half in ("full", "decoder"):
        for file in (source / half).glob("tokenizer*"):
            file.replace(tmp_path / "tokenizer" / file.name)
    with pytest.raises(InvalidPair, match=r"full/tokenizer\.json is missing.*--tokenizer"):
        plan_import(source / "full", source / "decoder")
    imported(source, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    Pair.load(tmp_path / "out")


def test_a_tokenizer_from_elsewhere_must_be_the_full_model_s(source: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    shutil.copyfile(source / "full" / "tokenizer.json", tmp_path / "tokenizer" / "tokenizer.json")
    (source / "decoder" / "tokenizer.json").unlink()
    plan_import(source / "full", source / "decoder", tokenizer=tmp_path / "tokenizer")
    edit(
        tmp_path / "tokenizer" / "tokenizer.json",
        lambda t: t["model"]["vocab"].update(new=t["model"]["vocab"].pop("a")),
    )
    with pytest.raises(InvalidPair, match=rf"'new' in {tmp_path}/tokenizer, 'a' in {source}/full"):
        plan_import(source / "full", source / "decoder", tokenizer=tmp_path / "tokenizer")


def test_an_index_that_the_weights_did_not_come_from_is_left_out(source: Path, tmp_path: Path) -> None:
    index = source / "decoder" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}')
    pair = imported(source, tmp_path / "out")
    assert not (pair.decoder_path / index.name).is_symlink()


def test_a_moved_pair_names_the_link_that_leads_nowhere(source: Path, tmp_path: Path) -> None:
    imported(source, tmp_path / "out")
    (tmp_path / "deep").mkdir()
    (tmp_path / "out").rename(tmp_path / "deep" / "out")
    with pytest.raises(InvalidPair, match=r"full/config\.json is a link to .*full/config\.json, which does"):
        Pair.load(tmp_path / "deep" / "out")


def tie(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(tie_word_embeddings=True))


@pytest.mark.parametrize("half", ["full", "decoder"])
def test_a_tied_head_that_differs_from_the_embedding_is_refused(half: str, source: Path, tmp_path: Path) -> None:
    tie(source / half)
    with pytest.raises(
        InvalidPair, match=rf"{half}/model\.safetensors: the config ties .*, but lm_head\.weight differs"
    ):
        imported(source, tmp_path / "out")


def test_a_tied_head_that_is_stored_too_is_imported(source: Path, tmp_path: Path) -> None:
    tie(source / "decoder")
    # In another dtype, as the engine reads it: the values are what must be equal.
    edit_tensors(source / "decoder", lambda t: t.update({EMBEDDING: t[EMBEDDING].bfloat16().float()}))
    edit_tensors(source / "decoder", lambda t: t.update({HEAD: t[EMBEDDING].bfloat16()}))
    assert_right_answers(imported(source, tmp_path / "out").folder)


def test_a_converted_half_is_written_in_shards_with_an_index(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_pair, "_SHARD_BYTES", 100_000)
    digest = Pair.load(source).decoder_digest
    edit_tensors(source / "decoder", lambda t: [t.update({f"student.{name}": t.pop(name)}) for name in list(t)])
    pair = imported(source, tmp_path / "out")
    weights = json.loads((pair.decoder_path / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(set(weights.values()))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    for shard in shards:
        tensors = load_file(pair.decoder_path / shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 100_000
    assert pair.decoder_digest == digest
    load_whole(pair.folder, digests=True)


@pytest.mark.parametrize("copy", [False, True])
def test_nan_is_named_by_the_path_that_was_given(copy: bool, source: Path, tmp_path: Path) -> None:
    edit_tensors(source / "decoder", lambda t: t[UP].fill_(float("nan")))
    file = source / "decoder" / "model.safetensors"
    file.rename(tmp_path / "blob")
    file.symlink_to("../../blob")  # as in the hub's cache
    plan = plan_import(source / "full", source / "decoder")
    with pytest.raises(InvalidPair, match=f"^{file}: tensor {UP} holds NaN"):
        write_import(plan, tmp_path / "out", {}, copy=copy)


def test_differing_fields_are_named_together_with_both_values(source: Path) -> None:
    change = {"num_key_value_heads": 4, "head_dim": 8, "vocab_size": 500}
    edit(source / "decoder" / "config.json", lambda c: c.update(change))
    edit(source / "decoder" / "tokenizer.json", lambda t: t["model"]["vocab"].update(new=t["model"]["vocab"].pop("a")))
    with pytest.raises(InvalidPair) as refused:
        plan_import(source / "full", source / "decoder")
    for words in (
        "num_kv_heads (full model 2, decoder 4)",
        "head_dim (full model 16, decoder 8)",
        "vocab_size (full model 512, decoder 500)",
        "tokenizer (1 tokens differ",
        f"'a' in {source / 'full'}, 'new' in {source / 'decoder'}",
    ):
        assert words in str(refused.value)


def config(**fields: object) -> Callable[[Path], object]:
    return lambda decoder: edit(decoder / "config.json", lambda content: content.update(fields))


def tensors(change: Callable[[dict[str, torch.Tensor]], object], metadata: str = "pt") -> Callable[[Path], object]:
    return lambda decoder: edit_tensors(decoder, change, metadata)


def renamed(name: str) -> Callable[[Path], object]:
    return lambda decoder: (decoder / "model.safetensors").rename(decoder / name)


NAN = rf"tensor {UP} holds NaN or infinity"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "rope": (config(rope_parameters={"rope_theta": 5e5}), r"rope\.theta \(full model 10000\.0, decoder 500000\.0\)"),
    "depth": (config(num_hidden_layers=3), "3 layers and the full model 4: say with --layer-map"),
    "shape": (config(intermediate_size=72), r"tensor model\.layers\.0\.mlp\..*has shape .*72"),
    "surplus": (tensors(lambda t: t.update(extra=torch.ones(1))), "tensor extra is not part of a llama"),
    "absent": (tensors(lambda t: t.pop(UP)), rf"tensor {UP} is missing"),
    "nan": (tensors(lambda t: t[UP].fill_(float("nan"))), rf"copy/decoder/model\.safetensors: {NAN}"),
    "infinity": (tensors(lambda t: t[UP].view(-1)[-1:].fill_(float("-inf"))), NAN),
    "nan-in-half": (tensors(lambda t: t.update({UP: t[UP].half().fill_(float("nan"))})), NAN),
    "no-weights": (lambda d: (d / "model.safetensors").unlink(), r"has neither model\.safetensors nor"),
    "being-downloaded": (renamed("model.safetensors.incomplete"), r"model\.safetensors\.incomplete is being written"),
    "being-written": (
        lambda d: os.truncate(d / "model.safetensors", 300_000),
        r"model\.safetensors: 300000 bytes, but its header describes",
    ),
    "no-config": (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
    "config-of-another-sort": (lambda d: (d / "config.json").write_text("[]"), r"config\.json holds a list"),
    "gguf": (renamed("model-Q4_K_M.gguf"), r"model-Q4_K_M\.gguf: GGUF is not supported"),
    "torch": (renamed("pytorch_model.bin"), r"pytorch_model\.bin: torch's files are pickles and are not supported"),
    "mlx": (tensors(lambda t: None, "mlx"), "MLX weights are not supported"),
    "mlx-quantised": (config(quantization={"group_size": 64, "bits": 4}), "MLX weights are not supported"),
    "unknown-format": (
        config(quantization_config={"quant_method": "hqq"}),
        r"quant_method='hqq' is not supported: known are fp8, awq, gptq, compressed-tensors",
    ),
    "architecture": (config(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_decoder_that_cannot_be_used_is_refused(case: str, source: Path, tmp_path: Path) -> None:
    damage, message = REFUSED[case]
    damage(source / "decoder")
    with pytest.raises(InvalidPair, match=message) as refused:
        imported(source, tmp_path / "out")
    assert "decoder" in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]  # nothing is left behind


def test_a_file_that_changes_meanwhile_is_named(source: Path, tmp_path: Path) -> None:
    plan = plan_import(source / "full", source / "decoder")
    edit_tensors(source / "decoder", lambda t: t[UP].add_(1))
    with pytest.raises(InvalidPair, match=r"decoder/model\.safetensors changed while it was read.*still writing"):
        write_import(plan, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_during_the_read_is_named(source: Path, tmp_path: Path) -> None:
    file = source / "full" / "model.safetensors"

    def write(step: str, done: int, total: int) -> None:
        if step == "Reading weights" and done < total:
            with file.open("r+b") as stream:
                stream.seek(-4, os.SEEK_END)
                stream.write(b"\0\0\0\0")

    with pytest.raises(InvalidPair, match=r"full/model\.safetensors changed while it was read"):
        write_import(plan_import(source / "full", source / "decoder"), tmp_path / "out", {}, report=write)


TWICE, NOT_ASCENDING = "a layer twice", "not in ascending order"


@pytest.mark.parametrize(
    ("layer_map", "warnings"),
    [((0, 1, 1, 3), [TWICE]), ((3, 1, 2, 0), [NOT_ASCENDING]), ((3, 3, 0, 0), [TWICE, NOT_ASCENDING])],
)
def test_a_layer_may_occur_twice_or_out_of_order(
    layer_map: tuple[int, ...], warnings: list[str], tiny_pair: Path, tmp_path: Path
) -> None:
    plan = plan_import(tiny_pair / "full", tiny_pair / "decoder", layer_map)
    assert len(plan.warnings) == len(warnings)
    assert all(expected in words for expected, words in zip(warnings, plan.warnings, strict=True))
    pair = write_import(plan, tmp_path / "out", {})
    assert pair.layer_map == layer_map
    answers = assert_right_answers(pair.folder)
    assert answers != assert_right_answers(tiny_pair)


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [((0, 1, 2, 4), r"0,1,2,4 names layers \[4\]"), ((0, 1, 2), "has 3 entries, but the decoder has 4")],
)
def test_a_layer_map_that_does_not_fit(layer_map: tuple[int, ...], message: str, tiny_pair: Path) -> None:
    with pytest.raises(InvalidPair, match=message):
        plan_import(tiny_pair / "full", tiny_pair / "decoder", layer_map)


def test_a_larger_decoder_is_allowed_with_a_warning(tiny_pair: Path, tmp_path: Path) -> None:
    plan = plan_import(tiny_pair / "decoder", tiny_pair / "full")
    assert any("weights per token, more than the full model's" in warning for warning in plan.warnings)
    assert_right_answers(write_import(plan, tmp_path / "out", {}).folder)


@pytest.mark.parametrize("method", FORMATS)
def test_a_quantised_decoder_is_imported_and_refused_by_engines_that_cannot_run_it(
    method: str, source: Path, tmp_path: Path
) -> None:
    quantise(source / "decoder", method, FORMATS[method])
    pair = imported(source, tmp_path / "out")
    manifest = json.loads((pair.folder / "pair.json").read_text())
    assert manifest["full"]["engines"] == ["overfill", "vllm"]
    assert manifest["decoder"]["engines"] == ["vllm"]
    sentence = rf"the engine overfill cannot run the decoder in .*stored in {method}; engines that can: vllm"
    with pytest.raises(UnsupportedModel, match=sentence):
        LLM(pair.folder, dtype="float32", device="cpu", kv_memory=2**20, max_model_len=256)
    with pytest.raises(UnsupportedModel, match=f"stored in {method}"):
        TwoStageReference(pair.folder)
    pair.check_engine("decoder", "vllm")


def test_the_values_of_a_quantised_decoder_are_checked_too(source: Path, tmp_path: Path) -> None:
    bad = {"weight": lambda w: torch.full_like(w, float("nan")).to(torch.float8_e4m3fn)}
    quantise(source / "decoder", "fp8", bad)
    with pytest.raises(InvalidPair, match="holds NaN or infinity"):
        imported(source, tmp_path / "out")


def test_a_matrix_that_a_quantised_decoder_lacks_is_named(source: Path) -> None:
    quantise(source / "decoder", "awq", FORMATS["awq"])
    edit_tensors(source / "decoder", lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.2.mlp.up")])
    with pytest.raises(InvalidPair, match=r"tensor model\.layers\.2\.mlp\.up_proj\.weight is missing"):
        plan_import(source / "full", source / "decoder")


def test_a_hidden_size_that_transformers_refuses_in_a_llama_loads_there_after_import(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    odd = make_tiny_pair(tmp_path / "odd", hidden_size=64)
    cut = write_two_stage(odd, tmp_path / "cut", hidden_size=53)
    pair = imported(odd, tmp_path / "out", cut)
    assert pair.decoder_config.hidden_size == 53
    assert AutoModelForCausalLM.from_pretrained(pair.decoder_path).config.hidden_size == 53
    assert_right_answers(pair.folder)
