"""The requests that a simulation plays: one or more traces, one after another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from overfill.errors import InvalidRequest
from overfill.lab.traffic.traces import (
    TraceKind,
    TraceRequest,
    concatenate,
    read_trace,
    scale_lengths,
    scale_rate,
    sessions,
    set_rate,
    synthetic,
)

_SYNTHETIC = re.compile(r"synthetic(:(?P<rate>[0-9.]*[1-9][0-9.]*)(:(?P<count>[1-9][0-9]*))?)?")
_SESSIONS = re.compile(r"sessions:([1-9][0-9]*):([1-9][0-9]*):([0-9]+)")


@dataclass(frozen=True, slots=True)
class Load:
    """Describes the requests of a simulation.

    Attributes:
        trace: A file, ``azure:FILE``, ``mooncake:FILE``, ``synthetic``, ``synthetic:RATE:REQUESTS``, or
            ``sessions:CHATS:TURNS:TOKENS``; each of them, one after another.
        requests: Only the first requests of each trace.
        rate: Mean requests per second of each trace. None means the trace's own; 1 if it has none.
        rate_scale, length_scale: Factors for the rate of all requests, and for the lengths of prompts and answers.
        longest: Maximum tokens of a prompt and its answer; longer prompts are cut.
        prompt_tokens, output_tokens: Lengths for synthetic traces; in chats, of each turn.
        seed: Random seed of synthetic arrivals.
    """

    trace: Sequence[str] = ("synthetic",)
    requests: int | None = None
    rate: float | None = None
    rate_scale: float = 1.0
    length_scale: float = 1.0
    longest: int | None = None
    prompt_tokens: int = 512
    output_tokens: int = 128
    seed: int = 0

    def read(self) -> list[TraceRequest]:
        """Returns the requests. Raises InvalidRequest if a trace is none, or cannot be read."""
        parts = [scale_lengths(self._read(name), self.length_scale, self.longest) for name in self.trace]
        return scale_rate(concatenate(parts), self.rate_scale)

    def _read(self, name: str) -> list[TraceRequest]:
        kind, _, path = name.partition(":")
        lengths = self.prompt_tokens, self.output_tokens
        if kind == "sessions":
            if (chats := _SESSIONS.fullmatch(name)) is None:
                raise InvalidRequest("trace", f"{name!r}: expected sessions:CHATS:TURNS:TOKENS, the first two above 0")
            count, turns, tokens = map(int, chats.groups())
            return sessions(count, turns, tokens, self.rate or 1.0, *lengths, self.seed)[: self.requests]
        if kind == "synthetic":
            if (own := _SYNTHETIC.fullmatch(name)) is None:
                raise InvalidRequest(
                    "trace", f"{name!r}: expected synthetic:RATE or synthetic:RATE:REQUESTS, both above 0"
                )
            count, rate = int(own["count"] or self.requests or 1000), float(own["rate"] or self.rate or 1.0)
            return synthetic(count, "poisson", rate, *lengths, self.seed)
        if kind in get_args(TraceKind):
            requests = read_trace(Path(path), self.requests, kind)  # type: ignore[arg-type]
        else:
            requests = read_trace(Path(name), self.requests)
        return requests if self.rate is None else set_rate(requests, self.rate)
