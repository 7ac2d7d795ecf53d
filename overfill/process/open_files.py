"""Raises the limit of open files of a process with many connections."""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger(__name__)

SPARE_FILES = 256
"""Open files that a process of a stack needs in addition to the connections to it."""


def allow_connections(count: int, hint: str = "") -> None:
    """Raises this process's limit of open files so that it can have ``count`` connections, or as far as it may.

    Logs a warning if that is less.

    Args:
        hint: what else to do than to raise the limit, for the warning.
    """
    needed = count + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        logger.warning(
            "this process may open %d files, but %d connections may need %d: raise the limit of open files "
            "(ulimit -n, LimitNOFILE)%s", allowed, count, needed, hint,
        )  # fmt: skip
