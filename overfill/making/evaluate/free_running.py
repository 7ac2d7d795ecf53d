"""Judge the answers that a decoder writes freely: their likelihood under the full model, repetition and length.

The answers are greedy, and each error affects later tokens as it would for a user. Likelihood alone flatters an answer
that repeats itself, because a model expects more of the same. So it is also given for new text: the tokens that do not
end a repeated 4-gram.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from overfill.api.tokenizer import Tokenizer
from overfill.making.conversations import Transcript
from overfill.making.evaluate.forward import BatchModel, batches, cache_tokens, target_tokens
from overfill.making.evaluate.greedy_answers import Written, write_answers
from overfill.making.evaluate.teacher_forced import Candidate
from overfill.making.evaluate.token_metrics import Estimate, Metric, MetricAccumulator, finite_or_none
from overfill.model.transformer import ForwardModel
from overfill.telemetry.progress import Report, silent

HEADROOM = 1.25
_ROWS = 128  # rows of logits at a time
_GRAM = 4


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """One answer with its figures.

    Attributes:
        nll: Mean negative log likelihood of its tokens under the full model, in nats; NaN if it is empty.
        repeated: Share of its 4-grams that occurred earlier in it; 0 if it has fewer than 4 tokens.
    """

    token_ids: tuple[int, ...]
    text: str
    finished: bool
    nll: float
    repeated: float

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "tokens": len(self.token_ids),
            "finished": self.finished,
            "nll": finite_or_none(self.nll),
            "repeated": self.repeated,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Figures of one variant's answers, overall or of one kind, beside those of the full model's answers.

    Attributes:
        perplexity: Perplexity of the answers by the full model; ``ratio`` is that to its own answers'.
        ratio_error: Standard error of ``ratio``, from those of both likelihoods as if they were independent.
        new_perplexity, new_ratio, new_ratio_error: The same for new text only.
        repeated: Share of repeated 4-grams; ``points`` is the difference from the full model's, in percentage points.
        tokens: Mean length of the answers; ``length`` is the ratio to the full model's, NaN if those are all empty.
        finished: Share of answers that ended before the limit.
    """

    perplexity: float
    ratio: float
    ratio_error: float
    new_perplexity: float
    new_ratio: float
    new_ratio_error: float
    repeated: float
    points: float
    tokens: float
    length: float
    finished: float

    def to_json(self) -> dict[str, float | None]:
        return {name: finite_or_none(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class FreeRunning:
    """Figures over the answers that one variant wrote, without their end-of-sequence tokens.

    Attributes:
        nll: Negative log likelihood of the answer tokens under the full model, in nats.
        new_nll: The same for new text only; its positions count new tokens.
        repeated: Share of 4-grams that occurred earlier in the same answer, by the position of their last token.
        tokens, finished: Length of an answer, and 1 if it ended before the limit; one number per answer.
        answers: In the order of the prompts.
    """

    nll: Metric
    new_nll: Metric
    repeated: Metric
    tokens: Metric
    finished: Metric
    answers: tuple[ScoredAnswer, ...]

    def beside(self, full: FreeRunning, kind: str | None = None) -> Comparison:
        """Compares with the full model's answers: all, or those of one kind."""

        def of(metric: Metric) -> Estimate:
            return metric.overall if kind is None else metric.of_kind(kind)

        def ratio(mine: Estimate, own: Estimate) -> tuple[float, float]:
            value = math.exp(mine.mean - own.mean)
            return value, 0.0 if self is full else value * math.hypot(mine.standard_error, own.standard_error)

        nll, new_nll = of(self.nll), of(self.new_nll)
        whole, whole_error = ratio(nll, of(full.nll))
        new, new_error = ratio(new_nll, of(full.new_nll))
        repeated, tokens, full_tokens = of(self.repeated).mean, of(self.tokens).mean, of(full.tokens).mean
        return Comparison(
            perplexity=math.exp(nll.mean),
            ratio=whole,
            ratio_error=whole_error,
            new_perplexity=math.exp(new_nll.mean),
            new_ratio=new,
            new_ratio_error=new_error,
            repeated=repeated,
            points=100 * (repeated - of(full.repeated).mean),
            tokens=tokens,
            length=tokens / full_tokens if full_tokens else math.nan,
            finished=of(self.finished).mean,
        )

    def to_json(self, full: FreeRunning) -> dict[str, Any]:
        """Returns the figures beside those of the full model's answers, without the answers."""
        return {
            **self.beside(full).to_json(),
            "by_kind": {kind: self.beside(full, kind).to_json() for kind, _ in self.tokens.by_kind},
            "nll": self.nll.to_json(),
            "repeated_4grams": self.repeated.to_json(),
        }


def answer_limit(transcripts: Sequence[Transcript]) -> int:
    """Returns the maximum length of a free-running answer: the longest given answer and a quarter more."""
    return math.ceil(HEADROOM * max(len(t.answer) for t in transcripts))


def judge_free_running(
    full: ForwardModel,
    tokenizer: Tokenizer,
    decoder: Candidate,
    transcripts: Sequence[Transcript],
    max_tokens: int,
    *,
    title: str,
    report: Report = silent,
) -> FreeRunning:
    """Lets ``decoder`` write answers to the prompts of ``transcripts``, and the full model score them.

    Args:
        max_tokens: Maximum length of an answer.
        title: Name of the decoder in progress reports.
    """
    prompts = [t.prompt for t in transcripts]
    answers = write_answers(full, decoder, prompts, max_tokens, step=f"Writing: {title}", report=report)
    return judge_answers(full, tokenizer, transcripts, answers, step=f"Scoring: {title}", report=report)


def judge_answers(
    full: ForwardModel,
    tokenizer: Tokenizer,
    transcripts: Sequence[Transcript],
    answers: Sequence[Written],
    *,
    step: str = "Scoring answers",
    report: Report = silent,
) -> FreeRunning:
    """Lets the full model score the answers to the prompts of ``transcripts``.

    Empty answers count for length and end only.
    """
    pairs = list(zip(transcripts, answers, strict=True))
    written = [
        Transcript((*t.prompt, *answer.token_ids), t.answer_start, kind=t.kind)
        for t, answer in pairs
        if answer.token_ids
    ]
    reader = BatchModel(full, cache_tokens(written))
    nll, new_nll, repeated, tokens, finished = (MetricAccumulator() for _ in range(5))
    means: list[tuple[float, float]] = []  # of the answers that are not empty
    for batch in batches(written):
        logits, targets = reader.read_all(batch, 0), target_tokens(batch, 0).to(full.device)
        chunks = zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
        values = torch.cat([torch.nn.functional.cross_entropy(x, y, reduction="none") for x, y in chunks])
        for transcript, own in zip(batch, values.split([len(t.answer) for t in batch]), strict=True):
            grams = repeats(transcript.answer)
            nll.add(own, 0, transcript.kind)
            new = [not again for again in (*[0.0] * (_GRAM - 1), *grams)][: len(own)]
            new_nll.add(own[torch.tensor(new)], 0, transcript.kind)
            repeated.add(grams, _GRAM - 1, transcript.kind)
            means.append((float(own.mean()), sum(grams) / max(1, len(grams))))
        report(step, len(means), len(written))
    for transcript, answer in pairs:
        tokens.add([len(answer.token_ids)], 0, transcript.kind)
        finished.add([float(answer.finished)], 0, transcript.kind)
    left = iter(means)
    return FreeRunning(
        nll=nll.metric(),
        new_nll=new_nll.metric(),
        repeated=repeated.metric(),
        tokens=tokens.metric(),
        finished=finished.metric(),
        answers=tuple(
            ScoredAnswer(
                tuple(a.token_ids),
                tokenizer.decode(a.token_ids),
                a.finished,
                *(next(left) if a.token_ids else (math.nan, 0.0)),
            )
            for a in answers
        ),
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
