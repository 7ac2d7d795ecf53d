"""The requests that a simulation plays: one or more traces, one after another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import click

from overfill.cli.options import Number, option_field
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

_POSITIVE = Number(0, min_open=True)
_COUNT = click.IntRange(1)


@dataclass(frozen=True, slots=True)
class Load:
    """Describes the requests of a simulation. Each field is an option of the command."""

    trace: Sequence[str] = option_field(
        ("synthetic",),
        "Trace to play: FILE, azure:FILE, mooncake:FILE, synthetic, synthetic:RATE:REQUESTS with its own rate and "
        "number of requests, or sessions:CHATS:TURNS:TOKENS, chats that share a system prompt of TOKENS. Repeat it to "
        "play several one after another.",
        str,
        multiple=True,
    )
    requests: int | None = option_field(
        None, "Play the first N requests of each trace.", _COUNT, otherwise="all; synthetic: 1000"
    )
    rate: float | None = option_field(
        None, "Mean requests per second of each trace.", _POSITIVE, otherwise="the trace's; synthetic: 1"
    )
    rate_scale: float = option_field(1.0, "Factor for the rate of all requests.", _POSITIVE)
    length_scale: float = option_field(1.0, "Factor for the lengths of prompts and answers.", _POSITIVE)
    longest: int | None = option_field(
        None, "Maximum tokens of a prompt and its answer; longer prompts are cut.", click.IntRange(2)
    )
    prompt_tokens: int = option_field(512, "Length of a synthetic prompt; in chats, of a turn's.", _COUNT)
    output_tokens: int = option_field(128, "Length of a synthetic answer.", _COUNT)
    seed: int = option_field(0, "Random seed for synthetic arrivals, policies and failures.", int)

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
            return synthetic(count, rate, *lengths, self.seed)
        if kind in get_args(TraceKind):
            requests = read_trace(Path(path), self.requests, kind)  # type: ignore[arg-type]
        else:
            requests = read_trace(Path(name), self.requests)
        return requests if self.rate is None else set_rate(requests, self.rate)
