"""Text to score neurons on: answers that the full model itself writes to a few dozen packaged prompts.

A decoder only ever writes answers, so what matters is what neurons do while the model answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from overfill.pair.plain import chat_token_ids, load_plain, load_tokenizer
from overfill.pair.progress import Report, silent
from overfill.pair.prune import Transcript

TEMPERATURE = 0.7


def packaged_prompts() -> list[str]:
    """The prompts that come with the package."""
    text = (resources.files("overfill.pair") / "data" / "calibration.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["prompt"] for line in text.splitlines()]


@torch.inference_mode()
def write_answers(
    model_folder: Path,
    prompts: Sequence[str],
    *,
    max_tokens: int = 48,
    batch_size: int = 16,
    seed: int = 0,
    report: Report = silent,
) -> list[list[Transcript]]:
    """Lets the checkpoint in ``model_folder`` answer ``prompts``, sampled with ``seed``, in batches.

    Returns:
        One list per batch; a batch holds prompts of similar length, and an answer at least one token.
    """
    model: Any = load_plain(model_folder)
    tokenizer = load_tokenizer(model_folder)
    eos = model.generation_config.eos_token_id
    eos_ids = {eos} if isinstance(eos, int) else set(eos or ())
    prompt_ids = sorted((chat_token_ids(tokenizer, prompt) for prompt in prompts), key=len)
    batches = [prompt_ids[i : i + batch_size] for i in range(0, len(prompt_ids), batch_size)]
    transcripts = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index, batch in enumerate(batches):
            longest = max(map(len, batch))
            padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in batch])
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch])
            output = model.generate(
                input_ids=padded,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=True,
                temperature=TEMPERATURE,
                pad_token_id=0,
            )
            answers = output[:, longest:].tolist()
            transcripts.append([_transcript(ids, answer, eos_ids) for ids, answer in zip(batch, answers, strict=True)])
            report("Writing calibration answers", index + 1, len(batches))
    return transcripts


def _transcript(prompt_ids: list[int], answer: list[int], eos_ids: set[int]) -> Transcript:
    """Cuts the padding after the end of the answer; the end-of-sequence token itself stays."""
    end = next((i + 1 for i, token in enumerate(answer) if token in eos_ids), len(answer))
    return Transcript(tuple(prompt_ids + answer[:end]), len(prompt_ids))
