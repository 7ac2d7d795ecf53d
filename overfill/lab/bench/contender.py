"""What is measured side by side: anything that reads prompts and then writes a token of each per step.

Every contender is used in the same way, and times itself, so that what runs in another process is not charged for
the way there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Contender(Protocol):
    """An engine, ours or another, with a model loaded.

    Attributes:
        name: as rows and tables show it.
    """

    name: str

    def begin(self, batch: int, prompt_tokens: int, steps: int) -> None:
        """Starts ``batch`` sequences with prompts of that length and room for ``steps`` tokens each.

        Afterwards every sequence has its prompt's KV and its first token.
        """

    def steps(self, count: int) -> list[float]:
        """Computes ``count`` tokens of every sequence, greedily; seconds of each step."""

    def end(self) -> None:
        """Forgets the sequences."""

    def prefill(self, lengths: Sequence[int]) -> float:
        """Seconds to read prompts of these lengths, given all at once, and to know the first token of each."""

    def close(self) -> None:
        """Frees the model."""
