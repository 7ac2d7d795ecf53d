"""Traces of requests: reads recorded ones, makes synthetic ones, scales rates and lengths.

Two published formats are read. Neither contains text, only lengths.

* Azure LLM inference traces (CSV): ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens``.
* Mooncake (JSON lines): ``timestamp`` in ms, ``input_length``, ``output_length``, and ``hash_ids``, one per block of
  512 prompt tokens.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, ValidationError

from overfill.errors import InvalidRequest

MOONCAKE_BLOCK = 512
"""Prompt tokens per hash in Mooncake's traces."""

TraceKind = Literal["azure", "mooncake"]


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        arrival: Seconds after the first request.
        prompt_tokens, output_tokens: Lengths, at least 1 each.
        blocks: One number per ``block_tokens`` of the prompt. Prompts whose first numbers are equal share a prefix.
            Empty means that no shared prefix is known.
        answer_blocks: Numbers of the blocks after the prompt's full ones that the answer fills; empty means unknown.
        tier: Tier that the request names; empty means none.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = MOONCAKE_BLOCK
    answer_blocks: tuple[int, ...] = ()
    tier: str = ""

    def prompt(self, vocab_size: int, seed: int) -> list[int]:
        """Returns random token ids of the prompt's length. Equal numbers in ``blocks`` give equal tokens."""
        if not self.blocks:
            return _ids(random.Random(f"request {seed}"), vocab_size, self.prompt_tokens)
        ids: list[int] = []
        for block in self.blocks:
            ids += _ids(random.Random(f"block {block}"), vocab_size, self.block_tokens)
        ids += _ids(random.Random(f"request {seed}"), vocab_size, self.prompt_tokens - len(ids))
        return ids[: self.prompt_tokens]


def read_trace(path: Path, limit: int | None = None, kind: TraceKind | None = None) -> list[TraceRequest]:
    """Reads the first ``limit`` requests of a trace. Returns them by arrival; the first one arrives at 0.

    Args:
        kind: Format of the file. None means Azure's if the name ends in ``.csv``, else Mooncake's.

    Raises:
        InvalidRequest: The file cannot be read, or a line is wrong. The message names the line and the field.
    """
    kind = kind or ("azure" if path.suffix == ".csv" else "mooncake")
    try:
        with path.open(encoding="utf-8-sig") as lines:
            records = islice(_azure(lines) if kind == "azure" else _mooncake(lines), limit)
            requests = [_request(f"{path}, line {number}", read) for number, read in records]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("trace", f"{path} cannot be read: {error}") from None
    if not requests:
        raise InvalidRequest("trace", f"{path} contains no requests")
    requests.sort(key=lambda request: request.arrival)
    start = requests[0].arrival
    return [replace(request, arrival=request.arrival - start) for request in requests]


def concatenate(traces: Sequence[Sequence[TraceRequest]]) -> list[TraceRequest]:
    """Joins traces: each one begins when the last request of the previous one arrives.

    Block numbers are made distinct, so that requests of different traces share no prefix.
    """
    joined: list[TraceRequest] = []
    start, used = 0.0, 0
    for trace in traces:
        numbers = max((max((*r.blocks, *r.answer_blocks), default=-1) for r in trace), default=-1) + 1
        for request in trace:
            blocks, answer = (
                tuple(number + used for number in part) for part in (request.blocks, request.answer_blocks)
            )
            arrival = request.arrival + start
            joined.append(replace(request, arrival=arrival, blocks=blocks, answer_blocks=answer))
        start, used = joined[-1].arrival, used + numbers
    return joined


def scale_lengths(requests: Sequence[TraceRequest], factor: float, longest: int | None = None) -> list[TraceRequest]:
    """Makes prompts and answers ``factor`` times as long. Shared prefixes scale with them.

    Args:
        longest: Maximum tokens of a prompt and its answer together; the prompt is cut to fit.

    Raises:
        InvalidRequest: An answer has ``longest`` tokens or more.
    """
    scaled = []
    for request in requests:
        output = max(1, round(request.output_tokens * factor))
        prompt = max(1, round(request.prompt_tokens * factor))
        if longest is not None:
            if output >= longest:
                raise InvalidRequest("length_scale", f"an answer of {output} tokens leaves no room within {longest}")
            prompt = min(prompt, longest - output)
        block = max(1, round(request.block_tokens * factor))
        scaled.append(replace(request, prompt_tokens=prompt, output_tokens=output, block_tokens=block))
    return scaled


