"""Shows the progress of long steps on stderr: bars on a terminal, lines in a pipe or file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from overfill.telemetry.progress import Report

LINE_SECONDS = 10.0
"""Seconds between two lines about one step."""


@contextmanager
def show_progress() -> Iterator[Report]:
    """Shows progress on stderr: a bar per step on a terminal, otherwise lines of ``progress_lines``."""
    console = Console(stderr=True)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        yield progress_lines(lambda line: print(line, file=sys.stderr, flush=True))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    # In a pipe, stdout holds a command's result: rich would write that to stderr, above the bars.
    progress = Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty())
    tasks: dict[str, TaskID] = {}

    def report(step: str, done: int, total: int) -> None:
        # Start the display only now, because one without bars would print an empty line.
        progress.start()
        if step not in tasks:
            tasks[step] = progress.add_task(step, total=total, completed=done)
        progress.update(tasks[step], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            progress.stop()


def progress_lines(say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Report:
    """Returns a callback that prints a line when a step begins, every ``LINE_SECONDS`` and when it ends."""
    begun: dict[str, float] = {}
    first: dict[str, int] = {}  # done when the step began: more than 0 in training that is resumed
    said: dict[str, float] = {}
    ended: set[str] = set()

    def report(step: str, done: int, total: int) -> None:
        now = clock()
        if done >= total:
            if step not in ended:
                ended.add(step)
                # If the first report of a step is its end, the start is unknown, and the line has no duration.
                say(f"{step}: done after {now - begun[step]:.0f} s" if step in begun else f"{step}: done")
            return
        if step not in begun or step in ended:  # a later step may have the same name
            ended.discard(step)
            begun[step] = said[step] = now
            first[step] = done
            say(step)
        seconds = now - begun[step]
        if now - said[step] >= LINE_SECONDS:
            said[step] = now
            new = done - first[step]
            left = f", about {seconds * (total - done) / new:.0f} s left" if new > 0 else ""
            say(f"{step}: {100 * done / total:.0f} % after {seconds:.0f} s{left}")

    return report
