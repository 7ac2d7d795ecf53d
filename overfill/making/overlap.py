"""Find conversations that share a run of words with other text, so that a decoder is not judged on what made it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from heapq import nsmallest
from pathlib import Path

import numpy as np

from overfill.errors import InvalidPair
from overfill.making.conversations import Conversation
from overfill.model.manifest import Pair

RUN = 8
"""Words in a run. Shorter runs are mostly phrases that any two texts share."""

MAX_DIGESTS = 131_072
"""Digests that a pair keeps: 1 MB, enough for every run in about 6,000 short questions."""

DIGESTS_FILE = "text_digests.bin"
DECODER_TEXT = "the text that made the decoder"
"""How messages name the text that ``TextDigests`` are of."""

_NAMED = 10  # overlapping conversations in a message
_WORD = re.compile(r"\w+")


def overlapping(
    conversations: Sequence[Conversation], others: Iterable[Conversation], *, answers: bool = False
) -> list[int]:
    """Returns the indices of the conversations that share a run of 8 words with one of ``others``.

    Case and punctuation do not count. A text of fewer words is one run.

    Args:
        answers: Compares the answers as well. Answers of one model share many phrases.
    """
    seen = {run for other in others for run in _runs(other, answers)}
    return [i for i, conversation in enumerate(conversations) if not seen.isdisjoint(_runs(conversation, answers))]


class TextDigests:
    """Digests of the runs of words in the questions that a decoder was fitted or trained on.

    A pair keeps them in ``text_digests.bin``: 8 bytes each, little-endian, ascending. Of more than ``MAX_DIGESTS``, the
    smallest stay, which are a random sample of the runs. Long questions that occur twice are found in it all the same.
    """

    def __init__(self, values: Iterable[int]) -> None:
        self._values = frozenset(nsmallest(MAX_DIGESTS, set(values)))

    @classmethod
    def of(cls, conversations: Iterable[Conversation]) -> TextDigests:
        return cls(_digest(run) for conversation in conversations for run in _runs(conversation, answers=False))

    def __or__(self, other: TextDigests) -> TextDigests:
        return TextDigests(self._values | other._values)

    def overlapping(self, conversations: Sequence[Conversation]) -> list[int]:
        """Returns the indices of the conversations whose questions have one of these runs."""
        return [
            index
            for index, conversation in enumerate(conversations)
            if not self._values.isdisjoint(map(_digest, _runs(conversation, answers=False)))
        ]

    def sample(self, count: int) -> list[int]:
        """Returns the ``count`` smallest digests, or all; they are a random sample of the runs."""
        return nsmallest(count, self._values)

    def save(self, pair_folder: Path) -> None:
        np.array(sorted(self._values), dtype="<u8").tofile(pair_folder / DIGESTS_FILE)

    @classmethod
    def load(cls, pair: Pair) -> TextDigests | None:
        """Reads the digests of a pair; returns None if it keeps none, such as one that was made elsewhere.

        A decoder that is the full model was made from no text.

        Raises:
            InvalidPair: the file cannot be read, or has a size that no file of digests has.
        """
        file = pair.folder / DIGESTS_FILE
        try:
            if (size := file.stat().st_size) > 8 * MAX_DIGESTS or size % 8:
                allowed = f"must be a multiple of 8, at most {8 * MAX_DIGESTS}"
                raise InvalidPair(f"{file} has {size} bytes; the number {allowed}; it is damaged")
            return cls(np.fromfile(file, dtype="<u8").tolist())
        except FileNotFoundError:
            return cls(()) if pair.decoder_path == pair.full_path else None
        except OSError as error:
            raise InvalidPair(f"{file} cannot be read: {error}") from None


def describe_overlap(shared: Sequence[int] | None, judged: int, text: str) -> str:
    """Says how many of ``judged`` conversations share runs of words with ``text``, and which, counted from 1.

    Args:
        shared: Indices, as ``overlapping`` returns them. None if nothing is known of ``text``.
    """
    if shared is None:
        return f"not known for {text}, of which no digests are kept"
    named = ", ".join(str(index + 1) for index in shared[:_NAMED]) + ", …" * (len(shared) > _NAMED)
    which = f" (numbers {named})" if shared else ""
    return f"{len(shared)} of {judged} judged conversations{which} share {RUN} words in a row with {text}"


def _digest(run: Sequence[str]) -> int:
    return int.from_bytes(blake2b(" ".join(run).encode(), digest_size=8).digest(), "little")


def _runs(conversation: Conversation, answers: bool) -> Iterator[tuple[str, ...]]:
    messages = conversation.messages if answers else conversation.messages[:-1]
    for message in messages:
        if message["role"] == "system":  # often the same for all conversations
            continue
        words = tuple(_WORD.findall(message["content"].lower()))
        for start in range(max(1, len(words) - RUN + 1) if words else 0):
            yield words[start : start + RUN]
