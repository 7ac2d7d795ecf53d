"""Answers as the clients of a trial receive them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from overfill.client import Answer, AnswerIdentity, AnswerPart
from overfill.lab.chaos.load import NO_ANSWER


def parts(*places: tuple[str, int]) -> tuple[AnswerPart, ...]:
    """Returns parts of an answer from the tier and the index of the first token of each."""
    return tuple(AnswerPart(tier, first_index) for tier, first_index in places)


def answered(*places: tuple[str, int], revision: str = "", answer_start: int = 0, **fields: Any) -> Answer:
    """Returns an answer with the parts at ``places``, and with other ``fields`` of ``Answer``."""
    identity = AnswerIdentity(revision=revision, answer_start=answer_start)
    return replace(NO_ANSWER, parts=parts(*places), identity=identity, **fields)
