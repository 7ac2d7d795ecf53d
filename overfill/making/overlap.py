"""Find conversations that share a run of words with other text, so that a decoder is not judged on what made it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from overfill.making.conversations import Conversation

RUN = 8
"""Words in a run. Shorter runs are mostly phrases that any two texts share."""

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


def _runs(conversation: Conversation, answers: bool) -> Iterator[tuple[str, ...]]:
    messages = conversation.messages if answers else conversation.messages[:-1]
    for message in messages:
        if message["role"] == "system":  # often the same for all conversations
            continue
        words = tuple(_WORD.findall(message["content"].lower()))
        for start in range(max(1, len(words) - RUN + 1) if words else 0):
            yield words[start : start + RUN]
