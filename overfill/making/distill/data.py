"""Loads the transcripts to train and to judge on, and draws the batches of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from overfill.api.tokenizer import Tokenizer
from overfill.errors import InvalidRequest
from overfill.making.conversations import (
    Conversation,
    ShippedPart,
    Transcript,
    digest_of,
    encode_judged,
    read_conversations,
    shipped_conversations,
)
from overfill.making.distill.recipe import Data
from overfill.making.hub_data import as_conversation, is_dataset, load_hub
from overfill.making.overlap import TextDigests

Transcripts = Sequence[Transcript | None]
"""None stands for a conversation with nothing to learn: its answer has one token, or its prompt fills the context."""


@dataclass(frozen=True, slots=True)
class LoadedData:
    """Transcripts of a run, and what is known of their text.

    Attributes:
        training: Transcripts to train on.
        held_out: Transcripts to judge on.
        training_text: Digests of the text of ``training``. None for a hub data set, which is too large to compare.
        judged: Conversations of ``held_out``, in their order.
    """

    training: Transcripts
    held_out: list[Transcript]
    training_text: TextDigests | None
    judged: list[Conversation]


def load_data(data: Data, tokenizer: Tokenizer) -> LoadedData:
    """Loads the transcripts to train on and the held-out ones.

    Raises:
        InvalidRequest: a source cannot be read or has no usable conversation.
    """
    training = _load(data, data.source, data.split, "shipped", "calibration", tokenizer)
    held_out_source = data.held_out or (data.source if data.held_out_split else "development")
    held_out_split = data.held_out_split or data.split
    held_out = _load(data, held_out_source, held_out_split, "development", "development", tokenizer)
    judged = list(islice(held_out.with_text() if isinstance(held_out, HubTranscripts) else held_out, data.max_held_out))
    if not len(training) or not judged:
        empty = data.source if not len(training) else held_out_source
        raise InvalidRequest("data", f"{empty} holds no conversation with an answer of at least two tokens")
    return LoadedData(
        training=training if isinstance(training, HubTranscripts) else [transcript for _, transcript in training],
        held_out=[transcript for _, transcript in judged],
        training_text=None if isinstance(training, HubTranscripts) else TextDigests.of(text for text, _ in training),
        judged=[text for text, _ in judged],
    )


def load_task(data: Data, tokenizer: Tokenizer) -> LoadedData:
    """Loads a task's conversations for an adapter from the file ``data.source``.

    Without ``data.held_out``, conversations are held out by the digest of their prompts, so that those with equal
    prompts are all on one side, and a resumed run holds out the same.

    Raises:
        InvalidRequest: a file cannot be read, or one side has no usable conversation.
    """
    conversations = read_conversations(Path(data.source), "data")
    if data.held_out is None:
        marked = [(_held_out_mark(c) < data.held_out_share, c) for c in conversations]
        parts = [[c for held_out, c in marked if not held_out], [c for held_out, c in marked if held_out]]
    else:
        parts = [conversations, read_conversations(Path(data.held_out), "held_out")]
    training, judged = (encode_judged(part, tokenizer, data.max_tokens, data.tail_tokens) for part in parts)
    judged = judged[: data.max_held_out]
    if not training or not judged:
        side = "training" if not training else "held-out"
        raise InvalidRequest("data", f"{data.source} leaves no {side} conversation; give more, or a --held-out file")
    return LoadedData(
        training=[transcript for _, transcript in training],
        held_out=[transcript for _, transcript in judged],
        training_text=TextDigests.of(text for text, _ in training),
        judged=[text for text, _ in judged],
    )


def _held_out_mark(conversation: Conversation) -> float:
    """Returns a number in [0, 1) that depends on the prompt only."""
    return int.from_bytes(hashlib.sha256(repr(conversation.prompt).encode()).digest()[:4], "big") / 2**32


def _load(
    data: Data, source: str, split: str, name: str, part: ShippedPart, tokenizer: Tokenizer
) -> list[tuple[Conversation, Transcript]] | HubTranscripts:
    """Loads ``source``; ``name`` stands for ``part`` of the package."""
    if source == name:
        conversations = shipped_conversations(part)
    elif Path(source).exists():
        conversations = read_conversations(Path(source), "data")
    elif is_dataset(source):
        return HubTranscripts(load_hub(source, split, data.column), data, tokenizer)
    else:
        raise InvalidRequest("data", f"{source} is neither `{name}`, nor a file, nor the id of a hub data set")
    return encode_judged(conversations, tokenizer, data.max_tokens)


class HubTranscripts(Sequence[Transcript | None]):
    """Rows of a hub data set, tokenized on access, because memory does not hold the ids of millions of rows."""

    def __init__(self, rows: Any, data: Data, tokenizer: Tokenizer) -> None:
        self._rows = rows
        self._data = data
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Transcript | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[Transcript | None]: ...
    def __getitem__(self, index: int | slice) -> Transcript | list[Transcript | None] | None:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._encoded(as_conversation(self._rows[index][self._data.column]))

    def with_text(self) -> Iterator[tuple[Conversation, Transcript]]:
        """Yields the usable conversations with their transcripts."""
        for row in self._rows:
            conversation = as_conversation(row[self._data.column])
            transcript = self._encoded(conversation)
            if conversation is not None and transcript is not None:
                yield conversation, transcript

    def _encoded(self, conversation: Conversation | None) -> Transcript | None:
        if conversation is None:
            return None
        try:
            usable = encode_judged([conversation], self._tokenizer, self._data.max_tokens)
        except InvalidRequest:  # the chat template refuses this conversation; training skips it
            return None
        return usable[0][1] if usable else None

    def fingerprint(self) -> str:
        return f"{self._rows._fingerprint}:{self._data.column}:{self._data.max_tokens}:{self._tokenizer.digest}"


def digest(transcripts: Transcripts) -> str:
    """Returns a digest of the transcripts and their order."""
    if isinstance(transcripts, HubTranscripts):
        return hashlib.sha256(transcripts.fingerprint().encode()).hexdigest()
    return digest_of(transcripts)


def batches(count: int, size: int, seed: int, first_step: int) -> Iterator[list[int]]:
    """Yields endless batches of ``size`` out of ``count`` indices: shuffled epochs, cut into batches.

    A step's batch depends only on the arguments and the step, so that a run can resume at any step.
    """
    position = first_step * size
    epoch, orders = -1, np.empty(0, dtype=np.int64)
    while True:
        batch = []
        for place in range(position, position + size):
            if place // count != epoch:
                epoch = place // count
                orders = np.random.default_rng([seed, epoch]).permutation(count)
            batch.append(int(orders[place % count]))
        yield batch
        position += size
