"""How the processes of a stack end."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import NoReturn


def exit_now(code: int) -> NoReturn:
    """Ends the process now, once what it has said is out. Whatever else has to happen at the end has happened.

    An orderly end would also join every thread of gRPC, torch and the executors, which takes seconds on a busy machine
    and is of use to nobody.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
