"""How new conversations are divided between the two revisions of a stack. Plain logic: no clock and no I/O.

Each conversation has a place from 0 to 100, and the new revision answers it if the place is below the revision's share.
All routers compute the same place and keep no table. While the share grows, a conversation changes its revision at most
once, and its prompt is computed again there.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, fields, replace

from overfill.errors import InvalidRequest
from overfill.rpc.membership import is_newer
from overfill.v1 import inference_pb2, registry_pb2

MAX_DURATION = 7 * 24 * 3600.0
"""Longest time in seconds in which a share may change."""

MAX_MESSAGES = 64
"""Messages of a chat without one of the user that name its conversation. Reading more would delay other streams."""


@dataclass(frozen=True, slots=True)
class RolloutState:
    """The share of the new revision, as a message on the wire says it (``registry_pb2.Rollout``).

    ``now`` is Unix time in seconds, in every method.

    Attributes:
        generation: number of the change, 1 to 2**64 - 1, after which 1 follows; 0 before the first.
        tie_break: orders two states of one generation.
        revision: name of the new revision.
        from_percent, to_percent: its share at the start and at the end of the change, 0 to 100.
        started_ms: start of the change, milliseconds of Unix time.
        duration_ms: the share changes evenly during this time; 0 means at once.
        paused: the change was stopped before its end: the share stays at ``from_percent``.
    """

    generation: int = 0
    tie_break: int = 0
    revision: str = ""
    from_percent: float = 0.0
    to_percent: float = 0.0
    started_ms: int = 0
    duration_ms: int = 0
    paused: bool = False

    @classmethod
    def from_proto(cls, message: registry_pb2.Rollout) -> RolloutState:
        """Converts a message. Raises InvalidRequest if a number is out of bounds."""
        for name in ("from_percent", "to_percent"):
            check_percent(f"rollout.{name}", getattr(message, name))
        if message.duration_ms > (most := round(MAX_DURATION * 1000)):
            raise InvalidRequest("rollout.duration_ms", f"must be at most {most}; got {message.duration_ms}")
        if not message.generation:
            raise InvalidRequest("rollout.generation", "must be at least 1; got 0")
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})

    def to_proto(self) -> registry_pb2.Rollout:
        """Returns the state as the wire's message."""
        return registry_pb2.Rollout(**asdict(self))

    def newer_than(self, other: RolloutState) -> bool:
        """True if this state replaces ``other``."""
        return is_newer(self, other)

    def share(self, now: float) -> float:
        """Returns the share of new conversations that the new revision gets, 0 to 100."""
        if self.paused:
            return self.from_percent
        if self.remaining(now) <= 0:
            return self.to_percent
        passed = max(0.0, now * 1000 - self.started_ms) / self.duration_ms
        return self.from_percent + (self.to_percent - self.from_percent) * passed

    def remaining(self, now: float) -> float:
        """Returns the seconds until the change ends; 0 if it has ended or is paused."""
        if self.paused:
            return 0.0
        return min(self.duration_ms, max(0.0, self.started_ms + self.duration_ms - now * 1000)) / 1000

    def set(self, percent: float, over: float, now: float, generation: int, tie_break: int) -> RolloutState:
        """Returns the state in which the share changes evenly to ``percent``, in ``over`` seconds.

        Raises:
            InvalidRequest: a number is out of bounds.
        """
        check_percent("set.percent", percent)
        if not 0 <= over <= MAX_DURATION:
            raise InvalidRequest("set.over_seconds", f"must be from 0 to {MAX_DURATION:.0f} (7 days); got {over:g}")
        return RolloutState(
            generation,
            tie_break,
            self.revision,
            self.share(now),
            percent,
            round(now * 1000),
            round(over * 1000),
        )

    def pause(self, now: float, generation: int, tie_break: int) -> RolloutState:
        """Returns the state in which the share stays as it is now; this one if no change is in progress."""
        if not self.remaining(now):
            return self
        share = self.share(now)
        return replace(self, generation=generation, tie_break=tie_break, from_percent=share, paused=True)


def check_percent(field: str, percent: float) -> None:
    """Raises InvalidRequest unless ``percent`` is a number from 0 to 100. ``field`` names it in the message."""
    if not (math.isfinite(percent) and 0 <= percent <= 100):
        raise InvalidRequest(field, f"must be from 0 to 100; got {percent:g}")


def place(key: str, conversation: bytes) -> float:
    """Returns the place of a conversation, at least 0 and less than 100. All routers return the same.

    Args:
        key: id of the client's API key; empty without keys.
    """
    digest = hashlib.blake2b(_counted(key) + conversation, digest_size=4).digest()
    return int.from_bytes(digest, "little") / 2**32 * 100


def conversation(request: inference_pb2.GenerateRequest) -> bytes:
    """Returns what names the conversation of a request.

    It is the session if the request has one. Else it is the beginning of the chat, to the end of the first message of
    the user, which all turns share. Else it is the whole text or all token ids.
    """
    if request.session:
        return b"session:" + request.session.encode()
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        return b"ids:" + request.token_ids.SerializeToString()
    if kind != "chat":
        return b"text:" + request.text.encode()
    parts = [b"chat:"]
    for message in request.chat.messages[:MAX_MESSAGES]:
        parts += [_counted(message.role), _counted(message.content)]
        if message.role == "user":
            break
    return b"".join(parts)


def _counted(text: str) -> bytes:
    data = text.encode()
    return b"%d:%b" % (len(data), data)
