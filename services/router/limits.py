"""How long the router waits for clients that do not read, over gRPC and HTTP."""

STALLED_TIMEOUT = 60.0
"""Seconds after which the router drops a client that does not read its answer."""

READ_GRACE = 5.0
"""Seconds that a draining router waits, after the last computation, for a client to read another part of an answer."""
