"""Tests pair.json: what is read from it, and that faults are named by field or file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from json_edits import edit

from overfill.errors import Incompatible, InvalidPair, UnsupportedModel
from overfill.kv.handshake import check_compatible
from overfill.making.pair_json import write_manifest
from overfill.model import pair_files
from overfill.model.digest import checkpoint_digest
from overfill.model.manifest import Half, Pair, check_family
from overfill.model.pair_files import check_digests, load_whole

Edit = Callable[[dict[str, Any]], object]


def test_a_manifest_is_read_back(tiny_pair: Path) -> None:
    pair = load_whole(tiny_pair, digests=True)
    assert (pair.name, pair.layer_map) == ("tiny", (0, 1, 2, 3))
    assert (pair.full_path, pair.decoder_path) == (tiny_pair / "full", tiny_pair / "decoder")
    assert pair.full_config.intermediate_size == 128
    assert pair.decoder_config.intermediate_size == 64
    assert pair.recipe["intermediate_size"] == 64


def test_an_identity_pair_maps_each_layer_to_itself(fresh: Callable[[], Path]) -> None:
    folder = fresh()
    assert write_manifest(folder, decoder="full").identity
    assert not write_manifest(folder, decoder="full", layer_map=[0, 1, 1, 3]).identity
    assert not write_manifest(folder, decoder="full", recipe={"quantize": "int8"}).identity


def test_a_decoder_returns_kv_only_if_it_is_the_reader(fresh: Callable[[], Path]) -> None:
    folder = fresh()
    pair = write_manifest(folder, decoder="full")
    assert pair.returns_kv()
    assert not pair.returns_kv("int8")
    others = {
        "layers": {"layer_map": (0, 1, 1, 3)},
        "quantisation": {"quantize": "int8"},
        "weights": {"decoder_digest": "0" * 64},
        "config": {"decoder_config": replace(pair.decoder_config, rms_norm_eps=1.0)},
        "reader": {"reader": "mock"},
    }
    assert [name for name, change in others.items() if replace(pair, **change).returns_kv()] == []
    assert not write_manifest(folder).returns_kv(), "a pruned decoder"


BAD_FIELDS: dict[str, tuple[Edit, str]] = {
    "format": (lambda m: m.update(format="overfill-pair/9"), "format"),
    "no-format": (lambda m: m.pop("format"), "format"),
    "no-full": (lambda m: m.pop("full"), "full"),
    "full-not-an-object": (lambda m: m.update(full="full"), "full"),
    "no-digest": (lambda m: m["decoder"].pop("digest"), r"decoder\.digest"),
    "digest-empty": (lambda m: m["full"].update(digest=""), r"full\.digest must have 64 digits .* got ''"),
    "digest-upper-case": (lambda m: m["decoder"].update(digest="A" * 64), r"decoder\.digest must have 64"),
    "path-missing": (lambda m: m["decoder"].update(path="elsewhere"), r"decoder\.path"),
    "path-absolute": (lambda m: m["full"].update(path="/etc"), r"full\.path"),
    "path-outside": (lambda m: m["full"].update(path="../full"), r"full\.path"),
    "kv-heads": (lambda m: m["kv"].update(num_kv_heads=4), r"kv\.num_kv_heads is 4"),
    "head-dim": (lambda m: m["kv"].update(head_dim=8), r"kv\.head_dim"),
    "num-layers": (lambda m: m["kv"].update(num_layers=5), r"kv\.num_layers"),
    "rope": (lambda m: m["kv"]["rope"].update(theta=1.0), r"kv\.rope\.theta"),
    "no-rope": (lambda m: m["kv"].pop("rope"), r"kv\.rope"),
    "layer-map-short": (lambda m: m["kv"]["layer_map"].pop(), r"kv\.layer_map has 3"),
    "layer-map-range": (lambda m: m["kv"].update(layer_map=[0, 1, 2, 4]), r"kv\.layer_map names layers \[4\]"),
    "layer-map-negative": (lambda m: m["kv"].update(layer_map=[0, 1, 2, -1]), r"kv\.layer_map"),
    "layer-map-type": (lambda m: m["kv"].update(layer_map=[0, 1, 2, "3"]), r"kv\.layer_map"),
    "tokenizer": (lambda m: m.update(tokenizer_digest="0" * 64), "tokenizer_digest"),
    "eval": (lambda m: m.update(eval=None), "eval"),
    "engines": (
        lambda m: m["decoder"].update(engines=["llama.cpp"]),
        r"decoder\.engines must be a list of overfill",
    ),
    "quantize": (lambda m: m["decoder"]["recipe"].update(quantize="int4"), r"decoder\.recipe\.quantize is 'int4'"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_bad_field_is_named(case: str, fresh: Callable[[], Path]) -> None:
    folder = fresh()
    change, message = BAD_FIELDS[case]
    edit(folder / "pair.json", change)
    with pytest.raises(InvalidPair, match=message) as caught:
        Pair.load(folder)
    assert "pair.json" in str(caught.value)


def test_engines_follow_from_the_checkpoint_when_the_manifest_does_not_name_them(fresh: Callable[[], Path]) -> None:
    folder = fresh()
    edit(folder / "pair.json", lambda m: (m["full"].pop("engines"), m["decoder"].pop("engines")))
    assert Pair.load(folder).decoder_engines == ("overfill", "vllm")
    edit(folder / "pair.json", lambda m: m["decoder"]["recipe"].update(quantize="int8"))
    assert Pair.load(folder).decoder_engines == ("overfill",)
    edit(folder / "decoder" / "config.json", lambda c: c.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(UnsupportedModel, match="no engine can"):
        Pair.load(folder).check_engine("decoder", "vllm")


def missing(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).rename(folder.parent / "elsewhere")


def linked_to_nothing(name: str) -> Callable[[Path], object]:
    return lambda folder: (missing(name)(folder), (folder / name).symlink_to("../gone"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((lambda f, c=c: (f / "pair.json").write_bytes(c), r"pair\.json") for c in (b"", b"{", b"[]", b"\xff")),
        *((missing(name), name) for name in ("pair.json", "full/config.json", "full/tokenizer.json")),
        *(
            (missing(f"{half}/model.safetensors"), rf"{half} has neither model\.safetensors")
            for half in ("full", "decoder")
        ),
        *(
            (linked_to_nothing(name), rf"copy/{name} is a link to \.\./gone, which does not exist")
            for name in ("full", "full/config.json", "full/tokenizer.json")
        ),
    ],
)
def test_a_missing_or_malformed_file_is_named(
    damage: Callable[[Path], object], message: str, fresh: Callable[[], Path]
) -> None:
    folder = fresh()
    damage(folder)
    with pytest.raises(InvalidPair, match=message):
        load_whole(folder)


def test_a_router_s_pair_needs_no_weights(fresh: Callable[[], Path]) -> None:
    whole = Pair.load(fresh())
    for weights in whole.folder.rglob("*.safetensors"):
        weights.unlink()
    assert Pair.load(whole.folder) == whole


@pytest.mark.parametrize(("half", "absent"), [("full", "decoder"), ("decoder", "full")])
def test_weights_of_a_half_that_is_not_read_may_be_absent(half: Half, absent: Half, fresh: Callable[[], Path]) -> None:
    whole = Pair.load(fresh())
    (whole.path(absent) / "model.safetensors").unlink()
    assert load_whole(whole.folder, [half], digests=True) == whole
    with pytest.raises(InvalidPair, match=rf"{absent} has neither model\.safetensors"):
        load_whole(whole.folder, [absent])


def test_files_that_halves_or_pairs_share_are_read_once(
    fresh: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fresh()
    for name in ("identity", "linked"):
        shutil.copytree(folder, folder.with_name(name), ignore=shutil.ignore_patterns("full"))
        folder.with_name(name).joinpath("full").symlink_to(folder / "full")
    shutil.rmtree(folder.with_name("identity") / "decoder")
    edit(
        folder.with_name("identity") / "pair.json",
        lambda manifest: manifest["decoder"].update(path="full", digest=manifest["full"]["digest"]),
    )
    read: list[Path] = []

    def digest(path: Path, *arguments: Any) -> str:
        read.append(path.relative_to(folder.parent))
        return checkpoint_digest(path, *arguments)

    monkeypatch.setattr(pair_files, "checkpoint_digest", digest)
    check_digests([load_whole(folder.with_name(name)) for name in ("identity", folder.name, "linked")])
    assert [str(path) for path in read] == ["identity/full", f"{folder.name}/decoder", "linked/decoder"]


@pytest.mark.parametrize("half", ["full", "decoder"])
def test_a_flipped_bit_is_found_when_digests_are_checked(half: str, fresh: Callable[[], Path]) -> None:
    folder = fresh()
    file = folder / half / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    Pair.load(folder)
    with pytest.raises(InvalidPair, match=rf"{half}\.digest"):
        load_whole(folder, digests=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(num_key_value_heads=4), r"differing fields: num_kv_heads \(full model 2, decoder 4\)$"),
        (lambda c: c.update(head_dim=8), r"head_dim \(full model 16, decoder 8\)"),
        (
            lambda c: c.update(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
            r"rope\.theta \(full model 10000\.0, decoder 1000000\.0\)",
        ),
        (lambda c: c.update(vocab_size=500), r"vocab_size \(full model 512, decoder 500\)"),
        (lambda c: c.update(num_hidden_layers=3), r"layer_map has 4 entries, but the decoder has 3"),
    ],
    ids=["kv-heads", "head-dim", "rope", "vocabulary", "layers"],
)
def test_halves_that_do_not_fit_are_refused(change: Edit, message: str, fresh: Callable[[], Path]) -> None:
    folder = fresh()
    edit(folder / "decoder" / "config.json", change)
    with pytest.raises(InvalidPair, match=message):
        Pair.load(folder)


def test_a_decoder_with_another_tokenizer_is_refused(fresh: Callable[[], Path]) -> None:
    folder = fresh()
    edit(folder / "decoder" / "tokenizer.json", lambda t: t.update(version="2"))
    with pytest.raises(InvalidPair, match=r"decoder/tokenizer\.json"):
        Pair.load(folder)


def test_an_unsupported_half_is_refused(fresh: Callable[[], Path]) -> None:
    folder = fresh()
    edit(folder / "decoder" / "config.json", lambda c: c.update(hidden_act="gelu"))
    with pytest.raises(UnsupportedModel, match="hidden_act"):
        Pair.load(folder)


def test_a_worker_may_load_the_decoder_in_another_format(fresh: Callable[[], Path]) -> None:
    folder = fresh()
    pair = Pair.load(folder)
    int8 = pair.with_quantize("int8")
    assert (int8.quantize, int8.decoder_engines, int8.full_engines) == ("int8", ("overfill",), pair.full_engines)
    assert int8.recipe["quantize"] == "int8"
    with pytest.raises(
        UnsupportedModel, match=r"vllm cannot run the decoder in .*, quantised to int8 on load; engines"
    ):
        int8.check_engine("decoder", "vllm")
    assert int8.with_quantize("none").decoder_engines == pair.decoder_engines
    edit(folder / "pair.json", lambda manifest: manifest["decoder"].update(engines=["vllm"]))
    assert Pair.load(folder).with_quantize("int8").decoder_engines == (), "the manifest leaves OverFill's engine out"


def with_other_epsilon(half: str, fresh: Callable[[], Path]) -> Pair:
    folder = fresh()
    edit(folder / half / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    return load_whole(folder, digests=True)


def test_full_models_of_different_configs_exchange_no_kv(tiny_pair: Path, fresh: Callable[[], Path]) -> None:
    pair, other = Pair.load(tiny_pair), with_other_epsilon("full", fresh)
    assert other.full_digest == pair.full_digest, "no tensor says it"
    with pytest.raises(Incompatible) as caught:
        check_compatible(pair.kv_identity("float32"), other.kv_identity("float32"), "peer")
    assert caught.value.fields == ("config_digest",)
    with pytest.raises(InvalidPair, match="configs of the full model"):
        check_family({"one": pair, "two": other})


def test_a_decoder_s_config_is_not_part_of_the_kv_s_identity(tiny_pair: Path, fresh: Callable[[], Path]) -> None:
    pair, other = Pair.load(tiny_pair), with_other_epsilon("decoder", fresh)
    assert other.kv_identity("float32") == pair.kv_identity("float32")
    ours, theirs = pair.model_identity("decoder"), other.model_identity("decoder")
    assert ours.decoder_digest == theirs.decoder_digest
    assert ours.decoder_config_digest != theirs.decoder_config_digest
    assert not pair.model_identity("full").decoder_config_digest
