"""Numbers that both ends of a connection must agree on. Defined here and nowhere else."""

from __future__ import annotations

from typing import Final

WIRE_VERSION: Final = 1
"""Version of the messages in ``proto/overfill/v1``; workers of different versions refuse each other."""

KEEPALIVE_TIME: Final = 5.0
"""Seconds without traffic after which an end sends an HTTP/2 ping."""

KEEPALIVE_TIMEOUT: Final = 5.0
"""Seconds a ping may stay unanswered before the connection is closed."""

KEEPALIVE_MIN_INTERVAL: Final = 4.0
"""Seconds between pings that a server tolerates; must stay below ``KEEPALIVE_TIME``."""

MIN_PULL_RATE: Final = 1 << 20
"""Bytes per second below which a KV transfer is given up."""

MIN_PULL_GRACE: Final = 2.0
"""Seconds from the start of a transfer in which ``MIN_PULL_RATE`` is not demanded yet."""

MAX_CHUNK_PAYLOAD: Final = 1 << 20
"""Most payload bytes of one KV chunk."""

MAX_MESSAGE_BYTES: Final = 8 << 20
"""Most bytes of one message, either way."""
