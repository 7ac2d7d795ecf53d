"""Conversations as calibration, training and test data: read them from files and tokenize them.

In a transcript, the full model reads the prompt and the decoder writes the answer. Scoring, fitting and judging
therefore use the answer tokens only.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from overfill.api.tokenizer import Tokenizer
from overfill.errors import InvalidRequest
from overfill.request.answer_start import answer_start

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that ends with an answer.

    Attributes:
        messages: Each with ``role`` and ``content``; the last one is the assistant's.
        finished: False when the answer was cut off at a length limit.
        kind: Kind of its question, such as "rewrite"; empty where unknown. Figures are given by kind too.
    """

    messages: tuple[Message, ...]
    finished: bool = True
    kind: str = ""

    @property
    def prompt(self) -> tuple[tuple[str, str], ...]:
        """Role and content of each message before the answer."""
        return tuple((message["role"], message["content"]) for message in self.messages[:-1])


@dataclass(frozen=True, slots=True)
class Transcript:
    """The tokens of a prompt and, from index ``answer_start``, of its answer.

    Attributes:
        answer_start: Index of the answer's first token.
        question: Text of the prompt's last message, for reports.
        kind: Kind of the conversation; empty where unknown.
        tail: Number of tokens at the prompt's end that the decoder computes, as with an adapter: it then writes the
            first token too. 0 means none: the full model reads the whole prompt and writes the first token.
    """

    token_ids: tuple[int, ...]
    answer_start: int
    question: str = ""
    kind: str = ""
    tail: int = 0

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.token_ids[: self.answer_start]

    @property
    def answer(self) -> tuple[int, ...]:
        return self.token_ids[self.answer_start :]

    @property
    def decoder_start(self) -> int:
        """Index of the first token that the decoder computes; the full model computes those before it."""
        return self.answer_start - self.tail

    @property
    def learn_start(self) -> int:
        """Index of the first answer token that the decoder writes."""
        return self.answer_start if self.tail else self.answer_start + 1

    @property
    def has_judged_tokens(self) -> bool:
        """True if the full model computes a part of the prompt, and the decoder writes a token of the answer."""
        return self.decoder_start > 0 and len(self.token_ids) > self.learn_start


def read_conversations(file: Path, field: str = "calibration") -> list[Conversation]:
    """Reads JSON lines: ``{"messages": [{"role": "user", "content": "…"}, …]}``, the last message an answer.

    ``"finished": false`` beside the messages marks an answer that is cut off; ``"kind"`` names the kind of question.

    Args:
        file: File of conversations.
        field: Name of the text in error messages.

    Raises:
        InvalidRequest: the file cannot be read, or a line has another form; the message names the line.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(field, f"{file} cannot be read: {error}") from None
    return [
        _conversation(line, f"{file}:{number}", field)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]


ShippedPart = Literal["calibration", "development", "test"]

JUDGED_SETS: tuple[ShippedPart, ...] = ("test", "development")


def shipped_conversations(part: ShippedPart) -> list[Conversation]:
    """Returns the conversations in the package, which SmolLM2-135M-Instruct wrote.

    Args:
        part: "calibration" for scoring and fitting; "development" to judge on for choices such as sizes; "test"
            for the figures that are reported: nothing was chosen or trained on it. It shares no run of 8 words
            (``overlap``) with the others, and has several kinds of question.
    """
    text = (resources.files("overfill.making") / "data" / f"{part}.jsonl").read_text(encoding="utf-8")
    return [_conversation(line, part, part) for line in text.splitlines()]


def judged_conversations(data: str) -> list[Conversation]:
    """Returns conversations to judge on: ``test`` or ``development`` of the package, or those of a file.

    Raises:
        InvalidRequest: as ``read_conversations``.
    """
    for part in JUDGED_SETS:
        if data == part:
            return shipped_conversations(part)
    return read_conversations(Path(data), "data")


def append_jsonl(file: Path, conversations: Iterable[Conversation]) -> None:
    """Appends conversations to ``file`` in the form that ``read_conversations`` reads."""
    with file.open("a", encoding="utf-8") as out:
        for conversation in conversations:
            row: dict[str, object] = {"messages": list(conversation.messages)}
            if not conversation.finished:
                row["finished"] = False
            if conversation.kind:
                row["kind"] = conversation.kind
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def encode(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    max_tokens: int | None = None,
    tail_tokens: int | None = None,
) -> list[Transcript]:
    """Tokenizes conversations with the chat template; a finished answer ends with the end-of-sequence token.

    Args:
        max_tokens: Length limit. Longer transcripts lose the end of their answer; a transcript whose prompt alone is
            too long is left out. None means no limit.
        tail_tokens: For an adapter, the number of tokens at the prompt's end that the decoder computes; 0 means the
            generation prompt. None means that there is no adapter.

    Raises:
        InvalidRequest: the template refuses a conversation, or the checkpoint has no template.
    """
    transcripts = []
    for conversation in conversations:
        prompt, opening = tokenizer.encode_with_generation_prompt(
            conversation.messages[:-1], count=tail_tokens is not None
        )
        answer = tokenizer.encode_continuation(conversation.messages[-1]["content"])
        end = [tokenizer.end_of_answer] if conversation.finished and tokenizer.end_of_answer is not None else []
        token_ids = (*prompt, *answer, *end)[:max_tokens]
        if len(token_ids) > len(prompt):
            question = conversation.messages[-2]["content"]
            tail = 0 if tail_tokens is None else len(prompt) - answer_start(len(prompt), tail_tokens, opening)
            transcripts.append(Transcript(token_ids, len(prompt), question, conversation.kind, tail))
    return transcripts


def encode_judged(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    max_tokens: int | None = None,
    tail_tokens: int | None = None,
) -> list[tuple[Conversation, Transcript]]:
    """Tokenizes as ``encode`` does; leaves out what has nothing to judge or to learn (``has_judged_tokens``)."""
    return [
        (conversation, transcript)
        for conversation in conversations
        for transcript in encode([conversation], tokenizer, max_tokens, tail_tokens)
        if transcript.has_judged_tokens
    ]


def digest_of(transcripts: Iterable[Transcript | None]) -> str:
    """Returns the SHA-256 of the transcripts and their order, in hexadecimal; None does not count."""
    found = hashlib.sha256()
    for transcript in transcripts:
        if transcript is not None:
            tail = [-transcript.tail] if transcript.tail else []
            numbers = transcript.answer_start, *transcript.token_ids, *tail
            found.update(struct.pack(f"<{len(numbers)}q", *numbers))
    return found.hexdigest()


def _conversation(line: str, where: str, field: str) -> Conversation:
    try:
        row = json.loads(line)
        messages, finished, kind = row["messages"], row.get("finished", True), str(row.get("kind", ""))
        texts = [(message["role"], message["content"]) for message in messages]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidRequest(field, f'{where} is not {{"messages": [{{"role", "content"}}, …]}}') from None
    if len(texts) < 2 or texts[-1][0] != "assistant" or not all(isinstance(t, str) for m in texts for t in m):
        raise InvalidRequest(field, f"{where} must hold texts and end with a message of role assistant")
    return Conversation(
        tuple({"role": role, "content": content} for role, content in texts), finished is not False, kind
    )
