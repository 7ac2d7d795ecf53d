"""Limits of a router: what one request may take, and how long clients may not read."""

from __future__ import annotations

import math
from dataclasses import dataclass

STALLED_TIMEOUT = 60.0
"""Seconds after which the router drops a client that does not read its answer."""

READ_GRACE = 5.0
"""Seconds that a draining router waits, after the last computation, for a client to read another part of an answer."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request may take.

    Attributes:
        max_attempts: number of workers lost in a row, without a new token, after which a request is given up.
        max_bytes: maximum size of a request in bytes.
        max_time: maximum duration of a request in seconds, even if its deadline is later.
        stream_interval: minimum number of tokens in a delta, except in the first and the last one.
    """

    max_attempts: int = 4
    max_bytes: int = 4 << 20
    max_time: float = math.inf
    stream_interval: int = 1
