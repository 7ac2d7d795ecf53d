"""What a curve consists of: shapes of requests, systems, tools, and the order of the points. Starts nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

OURS, OTHERS = ("split", "colocated"), ("identity", "vllm")
SYSTEMS = (*OURS, *OTHERS)
APART, APART_FROM = "apart", "colocated"
"""The system that all tools measure, once, with the first shape, and the system of the curve that it resembles.

It is not on the curve: a tool that uses more CPU time slows servers on the same cores, so this one leaves the last core
to the tool.
"""

GUIDELLM, AIPERF, OWN = "guidellm", "aiperf", "own"

_MIN_WAVES = 2
WAVE = 4
"""Requests of the warm-up that run at once."""


@dataclass(frozen=True, slots=True)
class RequestShape:
    """Lengths of requests, in tokens.

    Attributes:
        prefix, groups: beginning of the prompt that the requests of a group share, and the number of groups. The
            systems keep KV of prompts only for a shape with shared prefixes.
    """

    name: str
    prompt: int
    answer: int
    prefix: int = 0
    groups: int = 1

    @property
    def title(self) -> str:
        shared = f", of which {self.prefix:,} shared" if self.prefix else ""
        return f"{self.name.upper()}: {self.prompt:,} in{shared}, {self.answer} out"


SHAPES = {
    shape.name: shape
    for shape in (
        RequestShape("a", 1024, 128),
        RequestShape("b", 128, 512),
        RequestShape("c", 1280, 128, prefix=1000, groups=4),
    )
}
_IN_ROUNDS = "a"


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: a system under a number of concurrent requests of a shape."""

    shape: str
    system: str
    tool: str
    round: int
    concurrency: int

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.system}-{self.tool}-{self.round}-{self.concurrency}"

    def __str__(self) -> str:
        return f"{self.shape.upper()} {self.system}, {self.concurrency} at a time, round {self.round}, by {self.tool}"


def plan_points(
    shapes: Collection[str], systems: Collection[str], concurrency: Sequence[int], rounds: int
) -> list[Point]:
    """Returns the points in order. Within a round every system has its turn, so that a slower machine slows all.

    Args:
        rounds: of the first shape; the others have one.
    """
    found: list[Point] = []
    for shape in (name for name in SHAPES if name in shapes):
        for number in range(1, (rounds if shape == _IN_ROUNDS else 1) + 1):
            for system in (name for name in SYSTEMS if name in systems):
                found += [Point(shape, system, GUIDELLM, number, users) for users in concurrency]
            if (shape, number) == (_IN_ROUNDS, 1) and APART_FROM in systems:
                tools = (GUIDELLM, AIPERF, OWN)
                found += [Point(shape, APART, tool, number, users) for users in concurrency for tool in tools]
    return found


@dataclass(frozen=True, slots=True)
class AnswerPace:
    """How fast a warmed-up system answers: seconds of one request alone, and of ``WAVE`` at once."""

    alone: float
    wave: float

    def requests(self, concurrency: int, seconds: float) -> int:
        """Returns the number of requests that ``concurrency`` users send in about ``seconds``, the same for each user.

        Each tool sends this number and waits for all answers. A limit of time would break off the slow requests, and
        each tool counts those in its own way.
        """
        each = self.alone + (self.wave - self.alone) * (concurrency - 1) / (WAVE - 1)
        return concurrency * max(_MIN_WAVES, round(seconds / max(each, 1e-3)))
