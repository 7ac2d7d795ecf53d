"""Checks a few greedy answers of a stack with the judge of ``overfill verify``, before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from overfill.cli.verify import ask, judge_answer
from overfill.client import Answer, Client
from overfill.errors import OverfillError
from overfill.lab.bench.vllm.figures import Figure
from overfill.making.conversations import shipped_conversations
from overfill.model.config import ModelConfig
from overfill.model.manifest import Pair
from overfill.pair.hf_model import chat_token_ids, load_tokenizer
from overfill.pair.reference import JudgedAnswer, TwoStageReference, summarise
from overfill.routing.tier import DEFAULT_TIER
from overfill.telemetry.progress import Report

MAX_TOKENS = 32
"""Tokens of each answer."""

MIN_AGREEMENT = 0.9
"""Lower limit of the share of tokens in a 16-bit dtype that the float32 reference chooses too."""

_QUESTIONS = 4

Answers = Sequence[Answer | OverfillError]


def ask_questions(address: str, report: Report) -> Answers:
    """Greedy answers of the stack at ``address`` to questions that ship with the package."""
    questions = _questions()
    with Client(address) as client:
        return ask(client, questions, MAX_TOKENS, len(questions), report)[0]


def judge_answers(pair: Pair, exact: Answers | None, rounded: Answers | None, report: Report) -> list[Figure]:
    """Judges answers against plain transformers in float32.

    Args:
        exact: Answers in float32, which must all be correct. None means that there are none.
        rounded: Answers in a 16-bit dtype. Its rounding may change a token, but most tokens stay.
    """
    references = {DEFAULT_TIER: TwoStageReference(pair.folder)}
    tokenizer = load_tokenizer(pair.full_path)

    def judged(step: str, answers: Answers) -> list[JudgedAnswer]:
        found: list[JudgedAnswer] = []
        for question, answer in zip(_questions(), answers, strict=True):
            report(step, len(found), len(answers))
            found.append(judge_answer(references, chat_token_ids(tokenizer, question), answer, MAX_TOKENS))
        report(step, len(answers), len(answers))
        return found

    figures = []
    if exact is not None:
        summary = summarise(judged("Judging answers in float32", exact))
        figures.append(
            Figure("answers_correct", summary.correct, f"of {summary.answers}", summary.answers, at_least=True)
        )
    if rounded is not None:
        figures.append(agreement(judged("Judging answers in 16 bits", rounded)))
    return figures


def agreement(judged: Sequence[JudgedAnswer]) -> Figure:
    """Share of tokens that are the reference's; 0 if an answer is missing."""
    verdicts = [verdict for answer in judged for verdict in answer.verdicts]
    same = sum(verdict.kind != "error" for verdict in verdicts)
    complete = verdicts and all(answer.problem is None for answer in judged)
    return Figure(
        "token_agreement", same / len(verdicts) if complete else 0.0, "of tokens", MIN_AGREEMENT, at_least=True
    )


def unaffordable(pair: Pair) -> str | None:
    """Says why the reference cannot run on this machine; None if it can."""
    needed = 4 * (_parameters(pair.full_config) + _parameters(pair.decoder_config))
    available = psutil.virtual_memory().available
    if pair.full_config.weight_format != "plain" or pair.decoder_config.weight_format != "plain":
        return "the reference reads plain weights only"
    if needed > available / 2:
        return f"the reference needs {needed >> 30} GiB for float32 weights, more than half of the free memory"
    return None


def _parameters(config: ModelConfig) -> int:
    attention = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * layer + 2 * config.vocab_size * config.hidden_size


def _questions() -> list[str]:
    return [c.messages[0]["content"] for c in shipped_conversations("development")[:_QUESTIONS]]
