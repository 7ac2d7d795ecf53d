"""Runs the sweeps of a curve, and keeps each finished point in a folder, so that a run can be continued."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from overfill.errors import InvalidRequest, OverfillError
from overfill.lab.bench.curve.plan import Point, Sweep, left_of, seconds_of, seconds_of_points
from overfill.lab.bench.curve.results import OBJECTIVE, PointFigures
from overfill.lab.bench.curve.systems import LIMITS, started
from overfill.lab.bench.curve.tools import measure, warm_up
from overfill.lab.machine import describe_machine
from overfill.lab.peers.environment import version_of
from overfill.model.manifest import Pair

Say = Callable[[str], None]

_LIMIT, _MIN_LIMIT = 10.0, 300.0
"""A tool is stopped after this multiple of a point's planned seconds, and this many more: it hangs."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A finished point. ``figures.requests`` and ``figures.failed`` are as many as were asked for."""

    point: Point
    figures: PointFigures

    def to_json(self) -> dict[str, Any]:
        return asdict(self.point) | asdict(self.figures)

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Measured:
        point = Point(**{name: data.pop(name) for name in Point.__slots__})
        return cls(point, PointFigures(**data))


class Folder:
    """The folder of a run: one file per finished point, and what all of them must have in common.

    Raises:
        InvalidRequest: the folder's points were measured under other conditions; the message names the first one.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        self._points = path / "points"
        self._points.mkdir(parents=True, exist_ok=True)
        file = path / "conditions.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        now = json.loads(json.dumps(conditions))
        for name in now.keys() & before.keys():
            if before[name] != now[name]:
                raise InvalidRequest(
                    "out",
                    f"the points in {path} were measured with {name} {before[name]}, and this run has {now[name]}: "
                    "use the same, or another folder",
                )
        self.conditions: dict[str, Any] = before | now
        _write(file, self.conditions)

    def add(self, measured: Measured) -> None:
        _write(self._points / f"{measured.point.name}.json", measured.to_json())

    def read(self) -> list[Measured]:
        """Returns all finished points, those of earlier runs too."""
        return [Measured.of_json(json.loads(file.read_text())) for file in sorted(self._points.glob("*.json"))]


def _write(path: Path, data: object) -> None:
    """Writes a file at once, so that an interrupted run leaves no half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.rename(path)


def conditions(seconds: float, pairs: Mapping[str, Pair], peers: Iterable[str]) -> dict[str, Any]:
    """Returns what must not change between the parts of a run: options, models, versions and machine."""
    return {
        "seconds": seconds,
        "dtype": "bfloat16",
        "limits": LIMITS,
        "objective": str(OBJECTIVE),
        **describe_machine(),
        **{peer: version_of(peer) for peer in peers},
        **{f"models of {name}": f"{pair.full_digest}, {pair.decoder_digest}" for name, pair in pairs.items()},
    }


def run_sweeps(
    planned: Sequence[Sweep],
    folder: Folder,
    seconds: float,
    pairs: Mapping[str, Pair],
    pythons: Mapping[str, Path],
    say: Say,
    log: Callable[[str, str], None],
) -> list[Point]:
    """Measures the points that the folder lacks, or has with failed requests. Returns those that failed.

    A later call tries the failed ones again.

    Args:
        seconds: about how long each point's requests take.
        pythons: interpreter of each peer's environment.
        say: called with each line about the progress.
        log: as of ``started``.
    """
    finished = folder.read()
    rest = left_of(planned, {one.point.name for one in finished if not one.figures.failed})
    points = sum(len(sweep.points) for sweep in rest)
    skipped = sum(len(sweep.points) for sweep in planned) - points
    if skipped:
        say(f"{skipped} of {points + skipped} points are finished already, and are skipped")
    expected, limit = seconds_of(rest, seconds), _LIMIT * seconds + _MIN_LIMIT
    for sweep in rest:
        say(f"{sweep.shape.title}; {sweep.system}, round {sweep.points[0].round}: {len(sweep.points)} points")
    end = datetime.now(UTC) + timedelta(seconds=expected)
    say(f"{points} points of {seconds:g} s: about {expected / 60:.0f} minutes, until {end:%H:%M} UTC")
    # Rounds and tools repeat a point with the same number of requests.
    asked = {_load_of(one.point): one.figures.requests + one.figures.failed for one in finished}
    failed: list[Point] = []
    began = time.monotonic()
    while rest:
        sweep = rest.pop(0)
        waiting = list(sweep.points)
        try:
            with started(sweep.system, sweep.shape, pairs, pythons.get("vllm"), log) as endpoint:
                pace = warm_up(sweep.shape, endpoint, limit)
                while waiting:
                    point = waiting.pop(0)
                    requests = asked.setdefault(_load_of(point), pace.requests(point.concurrency, seconds))
                    try:
                        figures = measure(point, sweep.shape, endpoint, requests, pythons, limit)
                    except OverfillError as error:
                        failed.append(point)
                        say(_failure(str(point), error))
                        continue
                    folder.add(Measured(point, figures))
                    number = points - len(waiting) - sum(len(other.points) for other in rest)
                    left = seconds_of(rest, seconds) + seconds_of_points(waiting, seconds)
                    left *= (time.monotonic() - began) / max(1.0, expected - left)  # as much slower as it was so far
                    say(f"[{number}/{points}] {point}: {_line(figures)}; {left / 60:.0f} minutes left")
        except OverfillError as error:
            failed += waiting
            say(_failure(f"{sweep.system}, {sweep.shape.title}", error))
    return failed


def _load_of(point: Point) -> tuple[str, str, int]:
    return point.shape, point.system, point.concurrency


def _line(found: PointFigures) -> str:
    failed = f", {found.failed} FAILED" if found.failed else ""
    return (
        f"{found.requests} answers{failed}, {found.tokens_per_s:.1f} tokens/s, {found.per_user:.1f} per user, "
        f"TTFT {found.ttft_p50:.2f} s"
    )


def _failure(what: str, error: OverfillError) -> str:
    return "\n  ".join([f"{what} failed: {error}", *getattr(error, "__notes__", [])])
