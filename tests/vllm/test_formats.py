"""A decoder whose weights are stored in a format that only vLLM runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from imported_pairs import edit_tensors, imported
from json_edits import edit
from stacks import running_stack

from overfill.client import Client, SamplingParams
from overfill.engine.load import load_engine
from overfill.engine.protocol import EngineOptions
from overfill.errors import InvalidRequest
from overfill.pair.reference import TwoStageReference

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTISATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def quantise_to_int8(tensors: dict[str, torch.Tensor]) -> None:
    """Stores each projection as int8 with a scale per output channel."""
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[f"{name}_scale"] = scale
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)


def test_an_int8_decoder(vllm_pair: Path, tmp_path: Path) -> None:
    """Rounding weights and activations changes some tokens; a wrong format would change nearly all of 512."""
    decoder = tmp_path / "decoder"
    shutil.copytree(vllm_pair / "decoder", decoder)
    edit_tensors(decoder, quantise_to_int8)
    edit(decoder / "config.json", lambda config: config.update(quantization_config=QUANTISATION))
    pair = imported(vllm_pair, tmp_path / "pair", decoder)
    assert pair.decoder_engines == ("vllm",)
    with pytest.raises(InvalidRequest, match="adapters: vLLM on CPUs takes none for weights in compressed-tensors"):
        load_engine("vllm", pair, "decoder", EngineOptions(device=torch.device("cpu"), max_adapters=1))
    reference = TwoStageReference(vllm_pair)
    settings = {"prefill_engine": "overfill", "decode_engine": "vllm", "kv_memory": "16MiB"}
    settings["engine_args"] = '{"enforce_eager": true}'
    verdicts = []
    with running_stack(pair.folder, **settings) as (_, address), Client(address) as client:
        for number in range(8):
            prompt = [(7 * i * (number + 3)) % 470 + 20 for i in range(40)]
            sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
            verdicts += reference.score(prompt, client.generate(prompt, sampling=sampling).token_ids)
    same = sum(verdict.kind == "identical" for verdict in verdicts)
    assert same > len(verdicts) / 2, f"{same} of {len(verdicts)} tokens"