def set_rate(requests: Sequence[TraceRequest], rate: float) -> list[TraceRequest]:
    """Scales the arrival times so that on average ``rate`` requests arrive per second.

    Raises:
        InvalidRequest: All requests arrive at the same time, so that no factor sets a rate.
    """
    span = requests[-1].arrival
    if len(requests) < 2:
        return list(requests)
    if span <= 0:
        raise InvalidRequest("rate", "cannot be set: all requests of the trace arrive at once")
    factor = (len(requests) - 1) / rate / span
    return [replace(request, arrival=request.arrival * factor) for request in requests]


def scale_rate(requests: Sequence[TraceRequest], factor: float) -> list[TraceRequest]:
    """Scales the arrival times so that ``factor`` times as many requests arrive per second."""
    return [replace(request, arrival=request.arrival / factor) for request in requests]


def synthetic(count: int, rate: float, prompt_tokens: int, output_tokens: int, seed: int) -> list[TraceRequest]:
    """Returns ``count`` requests of equal length, with Poisson arrivals: on average ``rate`` per second."""
    generator = random.Random(seed)
    arrivals = accumulate((generator.expovariate(rate) for _ in range(count - 1)), initial=0.0)
    return [TraceRequest(arrival, prompt_tokens, output_tokens) for arrival in arrivals]


def sessions(
    count: int,
    turns: int,
    system_tokens: int,
    rate: float,
    prompt_tokens: int,
    output_tokens: int,
    seed: int,
    block_tokens: int = 16,
) -> list[TraceRequest]:
    """Returns the requests of ``count`` chats of ``turns`` turns, at ``rate`` requests per second on average.

    Each prompt is the one before it, its answer, and ``prompt_tokens`` new tokens. All chats begin with one system
    prompt. They begin at random in the first half of the time, and their pauses are exponential.
    """
    generator = random.Random(seed)
    half = count * turns / rate / 2
    shared, own = system_tokens // block_tokens, turns * (prompt_tokens + output_tokens) // block_tokens + 1
    requests = []
    for chat in range(count):
        numbers = (*range(shared), *range(shared + chat * own, shared + (chat + 1) * own))
        arrival, tokens = generator.uniform(0, half), system_tokens
        for _ in range(turns):
            tokens += prompt_tokens
            full, end = tokens // block_tokens, (tokens + output_tokens) // block_tokens
            requests.append(
                TraceRequest(arrival, tokens, output_tokens, numbers[:full], block_tokens, numbers[full:end])
            )
            arrival, tokens = arrival + generator.expovariate(turns / half), tokens + output_tokens
    requests.sort(key=lambda request: request.arrival)
    start = requests[0].arrival
    return [replace(request, arrival=request.arrival - start) for request in requests]


class _AzureLine(BaseModel):
    arrival: datetime = Field(alias="TIMESTAMP")
    prompt_tokens: PositiveInt = Field(alias="ContextTokens")
    output_tokens: PositiveInt = Field(alias="GeneratedTokens")

    def request(self) -> TraceRequest:
        return TraceRequest(self.arrival.timestamp(), self.prompt_tokens, self.output_tokens)


class _MooncakeLine(BaseModel):
    timestamp: FiniteFloat
    input_length: PositiveInt
    output_length: PositiveInt
    hash_ids: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = ()

    def request(self) -> TraceRequest:
        return TraceRequest(self.timestamp / 1e3, self.input_length, self.output_length, self.hash_ids)


_Read = Callable[[], _AzureLine | _MooncakeLine]


def _azure(lines: Iterator[str]) -> Iterator[tuple[int, _Read]]:
    """Yields the number of each line, and what reads it."""
    reader = csv.DictReader(lines)
    return ((reader.line_num, partial(_AzureLine.model_validate, row)) for row in reader)


def _mooncake(lines: Iterator[str]) -> Iterator[tuple[int, _Read]]:
    read = _MooncakeLine.model_validate_json
    return ((number, partial(read, line)) for number, line in enumerate(lines, 1) if line.strip())


def _request(where: str, read: _Read) -> TraceRequest:
    try:
        return read().request()
    except ValidationError as error:
        wrong = error.errors()[0]
        what = ": ".join([where, *map(str, wrong["loc"][:1]), wrong["msg"]])
        raise InvalidRequest("trace", f"{what}, got {str(wrong['input'])[:60]!r}") from None


def _ids(generator: random.Random, vocab_size: int, count: int) -> list[int]:
    # The first ids are special tokens in most vocabularies.
    first = min(64, vocab_size // 2)
    return [generator.randrange(first, vocab_size) for _ in range(max(0, count))]
