"""Which of several admissible workers takes a request. Admission itself is the dispatcher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from overfill.routing.pool import Worker


class Policy(Protocol):
    """Picks one worker for a request of ``tokens`` tokens; ``workers`` is not empty and all may take it."""

    def choose(self, workers: Sequence[Worker], tokens: int) -> Worker: ...


class LeastLoad:
    """Fewest queued prompt tokens, then fewest requests; among equals the least recently used."""

    def choose(self, workers: Sequence[Worker], tokens: int) -> Worker:
        return min(workers, key=lambda w: (w.queued_tokens, w.requests, w.last_placed, w.id))


class RoundRobin:
    """The worker whose latest placement is longest ago."""

    def choose(self, workers: Sequence[Worker], tokens: int) -> Worker:
        return min(workers, key=lambda w: (w.last_placed, w.id))
