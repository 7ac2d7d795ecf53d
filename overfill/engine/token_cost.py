"""What computing a prompt token costs, as measured lately. No torch."""

from __future__ import annotations

_HALF_LIFE = 4096
"""Tokens after which a measured duration has half of its weight."""


class TokenCost:
    """Seconds per computed prompt token, over all tokens; a token counts half when ``_HALF_LIFE`` others followed."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._launched = (0, 0.0)  # tokens and seconds of steps that a device may still compute

    def add(self, tokens: int, seconds: float, *, ended: bool) -> None:
        """Notes a step; ``ended`` is False if it only launched kernels, for which a later step will wait."""
        tokens, seconds = tokens + self._launched[0], seconds + self._launched[1]
        self._launched = (0, 0.0) if ended else (tokens, seconds)
        if ended:
            kept = 0.5 ** (tokens / _HALF_LIFE)
            self._tokens, self._seconds = kept * self._tokens + tokens, kept * self._seconds + seconds

    @property
    def seconds(self) -> float:
        """0 if no step has been noted."""
        return self._seconds / self._tokens if self._tokens else 0.0
