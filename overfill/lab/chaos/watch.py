"""What the processes of a trial take: memory and open files, sampled, summed up and drawn."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from overfill.cli.processes import Child

_EVERY = 2.0  # seconds
_WARM = 60.0  # seconds of a life that do not count: pools and caches fill
_LIFE = 180.0  # seconds that a process must have lived for its growth to say something


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment: seconds since the start of the trial, resident bytes, open files."""

    at: float
    name: str
    pid: int
    rss: int
    files: int


@dataclass(frozen=True, slots=True)
class Life:
    """A process from its warm beginning to its end.

    Attributes:
        seconds: between the two.
        growth: resident bytes from the first third's median to the last third's.
    """

    name: str
    seconds: float
    rss: int
    growth: int
    files: int
    more_files: int


async def watch(processes: Callable[[], Iterable[Child]], samples: list[Sample], until: asyncio.Event) -> None:
    """Adds to ``samples`` until told to end."""
    began = time.monotonic()
    while not until.is_set():
        for child in processes():
            with contextlib.suppress(psutil.Error):  # it has just ended
                process = psutil.Process(child.pid)
                at = time.monotonic() - began
                samples.append(Sample(at, child.name, child.pid, process.memory_info().rss, process.num_fds()))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(until.wait(), _EVERY)


def lives(samples: Sequence[Sample]) -> list[Life]:
    """Every process that lived long enough, by name and age."""
    found = []
    for (name, _), life in _by_process(samples).items():
        warm = [sample for sample in life if sample.at - life[0].at >= _WARM]
        if not warm or warm[-1].at - warm[0].at < _LIFE:
            continue
        third = max(1, len(warm) // 3)
        rss = [_median([s.rss for s in part]) for part in (warm[:third], warm[-third:])]
        files = [_median([s.files for s in part]) for part in (warm[:third], warm[-third:])]
        found.append(Life(name, warm[-1].at - warm[0].at, rss[1], rss[1] - rss[0], files[1], files[1] - files[0]))
    return sorted(found, key=lambda life: (life.name, -life.seconds))


def draw(samples: Sequence[Sample], title: str, path: Path) -> None:
    """Resident memory over time, a panel per stage and a line per process; a new line where one was started again."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = ("router", "prefill", "decode")
    figure, panels = pyplot.subplots(len(stages), 1, figsize=(9, 6.5), sharex=True, layout="constrained")
    colours: dict[str, str] = {}
    for (name, _), life in _by_process(samples).items():
        panel = panels[stages.index(name.partition("-")[0])]
        known = name in colours
        (line,) = panel.plot(
            [sample.at / 60 for sample in life],
            [sample.rss / 2**20 for sample in life],
            linewidth=1.2,
            color=colours.get(name),
            label=None if known else name,
        )
        colours.setdefault(name, line.get_color())
    for stage, panel in zip(stages, panels, strict=True):
        panel.set_ylabel(f"{stage}, MiB")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right", fontsize=8, ncols=4)
    panels[0].set_title(title, fontsize=10)
    panels[-1].set_xlabel("minutes")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _by_process(samples: Sequence[Sample]) -> dict[tuple[str, int], list[Sample]]:
    found: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.name, sample.pid].append(sample)
    return found


def _median(values: Sequence[int]) -> int:
    return sorted(values)[len(values) // 2]
