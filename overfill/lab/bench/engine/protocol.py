"""The interface of an engine that is measured: it prefills prompts, then decodes one token of each per step.

Every engine times itself. So the way to an engine in another process is not part of its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class BenchEngine(Protocol):
    """An engine with a model loaded: ours, or a peer.

    Attributes:
        name: Name in rows and tables.
    """

    name: str

    def begin(self, batch: int, prompt_tokens: int, steps: int) -> None:
        """Prefills ``batch`` sequences of ``prompt_tokens`` tokens and samples the first token of each.

        Reserves room for ``steps`` more tokens per sequence.
        """

    def steps(self, count: int) -> list[float]:
        """Decodes ``count`` tokens of every sequence, greedily. Returns the seconds of each step."""

    def end(self) -> None:
        """Frees the sequences."""

    def prefill(self, lengths: Sequence[int]) -> float:
        """Seconds from submitting prompts of these lengths, all at once, to the first token of each."""

    def close(self) -> None:
        """Frees the model."""
