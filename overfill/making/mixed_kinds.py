"""Makes conversations of several kinds from a full model's plain ones: extract, rewrite, dialogue, and long prompts.

``synthetic_data`` gives short questions only. Here its answers become the texts that other questions are about, so
that no text from elsewhere is needed. The full model writes the follow-up questions of dialogues and all answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Literal, get_args

from overfill.api.tokenizer import Tokenizer
from overfill.errors import InvalidRequest
from overfill.making.conversations import Conversation, Message
from overfill.making.synthetic_data import ANSWER_TOKENS, Writer
from overfill.telemetry.progress import Report, silent

Kind = Literal["explain", "extract", "rewrite", "dialogue", "long"]

KINDS: tuple[Kind, ...] = get_args(Kind)
LONG_TOKENS = 500, 2_000
"""Shortest and longest prompt of the kind ``long``, in tokens."""

_SHARES = {"training": (0.38, 0.18, 0.18, 0.16, 0.10), "test": (0.2, 0.2, 0.2, 0.2, 0.2)}
_LONGEST = LONG_TOKENS[1] + 100 + ANSWER_TOKENS
_DRAW = 128  # conversations that are written together

# The instructions of the two parts differ, so that judging does not reward phrases that were trained on. Each has fewer
# than 8 words, so that no run of 8 words (``overlap``) is an instruction alone.
_INSTRUCTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "training": {
        "extract": (
            "What is the main point?",
            "List the key facts.",
            "Which advice does the text give?",
            "Who or what is it about?",
            "Name three things that it mentions.",
            "What does the text recommend first?",
            "Extract all names and numbers.",
            "What problem does it describe?",
        ),
        "rewrite": (
            "Rewrite this text in simpler words.",
            "Make this shorter.",
            "Summarize this in two sentences.",
            "Turn this into a bulleted list.",
            "Write this as a friendly letter.",
            "Rewrite this for a formal report.",
            "Continue this text.",
            "Give this a title and summary.",
        ),
        "long": (
            "Summarize the notes above.",
            "What is note {number} about?",
            "List the topics of all notes.",
            "What does note {number} advise?",
            "Which note is the most practical? Why?",
            "Explain note {number} to a child.",
        ),
    },
    "test": {
        "extract": (
            "What does the author want to say?",
            "Pick out the important details.",
            "Give two suggestions found in it.",
            "What is the subject here?",
            "Quote the most useful sentence.",
            "Which steps does it describe?",
        ),
        "rewrite": (
            "Say the same in plain English.",
            "Condense it into one paragraph.",
            "Rephrase it for a younger reader.",
            "Turn it into a short email.",
            "Write it as a numbered list.",
            "Make it more polite.",
        ),
        "long": (
            "Give a short overview of these texts.",
            "What does text {number} say?",
            "Answer from text {number}: what matters most?",
            "Compare texts 1 and {number}.",
            "Write a conclusion for text {number}.",
        ),
    },
}


def mixed_conversations(
    full: Path,
    plain: Sequence[Conversation],
    count: int,
    *,
    part: Literal["training", "test"] = "training",
    seed: int = 0,
    threads: int | None = None,
    report: Report = silent,
) -> Iterator[Conversation]:
    """Lets the checkpoint in ``full`` write up to ``count`` conversations of all kinds, about the texts of ``plain``.

    Leaves out answers that are very short or hold no text, and dialogues with such a second question or one that is
    cut off.

    Args:
        plain: Conversations of one question and one answer that ``generate_conversations`` wrote. They are used in turn
            as a question or a text, and again from the first when all were. Long prompts join random ones.
        part: ``test`` has other instructions, and draws all kinds with equal probability.

    Raises:
        InvalidRequest: ``plain`` holds fewer than two conversations.
    """
    if len(plain) < 2:
        raise InvalidRequest("mix", f"holds {len(plain)} conversations; texts of at least 2 are needed")
    random = Random(f"{seed} {part}")
    with Writer.open(full, longest=_LONGEST, threads=threads, report=report) as writer:
        done = 0
        while done < count:
            size = min(_DRAW, count - done)
            prompts = [_prompt(plain, done + i, random, part, writer.tokenizer) for i in range(size)]
            followed = _with_follow_ups(writer, prompts, (seed << 32) + done)
            chats = [(kind, chat) for (kind, _), chat in zip(prompts, followed, strict=True) if chat is not None]
            answered = writer.answers([chat for _, chat in chats], (seed << 32) + done)
            for (kind, _), conversation in zip(chats, answered, strict=True):
                if conversation is not None:
                    yield replace(conversation, kind=kind)
            done += size
            report("Writing conversations", done, count)


def _prompt(
    plain: Sequence[Conversation], index: int, random: Random, part: str, tokenizer: Tokenizer
) -> tuple[Kind, tuple[Message, ...]]:
    (kind,) = random.choices(KINDS, _SHARES[part])
    own = plain[index % len(plain)]
    if kind == "explain":
        return kind, own.messages[:-1]
    if kind == "dialogue":
        return kind, own.messages
    text = own.messages[-1]["content"]
    instruction = random.choice(_INSTRUCTIONS[part][kind])
    if kind == "long":
        text, texts = _long_text(plain, random, part, tokenizer)
        instruction = instruction.format(number=random.randint(min(2, texts), texts))
        return kind, ({"role": "user", "content": f"{text}\n\n{instruction}"},)
    before, after = (f"{instruction}\n\n", "") if random.random() < 0.5 else ("", f"\n\n{instruction}")
    return kind, ({"role": "user", "content": f"{before}{text}{after}"},)


def _long_text(plain: Sequence[Conversation], random: Random, part: str, tokenizer: Tokenizer) -> tuple[str, int]:
    """Joins random texts up to a random length; returns them and their number."""
    shortest, longest = LONG_TOKENS
    aim = shortest * (longest / shortest) ** random.random()
    title = "Note" if part == "training" else "Text"
    texts: list[str] = []
    tokens = 0
    while tokens < aim:
        text = f"{title} {len(texts) + 1}: {random.choice(plain).messages[-1]['content']}"
        length = len(tokenizer.encode(text))
        if tokens + length > longest:
            break
        texts.append(text)
        tokens += length
    return "\n\n".join(texts), len(texts)


def _with_follow_ups(
    writer: Writer, prompts: Sequence[tuple[Kind, tuple[Message, ...]]], seed: int
) -> list[tuple[Message, ...] | None]:
    """Adds a second question, which the full model writes, to the dialogues; None where ``questions`` gives none."""
    chats: list[tuple[Message, ...] | None] = [messages for _, messages in prompts]
    dialogues = [(i, messages) for i, (kind, messages) in enumerate(prompts) if kind == "dialogue"]
    questions = writer.questions([messages for _, messages in dialogues], seed)
    for (i, messages), question in zip(dialogues, questions, strict=True):
        chats[i] = None if question is None else (*messages, {"role": "user", "content": question})
    return chats
