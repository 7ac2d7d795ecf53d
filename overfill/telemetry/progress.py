"""How long steps report progress, and what shows it on stderr: bars on a terminal, lines in a pipe or file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]
"""Called as (step, done, total); steps come one after the other, and the unit is the step's own."""

LINE_SECONDS = 10.0
"""Seconds between two lines about one step."""


def silent(step: str, done: int, total: int) -> None:
    """Reports to nobody."""


def log_steps(logger: logging.Logger) -> Report:
    """Logs a line when a step begins, for services."""
    seen: set[str] = set()

    def report(step: str, done: int, total: int) -> None:
        if step not in seen:
            seen.add(step)
            logger.info("%s", step)

    return report


@contextmanager
def show_progress() -> Iterator[Report]:
    """Shows each step on stderr, from its first report on: as a bar on a terminal, as ``progress_lines`` elsewhere."""
    console = Console(stderr=True)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        yield progress_lines(lambda line: print(line, file=sys.stderr, flush=True))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console)
    tasks: dict[str, TaskID] = {}

    def report(step: str, done: int, total: int) -> None:
        # Not earlier: a display without bars would still print an empty line.
        progress.start()
        if step not in tasks:
            tasks[step] = progress.add_task(step, total=total)
        progress.update(tasks[step], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            progress.stop()


def progress_lines(say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Report:
    """A report that says a line when a step begins, every ``LINE_SECONDS`` while it runs, and when it is done."""
    begun: dict[str, float] = {}
    said: dict[str, float] = {}
    ended: set[str] = set()

    def report(step: str, done: int, total: int) -> None:
        now = clock()
        if done >= total:
            if step not in ended:
                ended.add(step)
                # A step whose first report is its end has no known start, so the line has no duration.
                say(f"{step}: done after {now - begun[step]:.0f} s" if step in begun else f"{step}: done")
            return
        if step not in begun or step in ended:  # a step of the same name may come again
            ended.discard(step)
            begun[step] = said[step] = now
            say(step)
        seconds = now - begun[step]
        if now - said[step] >= LINE_SECONDS:
            said[step] = now
            say(f"{step}: {100 * done / total:.0f} % after {seconds:.0f} s")

    return report
