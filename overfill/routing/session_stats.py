"""The sessions that were active lately: their turns, and the share of their prompts that was cached. No I/O."""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from overfill.routing.job import Job
from overfill.v1 import admin_pb2, common_pb2

ACTIVE_SECONDS = 300.0
"""Seconds after its latest request for which a session counts as active."""

MAX_ACTIVE = 10_000
"""Maximum number of sessions that are counted; of more, those with the latest requests are."""

MAX_BUSIEST = 5
"""Number of sessions that a status names."""

_ID_DIGITS = 8


@dataclass(slots=True)
class _Session:
    """What one session has done while it was active; ``latest`` is the time of its latest request, in seconds."""

    latest: float = 0.0
    turns: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class SessionStats:
    """Statistics of one router's sessions. ``now`` is in seconds, monotonic."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[tuple[str, str], _Session] = OrderedDict()

    def accepted(self, job: Job) -> None:
        """Counts a request."""
        if not job.session:
            return
        name = job.key, job.session
        session = self._sessions.setdefault(name, _Session())
        if session.latest < job.received - ACTIVE_SECONDS:
            session = self._sessions[name] = _Session()
        session.latest = job.received
        self._sessions.move_to_end(name)
        if len(self._sessions) > MAX_ACTIVE:
            self._sessions.popitem(last=False)

    def answered(self, job: Job, usage: common_pb2.Usage) -> None:
        """Counts a complete answer as a turn of its session."""
        if (session := self._sessions.get((job.key, job.session))) is not None:
            session.turns += 1
            session.prompt_tokens += usage.prompt_tokens
            session.cached_tokens += usage.cached_tokens

    def num_active(self, now: float) -> int:
        """Number of active sessions. Callable from any thread."""
        return sum(session.latest >= now - ACTIVE_SECONDS for session in list(self._sessions.values()))

    def busiest(self, now: float) -> list[admin_pb2.SessionActivity]:
        """Returns the active sessions with the most turns, without their names."""
        active = [entry for entry in self._sessions.items() if entry[1].latest >= now - ACTIVE_SECONDS]
        return [
            admin_pb2.SessionActivity(
                id=hashlib.sha256("\0".join(name).encode()).hexdigest()[:_ID_DIGITS],
                turns=session.turns,
                prompt_tokens=session.prompt_tokens,
                cached_tokens=session.cached_tokens,
            )
            for name, session in heapq.nlargest(MAX_BUSIEST, active, key=lambda entry: entry[1].turns)
        ]


def busiest_of(routers: Iterable[Iterable[admin_pb2.SessionActivity]]) -> list[admin_pb2.SessionActivity]:
    """Returns the busiest sessions of several routers, given those of each. A session may have used several."""
    total: dict[str, admin_pb2.SessionActivity] = {}
    for session in (session for busiest in routers for session in busiest):
        known = total.setdefault(session.id, admin_pb2.SessionActivity(id=session.id))
        known.turns += session.turns
        known.prompt_tokens += session.prompt_tokens
        known.cached_tokens += session.cached_tokens
    return heapq.nlargest(MAX_BUSIEST, total.values(), key=lambda session: session.turns)
