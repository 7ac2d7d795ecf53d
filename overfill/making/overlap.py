"""Finds conversations that share a run of words with other text, so that a decoder is not judged on what made it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from heapq import nsmallest
from pathlib import Path

import numpy as np

from overfill.errors import InvalidPair, InvalidRequest
from overfill.making.conversations import Conversation
from overfill.model.manifest import Pair

RUN = 8
"""Words in a run. Shorter runs are mostly phrases that any two texts share."""

MAX_DIGESTS = 131_072
"""Digests that a pair keeps: 1 MB, enough for every run in about 6,000 short questions."""

DIGESTS_FILE = "text_digests.bin"
DECODER_TEXT = "the text that made the decoder"
"""How messages name the text of a pair's digests."""

_NAMED = 10  # overlapping conversations in a message
_WORD = re.compile(r"\w+")


class TextDigests:
    """64-bit digests of the runs of 8 words in the questions of conversations.

    Case and punctuation do not count. A question of fewer words is one run. Only users' messages are questions: system
    messages are often the same, and the answers of one model share many phrases.

    A pair keeps the digests of the text that its decoder was fitted or trained on in ``text_digests.bin``: 8 bytes
    each, little-endian, ascending. Of more than ``MAX_DIGESTS`` it keeps the smallest, which are a random sample of the
    runs. Long questions that occur twice are found in it all the same.
    """

    def __init__(self, values: Iterable[int]) -> None:
        self._values = frozenset(values)

    @classmethod
    def of(cls, conversations: Iterable[Conversation]) -> TextDigests:
        return cls(digest for conversation in conversations for digest in _digests(conversation))

    def __or__(self, other: TextDigests) -> TextDigests:
        return TextDigests(self._values | other._values)

    def overlapping(self, conversations: Sequence[Conversation]) -> list[int]:
        """Returns the indices of the conversations whose questions have one of these runs."""
        return [
            i for i, conversation in enumerate(conversations) if not self._values.isdisjoint(_digests(conversation))
        ]

    def sample(self, count: int) -> list[int]:
        """Returns the ``count`` smallest digests, or all, in ascending order; they are a random sample of the runs."""
        return nsmallest(count, self._values)

    def save(self, pair_folder: Path) -> None:
        np.array(self.sample(MAX_DIGESTS), dtype="<u8").tofile(pair_folder / DIGESTS_FILE)

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


def find_overlaps(
    judged: Sequence[Conversation], texts: Mapping[str, TextDigests | None], field: str, *, strict: bool
) -> dict[str, list[int] | None]:
    """Returns the indices of the conversations that overlap with each text; None for a text that is not known.

    Args:
        texts: Digests of each text, by the text's name in messages.
        field: Name of ``judged`` in error messages.
        strict: Refuse conversations that overlap, and all if a text is not known.

    Raises:
        InvalidRequest: ``strict`` refuses the conversations; the message describes all overlaps.
    """
    found = {name: None if text is None else text.overlapping(judged) for name, text in texts.items()}
    if strict and any(shared != [] for shared in found.values()):
        lines = (f"overlap: {describe_overlap(shared, len(judged), name)}" for name, shared in found.items())
        raise InvalidRequest(field, "; ".join(lines))
    return found


def describe_overlap(shared: Sequence[int] | None, judged: int, text: str) -> str:
    """Says how many of ``judged`` conversations share runs of words with ``text``, and which, counted from 1.

    Args:
        shared: Indices, as ``TextDigests.overlapping`` returns them. None if nothing is known of ``text``.
    """
    if shared is None:
        return f"not known for {text}, of which no digests are kept"
    named = ", ".join(str(index + 1) for index in shared[:_NAMED]) + ", …" * (len(shared) > _NAMED)
    which = f" (numbers {named})" if shared else ""
    return f"{len(shared)} of {judged} judged conversations{which} share {RUN} words in a row with {text}"


def _digests(conversation: Conversation) -> Iterator[int]:
    for message in conversation.messages[:-1]:
        if message["role"] != "user":
            continue
        words = _WORD.findall(message["content"].lower())
        for start in range(max(1, len(words) - RUN + 1) if words else 0):
            run = " ".join(words[start : start + RUN])
            yield int.from_bytes(blake2b(run.encode(), digest_size=8).digest(), "little")
