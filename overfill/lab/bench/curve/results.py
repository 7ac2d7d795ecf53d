"""Reads what guidellm 0.8 and aiperf 0.13 write, and computes the same figures from each tool's requests.

The times of each request and the tokens per second are the tool's. Percentiles and goodput are computed here, because
the tools interpolate percentiles differently, and guidellm counts a request once per token in those of gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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


def read_guidellm(folder: Path) -> PointFigures:
    """Reads the report of one benchmark that ``guidellm run`` wrote. Raises FormatChanged if a part is missing."""
    with _tested_format(GUIDELLM):
        (benchmark,) = json.loads((folder / "report.json").read_text())["benchmarks"]
        metrics = benchmark["metrics"]
        outcomes = [
            _outcome(one["time_to_first_token_ms"], one["inter_token_latency_ms"], one["output_tokens"])
            for one in benchmark["requests"]["successful"]
        ]
        for status in ("errored", "incomplete"):
            outcomes += [Outcome(0.0, (), status)] * int(metrics["request_totals"][status])
        rate = float(metrics["output_tokens_per_second"]["total"]["mean"])
    return figures_of(outcomes, rate)


def read_aiperf(folder: Path) -> PointFigures:
    """Reads the folder that ``aiperf profile`` wrote, with its records. Raises FormatChanged if a part is missing."""
    names = ("time_to_first_token", "inter_token_latency", "output_sequence_length")
    with _tested_format(AIPERF):
        records = map(json.loads, (folder / "profile_export.jsonl").read_text().splitlines())
        outcomes = [
            Outcome(0.0, (), str(one["error"]))
            if one.get("error")
            else _outcome(*(one["metrics"][name]["value"] for name in names))
            for one in records
        ]
        total = json.loads((folder / "profile_export_aiperf.json").read_text())
        rate = float(total["output_token_throughput"]["avg"])
    return figures_of(outcomes, rate)


def _outcome(ttft: float, gap: float, tokens: float) -> Outcome:
    """Returns the outcome of a request, of which a tool says these times in milliseconds."""
    return Outcome(0.0, (ttft / 1e3, (ttft + gap * (tokens - 1)) / 1e3), counted=int(tokens))


@contextmanager
def _tested_format(tool: str) -> Iterator[None]:
    """Raises FormatChanged if the body cannot read the tool's output."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError) as error:
        tested = ", ".join(ENVIRONMENTS[tool].requirements)
        raise FormatChanged(
            f"{tool}'s output cannot be read ({type(error).__name__}: {error}). Another release may have changed the "
            f"format: install the tested one, {tested}"
        ) from error
