"""Conversations that a full model writes itself, for fitting, distilling and judging its decoders without any data.

Fed nothing but the opening of a user turn, an instruction-tuned model writes a user's message; fed that, it answers
(Magpie, arXiv 2406.08464). Both run through our own engine, in batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from overfill.engine.build import native_dtype, resolve_device
from overfill.errors import InvalidPair
from overfill.model.config import ModelConfig
from overfill.pair.conversations import Conversation
from overfill.pair.identity_pair import identity_pair
from overfill.pair.llm import LLM, Completion
from overfill.request.params import SamplingParams
from overfill.telemetry.progress import Report, silent

QUESTION_SAMPLING = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=128)
ANSWER_SAMPLING = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=256)
BATCH = 64
DRAW_SIZE = 4 * BATCH
"""Conversations begun together: the engine keeps BATCH of them running, so that few steps wait for the longest."""
_MIN_QUESTION_CHARS = 12  # characters
_MIN_ANSWER_TOKENS = 16  # tokens


def generate_conversations(
    full: Path,
    count: int,
    *,
    seed: int = 0,
    question: SamplingParams = QUESTION_SAMPLING,
    answer: SamplingParams = ANSWER_SAMPLING,
    threads: int | None = None,
    report: Report = silent,
) -> Iterator[Conversation]:
    """Lets the checkpoint in ``full`` write ``count`` conversations of one question and one answer.

    Questions that are cut off, very short or already there are dropped, and so are answers that are very short or hold
    no text. Equal seeds give equal conversations on one machine and dtype.

    Args:
        question, answer: how tokens are drawn; ``max_tokens`` bounds the length.
        threads: CPU threads; None leaves torch's setting.

    Raises:
        InvalidPair: the checkpoint writes almost nothing usable.
        InvalidRequest: it has no chat template.
    """
    with identity_pair(full, report=report) as folder:
        dtype = native_dtype(resolve_device("auto"))
        longest = 2 * ((question.max_tokens or 0) + (answer.max_tokens or 0))  # the template's own tokens come on top
        kv_memory = ModelConfig.load(full).kv_spec(dtype).token_bytes * longest * BATCH
        llm = LLM(folder, dtype=dtype, threads=threads, kv_memory=kv_memory, max_model_len=longest, max_num_seqs=BATCH)
        opening = llm.tokenizer.encode_user_opening()
        seen: set[str] = set()
        done = drawn = 0
        while done < count:
            if drawn > 8 * (count + DRAW_SIZE):
                raise InvalidPair(f"{full}: only {done} of {drawn} conversations that it wrote are usable")
            draw = min(DRAW_SIZE, max(BATCH, 2 * (count - done)))
            seeds = [(seed << 32) + drawn + i for i in range(draw)]
            drawn += draw
            asked = [c.text.strip() for c in llm.generate([opening] * draw, _each(question, seeds)) if _ended(c)]
            questions = [q for q in dict.fromkeys(asked) if len(q) >= _MIN_QUESTION_CHARS and q not in seen]
            seen.update(questions)
            prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": q}]) for q in questions]
            answers = llm.generate(prompts, _each(answer, seeds[: len(prompts)]))
            for q, a in zip(questions, answers, strict=True):
                if done < count and len(a.token_ids) >= _MIN_ANSWER_TOKENS and _is_text(a.text):
                    messages = {"role": "user", "content": q}, {"role": "assistant", "content": a.text.strip()}
                    yield Conversation(messages, finished=a.finish_reason == "stop")
                    done += 1
            report("Writing conversations", done, count)


def _ended(completion: Completion) -> bool:
    """Whether the message is whole."""
    return completion.finish_reason == "stop" and _is_text(completion.text)


def _is_text(text: str) -> bool:
    return bool(text.strip()) and "\N{REPLACEMENT CHARACTER}" not in text


def _each(sampling: SamplingParams, seeds: Sequence[int]) -> list[SamplingParams]:
    return [replace(sampling, seed=seed) for seed in seeds]
