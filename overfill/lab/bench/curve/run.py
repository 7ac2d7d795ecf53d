"""Measures the points of a curve, and keeps each finished one in a folder, so that a run can be continued."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from overfill.errors import InvalidRequest, OverfillError
from overfill.lab.bench.curve.plan import SHAPES, Point
from overfill.lab.bench.curve.results import OBJECTIVE, PointFigures
from overfill.lab.bench.curve.systems import LIMITS, started
from overfill.lab.bench.curve.tools import measure, warm_up
from overfill.lab.machine import describe_machine
from overfill.lab.peers.environment import version_of
from overfill.lab.stacks import Log
from overfill.model.manifest import Pair

Say = Callable[[str], None]

_LIMIT, _MIN_LIMIT = 10.0, 300.0
"""A tool is stopped after this multiple of a point's planned seconds, and this many more: it hangs."""


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

    def add(self, point: Point, figures: PointFigures) -> None:
        _write(self._points / f"{point.name}.json", asdict(point) | asdict(figures))

    def read(self) -> dict[Point, PointFigures]:
        """Returns all finished points, those of earlier runs too."""
        found = {}
        for file in sorted(self._points.glob("*.json")):
            data = json.loads(file.read_text())
            point = Point(**{name: data.pop(name) for name in Point.__slots__})
            found[point] = PointFigures(**data)
        return found


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


def measure_points(
    planned: Sequence[Point],
    folder: Folder,
    seconds: float,
    pairs: Mapping[str, Pair],
    pythons: Mapping[str, Path],
    say: Say,
    log: Log,
) -> list[Point]:
    """Measures the points that the folder lacks, or has with failed requests. Returns those that failed.

    A system is started once for the points of a shape in a round. A later call tries the failed points again.

    Args:
        seconds: about how long each point's requests take.
        pythons: interpreter of each peer's environment.
        say: called with each line about the progress.
    """
    finished = folder.read()
    rest = [point for point in planned if point not in finished or finished[point].failed]
    if skipped := len(planned) - len(rest):
        say(f"{skipped} of {len(planned)} points are finished already, and are skipped")
    say(f"{len(rest)} points: at least {len(rest) * seconds / 60:.0f} minutes")
    limit = _LIMIT * seconds + _MIN_LIMIT
    # Rounds and tools repeat a point with the same number of requests.
    asked = {_load_of(point): figures.requests + figures.failed for point, figures in finished.items()}
    failed: list[Point] = []
    began = time.monotonic()
    for (name, system, _), points in groupby(rest, attrgetter("shape", "system", "round")):
        shape, waiting = SHAPES[name], list(points)
        try:
            with started(system, shape, pairs, pythons, log) as endpoint:
                pace = warm_up(shape, endpoint, limit)
                while waiting:
                    point = waiting.pop(0)
                    requests = asked.setdefault(_load_of(point), pace.requests(point.concurrency, seconds))
                    try:
                        figures = measure(point, shape, endpoint, requests, pythons, limit)
                    except OverfillError as error:
                        failed.append(point)
                        say(_failure(str(point), error))
                        continue
                    folder.add(point, figures)
                    number = rest.index(point) + 1
                    left = (time.monotonic() - began) * (len(rest) / number - 1)
                    say(f"[{number}/{len(rest)}] {point}: {_line(figures)}; about {left / 60:.0f} minutes left")
        except OverfillError as error:
            failed += waiting
            say(_failure(f"{system}, {shape.title}", error))
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
