"""Reads what guidellm 0.8 and aiperf 0.13 write, and computes the same figures from each tool's requests.

The times of each request and the tokens per second are the tool's. Percentiles and goodput are computed here, because
the tools interpolate percentiles differently, and guidellm counts a request once per token in those of gaps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from overfill.errors import OverfillError
from overfill.lab.bench.curve.plan import AIPERF, GUIDELLM
from overfill.lab.peers.environment import ENVIRONMENTS
from overfill.lab.traffic.outcome import PERCENTILES, Objective, Outcome

OBJECTIVE = Objective(ttft=5.0, itl=0.1)
"""What goodput counts: a first token within 5 s, and then 10 tokens per second, about as fast as people read."""


class FormatChanged(OverfillError):
    """A tool's output lacks a file or a field that is read here."""


@dataclass(frozen=True, slots=True)
class PointFigures:
    """Figures of a point; times in seconds, percentiles over the requests.

    Attributes:
        requests, failed: numbers of answered requests, and of failed or unfinished ones.
        tokens_per_s: output tokens of all requests per second.
        per_user: output tokens per second of one user: 1 / the median gap.
        goodput: requests per second that meet ``OBJECTIVE``.
        answer: mean length of the answers, in tokens.
        tool_cpu: CPU seconds of the tool, which had the same cores as the servers.
    """

    requests: int
    failed: int
    tokens_per_s: float
    per_user: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    gap_p50: float
    gap_p90: float
    gap_p99: float
    goodput: float
    answer: float
    tool_cpu: float = 0.0


def figures_of(outcomes: Sequence[Outcome], tokens_per_s: float | None = None) -> PointFigures:
    """Computes the figures of a point. ``tokens_per_s`` None computes it too, from the first request to the last token.

    Raises:
        OverfillError: no request was answered.
    """
    done = [one for one in outcomes if one.ok]
    failed = [one.error for one in outcomes if not one.ok]
    if not done:
        raise OverfillError(f"all {len(failed)} requests failed, such as with: {next(iter(failed), 'none was sent')}")
    tokens = sum(one.tokens for one in done)
    if tokens_per_s is None:
        tokens_per_s = tokens / (max(one.times[-1] for one in done) - min(one.due for one in outcomes))
    samples = {"ttft": [one.ttft for one in done], "gap": [one.itl for one in done]}
    marks = {f"{name}_p{p}": float(np.percentile(found, p)) for name, found in samples.items() for p in PERCENTILES}
    return PointFigures(
        requests=len(done),
        failed=len(failed),
        tokens_per_s=tokens_per_s,
        per_user=1 / max(marks["gap_p50"], 1e-9),
        goodput=sum(map(OBJECTIVE.met, done)) * tokens_per_s / tokens,
        answer=tokens / len(done),
        **marks,
    )


def read_guidellm(path: Path) -> PointFigures:
    """Reads the report of ``guidellm run`` with one benchmark. Raises FormatChanged if a part is missing."""
    report = _load(GUIDELLM, _text(GUIDELLM, path))
    names = ("time_to_first_token_ms", "inter_token_latency_ms", "output_tokens")
    outcomes = [
        _outcome(*(_number(GUIDELLM, one, name) for name in names))
        for one in _field(GUIDELLM, report, "benchmarks.0.requests.successful")
    ]
    for status in ("errored", "incomplete"):
        count = int(_number(GUIDELLM, report, f"benchmarks.0.metrics.request_totals.{status}"))
        outcomes += [Outcome(0.0, (), status)] * count
    return figures_of(outcomes, _number(GUIDELLM, report, "benchmarks.0.metrics.output_tokens_per_second.total.mean"))


def read_aiperf(folder: Path) -> PointFigures:
    """Reads the folder that ``aiperf profile`` wrote, with its records. Raises FormatChanged if a part is missing."""
    total = _load(AIPERF, _text(AIPERF, folder / "profile_export_aiperf.json"))
    records = [_load(AIPERF, line) for line in _text(AIPERF, folder / "profile_export.jsonl").splitlines()]
    names = ("time_to_first_token", "inter_token_latency", "output_sequence_length")
    outcomes = [
        Outcome(0.0, (), str(error))
        if (error := one.get("error"))
        else _outcome(*(_number(AIPERF, one, f"metrics.{name}.value") for name in names))
        for one in records
    ]
    return figures_of(outcomes, _number(AIPERF, total, "output_token_throughput.avg"))


def _outcome(ttft: float, gap: float, tokens: float) -> Outcome:
    """Returns the outcome of a request, of which a tool says these times in milliseconds."""
    return Outcome(0.0, (ttft / 1e3, (ttft + gap * (tokens - 1)) / 1e3), counted=int(tokens))


def _text(tool: str, path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise FormatChanged(f"{tool} wrote no {path.name} ({error.strerror}), although it succeeded") from None


def _load(tool: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise FormatChanged(f"{tool}'s output is not JSON: {error}") from None


def _field(tool: str, data: Any, path: str) -> Any:
    """Returns the field of ``tool``'s output at a path such as ``benchmarks.0.metrics``."""
    value = data
    for part in path.split("."):
        try:
            value = value[int(part) if isinstance(value, list) else part]
        except (KeyError, IndexError, TypeError, ValueError):
            value = None
    if value is None:
        tested = ", ".join(ENVIRONMENTS[tool].requirements)
        raise FormatChanged(
            f"{tool}'s output lacks the field {path}: another release may have changed the format; "
            f"install the tested one, {tested}"
        )
    return value


def _number(tool: str, data: Any, path: str) -> float:
    return float(_field(tool, data, path))
