"""How long this process took to start. The package imports this module first of all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_began = time.monotonic()


def seconds() -> float:
    """Seconds since the process imported this package: a worker that calls it when it is ready has its start-up time.

    The process itself may be older, because Ray starts processes before it has work for them.
    """
    return time.monotonic() - _began


@contextmanager
def once() -> Iterator[None]:
    """Leaves a block out of ``seconds``: work that the next start does not repeat, such as preparing a pair."""
    global _began
    before = time.monotonic()
    try:
        yield
    finally:
        _began += time.monotonic() - before
