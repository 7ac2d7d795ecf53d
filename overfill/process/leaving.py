"""Ends a process of a stack."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import NoReturn


def exit_now(code: int) -> NoReturn:
    """Flushes logs and output and ends the process at once. Call it after all other cleanup.

    A normal exit would also join every thread of gRPC, torch and the executors. That takes seconds on a busy machine
    and has no benefit.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader has closed it
            stream.flush()
    os._exit(code)
