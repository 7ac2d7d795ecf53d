"""Imports pairs, edits and quantises their halves, and checks the answers that their engine gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from json_edits import edit
from safetensors.torch import load_file, save_file

from overfill import LLM
from overfill.making.import_pair import plan_import, write_import
from overfill.model.manifest import Pair
from overfill.pair.reference import TwoStageReference, judge, summarise
from overfill.request.params import SamplingParams

_MAX_TOKENS = 24
_PROMPTS = [[(7 * i * (seed + 3)) % 470 + 20 for i in range(20 + 13 * seed)] for seed in range(4)]


def imported(source: Path, out: Path, decoder: Path | None = None, **options: Any) -> Pair:
    plan = plan_import(source / "full", decoder or source / "decoder", **options)
    return write_import(plan, out, {"method": "imported"})


def assert_right_answers(pair: Path) -> list[tuple[int, ...]]:
    """Checks the engine's greedy answers against plain transformers, and returns them."""
    llm = LLM(pair, dtype="float32", device="cpu", kv_memory=2**20, max_model_len=256, max_num_batched_tokens=64)
    answers = llm.generate(_PROMPTS, SamplingParams(temperature=0, max_tokens=_MAX_TOKENS))
    reference = TwoStageReference(pair)
    judged = [
        judge(reference, prompt, answer.token_ids, answer.finish_reason, _MAX_TOKENS)
        for prompt, answer in zip(_PROMPTS, answers, strict=True)
    ]
    assert summarise(judged).passed, summarise(judged)
    return [answer.token_ids for answer in answers]


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], metadata: str = "pt") -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": metadata})


def quantise(folder: Path, method: str, names: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> None:
    """Stores each projection as tensors with other names, as quantised formats do."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            weight = tensors.pop(name)
            tensors.update({name.removesuffix("weight") + suffix: made(weight) for suffix, made in names.items()})

    edit_tensors(folder, change)
    edit(folder / "config.json", lambda c: c.update(quantization_config={"quant_method": method}))


FORMATS: dict[str, dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "fp8": {"weight": lambda w: w.to(torch.float8_e4m3fn), "weight_scale_inv": lambda w: torch.ones(1, 1)},
    "awq": {
        "qweight": lambda w: torch.zeros(w.shape[1], w.shape[0] // 8, dtype=torch.int32),
        "qzeros": lambda w: torch.zeros(1, w.shape[0] // 8, dtype=torch.int32),
        "scales": lambda w: torch.ones(1, w.shape[0], dtype=torch.float16),
    },
    "gptq": {
        "qweight": lambda w: torch.zeros(w.shape[1] // 8, w.shape[0], dtype=torch.int32),
        "g_idx": lambda w: torch.zeros(w.shape[1], dtype=torch.int32),
        "scales": lambda w: torch.ones(1, w.shape[0], dtype=torch.float16),
    },
    "compressed-tensors": {
        "weight_packed": lambda w: torch.zeros(w.shape[0], w.shape[1] // 8, dtype=torch.int32),
        "weight_scale": lambda w: torch.ones(w.shape[0], 1, dtype=torch.bfloat16),
    },
}
