"""A pair whose recipe says int8: its decoder is quantised when it is loaded, and judged as such."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from overfill.engine.build import load_half
from overfill.engine.protocol import EngineOptions
from overfill.making.pair_json import write_manifest
from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Half, Pair
from overfill.model.quantize import Int8Matrix
from overfill.pair.llm import LLM
from overfill.pair.reference import TwoStageReference
from overfill.request.params import SamplingParams

PROMPTS = torch.randint(2, 512, (4, 40), generator=torch.Generator().manual_seed(4)).tolist()
INT8 = {"quantize": "int8"}


def load(pair: Pair, half: Half) -> Any:
    options = EngineOptions(torch.device("cpu"), "float32", max_model_len=128, max_num_seqs=2)
    return load_half(pair, half, options).model


def test_only_the_decoder_is_quantised(fresh: Callable[[], Path]) -> None:
    pair = write_manifest(fresh(), recipe=INT8)
    full, decoder = load(pair, "full").weights, load(pair, "decoder").weights
    assert isinstance(decoder.head, Int8Matrix)
    assert isinstance(full.head, torch.Tensor)
    assert decoder.bytes_read < load(write_manifest(pair.folder), "decoder").weights.bytes_read / 3


def test_a_quantised_full_model_is_no_identity_pair(tmp_path: Path) -> None:
    folder = make_tiny_pair(tmp_path / "pair", identity=True)
    plain, quantised = Pair.load(folder), write_manifest(folder, decoder="full", recipe=INT8)
    assert (plain.identity, quantised.identity) == (True, False)
    assert (
        quantised.decoder_digest == plain.decoder_digest
    )  # the digest is that of the checkpoint, which stays unquantised
    assert isinstance(load(quantised, "decoder").weights.head, Int8Matrix)
    assert isinstance(load(quantised, "full").weights.head, torch.Tensor)


@pytest.mark.parametrize("identity", [False, True], ids=["pruned", "full-model"])
def test_the_reference_rounds_as_the_engine_does(identity: bool, tmp_path: Path) -> None:
    folder = make_tiny_pair(tmp_path / "pair", identity=identity)
    decoder = "full" if identity else "decoder"
    unquantised = TwoStageReference(folder)
    write_manifest(folder, decoder=decoder, recipe=INT8)
    reference = TwoStageReference(folder)

    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    answers = LLM(folder, dtype="float32").generate(PROMPTS, sampling)

    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert all(v.kind == "identical" for v in reference.score(prompt, answer.token_ids))
    differing = [
        v
        for prompt, answer in zip(PROMPTS, answers, strict=True)
        for v in unquantised.score(prompt, answer.token_ids)
        if v.kind == "error"
    ]
    assert differing  # rounding changes answers, so that an unquantised reference would notice
