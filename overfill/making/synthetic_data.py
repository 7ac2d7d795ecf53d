"""Let a full model generate conversations, for fitting, distilling and judging its decoders without other data.

Given only the opening of a user turn, an instruction-tuned model writes a user's message. Given that message, it
answers (Magpie, arXiv 2406.08464). Both steps run in batches on the project's own engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from overfill.engine.device import native_dtype, resolve_device
from overfill.errors import InvalidPair
from overfill.making.conversations import Conversation
from overfill.making.identity_pair import identity_pair
from overfill.model.config import ModelConfig
from overfill.pair.llm import LLM, Completion
from overfill.request.params import SamplingParams
from overfill.telemetry.progress import Report, silent

QUESTION_TOKENS, ANSWER_TOKENS = 128, 256
QUESTION_SAMPLING = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=QUESTION_TOKENS)
ANSWER_SAMPLING = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=ANSWER_TOKENS)
BATCH = 64
DRAW_SIZE = 4 * BATCH
"""Conversations that start together. The engine runs BATCH of them at a time, so that few steps run half empty."""
_MIN_QUESTION_CHARS = 12
_MIN_ANSWER_TOKENS = 16


def generate_conversations(
    full: Path,
    count: int,
    *,
    seed: int = 0,
    threads: int | None = None,
    report: Report = silent,
) -> Iterator[Conversation]:
    """Lets the checkpoint in ``full`` generate ``count`` conversations of one question and one answer.

    Drops questions that are cut off, very short or repeated, and answers that are very short or hold no text. On one
    machine and dtype, equal seeds give equal conversations.

    Args:
        threads: Number of CPU threads. None keeps torch's setting.

    Raises:
        InvalidPair: the checkpoint generates almost nothing usable.
        InvalidRequest: the checkpoint has no chat template.
    """
    with identity_pair(full, report=report) as folder:
        dtype = native_dtype(resolve_device("auto"))
        longest = 2 * (QUESTION_TOKENS + ANSWER_TOKENS)  # twice: the template adds tokens
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
            asked = [
                c.text.strip() for c in llm.generate([opening] * draw, _each(QUESTION_SAMPLING, seeds)) if _ended(c)
            ]
            questions = [q for q in dict.fromkeys(asked) if len(q) >= _MIN_QUESTION_CHARS and q not in seen]
            seen.update(questions)
            prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": q}]) for q in questions]
            answers = llm.generate(prompts, _each(ANSWER_SAMPLING, seeds[: len(prompts)]))
            for q, a in zip(questions, answers, strict=True):
                if done < count and len(a.token_ids) >= _MIN_ANSWER_TOKENS and _is_text(a.text):
                    messages = {"role": "user", "content": q}, {"role": "assistant", "content": a.text.strip()}
                    yield Conversation(messages, finished=a.finish_reason == "stop")
                    done += 1
            report("Writing conversations", done, count)


def _ended(completion: Completion) -> bool:
    """Returns True if the message is whole and holds text."""
    return completion.finish_reason == "stop" and _is_text(completion.text)


def _is_text(text: str) -> bool:
    return bool(text.strip()) and "\N{REPLACEMENT CHARACTER}" not in text


def _each(sampling: SamplingParams, seeds: Sequence[int]) -> list[SamplingParams]:
    return [replace(sampling, seed=seed) for seed in seeds]
