"""Lets a full model generate conversations, for fitting, distilling and judging its decoders without other data.

Given only the opening of a user turn, an instruction-tuned model writes a user's message. Given that message, it
answers (Magpie, arXiv 2406.08464). Both steps run in batches on the project's own engine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from overfill.api.tokenizer import Tokenizer
from overfill.engine.device import native_dtype, resolve_device
from overfill.errors import InvalidPair
from overfill.making.conversations import Conversation, Message
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
_LONGEST = 2 * (QUESTION_TOKENS + ANSWER_TOKENS)  # twice: the template adds tokens
SELF_SEED = 2**32 - 1
"""Seed of the text that ``overfill pair build --calibration self`` fits on; ``overfill pair calibrate`` refuses it."""
_MIN_QUESTION_CHARS = 12
_MIN_ANSWER_TOKENS = 16


class Writer:
    """A full model that writes as the user and as the assistant. ``open`` makes one."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    @classmethod
    @contextmanager
    def open(
        cls, full: Path, *, longest: int = _LONGEST, threads: int | None = None, report: Report = silent
    ) -> Iterator[Writer]:
        """Loads the checkpoint in ``full`` for conversations of up to ``longest`` tokens."""
        with identity_pair(full, report=report) as folder:
            dtype = native_dtype(resolve_device("auto"))
            longest = min(longest, ModelConfig.load(full).max_positions)
            kv_memory = ModelConfig.load(full).kv_spec(dtype).token_bytes * longest * BATCH
            yield cls(
                LLM(
                    folder, dtype=dtype, threads=threads, kv_memory=kv_memory, max_model_len=longest, max_num_seqs=BATCH
                )
            )

    @property
    def tokenizer(self) -> Tokenizer:
        return self._llm.tokenizer

    def questions(self, chats: Sequence[Sequence[Message]], seed: int) -> list[str | None]:
        """Continues each chat as the user; None where the message is cut off, very short or no text.

        Args:
            seed: Seed of the first chat; the others follow.
        """
        openings = [self.tokenizer.encode_user_opening(chat) for chat in chats]
        found: list[str | None] = []
        for completion in self._llm.generate(openings, _each(QUESTION_SAMPLING, seed, len(chats))):
            text = completion.text.strip()
            whole = completion.finish_reason == "stop" and _is_text(text) and len(text) >= _MIN_QUESTION_CHARS
            found.append(text if whole else None)
        return found

    def answers(self, chats: Sequence[tuple[Message, ...]], seed: int) -> list[Conversation | None]:
        """Answers each chat; None where the answer is very short or no text."""
        prompts = [self.tokenizer.encode_chat(chat) for chat in chats]
        completions = self._llm.generate(prompts, _each(ANSWER_SAMPLING, seed, len(chats)))
        return [_conversation(chat, written) for chat, written in zip(chats, completions, strict=True)]


def generate_conversations(
    full: Path,
    count: int,
    *,
    seed: int = 0,
    known: Collection[str] = (),
    threads: int | None = None,
    report: Report = silent,
) -> Iterator[Conversation]:
    """Lets the checkpoint in ``full`` generate ``count`` conversations of one question and one answer.

    Drops questions that are cut off, very short or repeated, and answers that are very short or hold no text. On one
    machine and dtype, equal seeds give equal conversations.

    Args:
        seed: In 0..``SELF_SEED``. Other seeds draw other questions.
        known: Questions to drop as well.
        threads: Number of CPU threads. None keeps torch's setting.

    Raises:
        InvalidPair: the checkpoint generates almost nothing usable.
        InvalidRequest: the checkpoint has no chat template.
    """
    with Writer.open(full, threads=threads, report=report) as writer:
        seen = set(known)
        done = drawn = 0
        while done < count:
            if drawn > 8 * (count + len(known) + DRAW_SIZE):
                raise InvalidPair(f"{full}: only {done} of {drawn} conversations that it wrote are usable")
            draw = min(DRAW_SIZE, max(BATCH, 2 * (count - done)))
            first = (seed << 32) + drawn
            drawn += draw
            asked = [q for q in dict.fromkeys(writer.questions([()] * draw, first)) if q is not None and q not in seen]
            seen.update(asked)
            chats = [({"role": "user", "content": question},) for question in asked]
            for conversation in writer.answers(chats, first):
                if done < count and conversation is not None:
                    yield conversation
                    done += 1
            report("Writing conversations", done, count)


def _conversation(chat: tuple[Message, ...], answer: Completion) -> Conversation | None:
    if len(answer.token_ids) < _MIN_ANSWER_TOKENS or not _is_text(answer.text):
        return None
    message = {"role": "assistant", "content": answer.text.strip()}
    return Conversation((*chat, message), finished=answer.finish_reason == "stop")


def _is_text(text: str) -> bool:
    return bool(text.strip()) and "\N{REPLACEMENT CHARACTER}" not in text


def _each(sampling: SamplingParams, first_seed: int, count: int) -> list[SamplingParams]:
    return [replace(sampling, seed=first_seed + i) for i in range(count)]
