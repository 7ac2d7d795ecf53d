"""Progress of long steps, as callbacks. ``overfill.cli.progress`` shows it to people."""

from __future__ import annotations

import logging
from collections.abc import Callable

Report = Callable[[str, int, int], None]
"""Callback (step, done, total). Steps run one after the other; each chooses its own unit."""


def silent(step: str, done: int, total: int) -> None:
    """Ignores progress."""


def log_steps(logger: logging.Logger) -> Report:
    """Returns a callback that logs a line when a step begins. Services use it."""
    seen: set[str] = set()

    def report(step: str, done: int, total: int) -> None:
        if step not in seen:
            seen.add(step)
            logger.info("%s", step)

    return report
