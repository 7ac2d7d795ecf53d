"""How long this process took to start. The package imports this module first of all."""

from __future__ import annotations

import time

_BEGAN = time.monotonic()


def seconds() -> float:
    """Seconds since the process imported this package: a worker that calls it when it is ready has its start-up time.

    Not since the process itself began, because Ray starts processes before it has work for them.
    """
    return time.monotonic() - _BEGAN
