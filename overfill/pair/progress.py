"""How long steps report progress, and the bars that show it on stderr."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]
"""Called as (step, done, total); steps come one after the other, and the unit is the step's own."""


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
def progress_bars() -> Iterator[Report]:
    """One bar per step on stderr, created when the step first reports."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True))
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
