"""Imports pairs, and checks the answers that their engine gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overfill import LLM
from overfill.model.manifest import Pair
from overfill.pair.import_pair import plan_import, write_import
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
