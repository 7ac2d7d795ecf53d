"""Judge the answers that a decoder writes freely: their likelihood under the full model and their repetition.

The serving engine writes the answers greedily, so that each error affects later tokens as it would for a user.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from overfill.kv.spec import DTypeName
from overfill.making.conversations import Transcript
from overfill.making.evaluate.forward import BatchModel, batches, cache_tokens, target_tokens
from overfill.making.evaluate.token_metrics import Metric, MetricAccumulator, finite_or_none
from overfill.model.manifest import Pair
from overfill.model.transformer import ForwardModel
from overfill.pair.llm import LLM, Completion
from overfill.request.params import SamplingParams
from overfill.telemetry.progress import Report, silent

MAX_TOKENS = 128
SEQUENCES = 32  # answers written at once
_BLOCK_SIZE = 16
_ROWS = 128  # rows of logits at a time
_GRAM = 4


@dataclass(frozen=True, slots=True)
class FreeRunning:
    """Figures over the answers that one variant wrote, without their end-of-sequence tokens.

    Attributes:
        nll: Negative log likelihood of the answer tokens under the full model, in nats.
        repeated: Share of 4-grams that occurred earlier in the same answer, by the position of their last token.
        mean_tokens: Mean length of the answers.
        finished: Share of answers that ended before the limit.
    """

    nll: Metric
    repeated: Metric
    mean_tokens: float
    finished: float

    @property
    def perplexity(self) -> float:
        """Perplexity of the answers under the full model."""
        return math.exp(self.nll.overall.mean)

    def to_json(self) -> dict[str, Any]:
        return {
            "teacher_perplexity": finite_or_none(self.perplexity),
            "teacher_nll": self.nll.to_json(),
            "repeated_4grams": self.repeated.to_json(),
            "mean_tokens": self.mean_tokens,
            "finished": self.finished,
        }


def write_answers(
    pair_folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = MAX_TOKENS,
    dtype: DTypeName,
    device: str = "auto",
    step: str = "Writing answers",
    report: Report = silent,
) -> list[Completion]:
    """Lets the pair write greedy answers; returns them in the order of ``prompts``.

    Raises:
        PromptTooLong: a prompt fills the context.
    """
    config = Pair.load(pair_folder).full_config
    longest = min(config.max_positions, max(map(len, prompts)) + max_tokens)
    llm = LLM(
        pair_folder,
        dtype=dtype,
        device=device,
        block_size=_BLOCK_SIZE,
        max_model_len=longest,
        max_num_seqs=SEQUENCES,
        kv_memory=SEQUENCES * (longest + _BLOCK_SIZE) * config.kv_spec(dtype).token_bytes,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    completions: list[Completion] = []
    for start in range(0, len(prompts), SEQUENCES):
        completions += llm.generate([list(p) for p in prompts[start : start + SEQUENCES]], greedy)
        report(step, len(completions), len(prompts))
    return completions


def judge_answers(
    full: ForwardModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Completion],
    *,
    step: str = "Scoring answers",
    report: Report = silent,
) -> FreeRunning:
    """Lets the full model score the answers to ``prompts``. Empty answers count for the mean length only."""
    written = [
        Transcript((*prompt, *answer.token_ids), len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.token_ids
    ]
    reader = BatchModel(full, cache_tokens(written))
    nll, repeated = MetricAccumulator(), MetricAccumulator()
    done = 0
    for batch in batches(written):
        logits, targets = reader.read_all(batch, 0), target_tokens(batch, 0).to(full.device)
        chunks = zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
        values = torch.cat([torch.nn.functional.cross_entropy(x, y, reduction="none") for x, y in chunks])
        for transcript, own in zip(batch, values.split([len(t.answer) for t in batch]), strict=True):
            nll.add(own, 0)
            repeated.add(repeats(transcript.answer), _GRAM - 1)
        done += len(batch)
        report(step, done, len(written))
    return FreeRunning(
        nll=nll.metric(),
        repeated=repeated.metric(),
        mean_tokens=sum(len(a.token_ids) for a in answers) / len(answers),
        finished=sum(a.finish_reason == "stop" for a in answers) / len(answers),
    )


def repeats(answer: Sequence[int]) -> list[float]:
    """For each run of 4 tokens, 1 if the same run started earlier in ``answer``, else 0."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for start in range(len(answer) - _GRAM + 1):
        run = tuple(answer[start : start + _GRAM])
        found.append(float(run in seen))
        seen.add(run)
    return found
