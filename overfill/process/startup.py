"""Measures how long this process took to start, and ends its start. The package imports this module first."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

_began = time.monotonic()


def seconds() -> float:
    """Returns the seconds since the process imported this package. Called by a ready worker, that is its start-up time.

    The process itself may be older, because Ray starts processes before it has work for them.
    """
    return time.monotonic() - _began


def freeze() -> None:
    """Excludes the objects that exist now from garbage collection: they live as long as the process.

    A full collection over them would stop all streams for tens of milliseconds.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def once() -> Iterator[None]:
    """Excludes the body from ``seconds``. Use it for work that later starts do not repeat, such as preparing a pair."""
    global _began
    before = time.monotonic()
    try:
        yield
    finally:
        _began += time.monotonic() - before
