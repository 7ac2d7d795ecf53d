"""Numbers that both ends of a connection must agree on. Defined here and nowhere else."""

from __future__ import annotations

from typing import Final

WIRE_VERSION: Final = 1
"""Version of the messages in ``proto/overfill/v1``; workers of different versions refuse each other."""

CONNECT_TIMEOUT: Final = 5.0
"""Seconds for a connection and its first frames, on a busy machine or a slow link too."""

KEEPALIVE_TIME: Final = 2.0
"""Seconds without traffic after which an end sends an HTTP/2 ping."""

KEEPALIVE_TIMEOUT: Final = 8.0
"""Seconds a ping may stay unanswered before the connection is closed.

With ``KEEPALIVE_TIME`` it is the 10 s after which a silent peer is left; most of them, since one that gets no CPU for
seconds, on a machine with more to do than it can, is not dead.
"""

KEEPALIVE_MIN_INTERVAL: Final = 1.5
"""Seconds between pings that a server tolerates; must stay below ``KEEPALIVE_TIME``."""

STALL_TIMEOUT: Final = 30.0
"""Seconds without a byte moved, while some are ready, after which a KV transfer is given up.

Keepalive finds peers that are gone or frozen. This finds peers whose connections answer and that take no part. Progress
counts by whole messages, of 1 MiB on a slow stream. A link of 1 Gbit/s moves 3,500 of them in this time, so that as
many streams may share it.
"""

MAX_TRANSFER_TIME: Final = 900.0
"""Seconds that a prompt's KV may take to move once all of it is ready, unless ``--max-transfer-time`` says otherwise.

64 GiB, such as 128 prompts of 512 MiB that share 1 Gbit/s, take 550 s.
"""

MAX_CHUNK_PAYLOAD: Final = 1 << 20
"""Most payload bytes of one KV chunk that travels."""

MAX_SHARED_PAYLOAD: Final = 8 << 20
"""Most payload bytes of one KV chunk whose payload stays in shared memory."""

MAX_MESSAGE_BYTES: Final = 8 << 20
"""Most bytes of one message, either way."""

MAX_METADATA_BYTES: Final = 32 << 10
"""Most bytes of an RPC's metadata, either way."""

MAX_CONNECTIONS: Final = 4096
"""Most connections that a gRPC server keeps at once."""

MAX_DATA_STREAMS: Final = 64
"""Most parallel connections that carry one prompt's KV."""

SPARE_RPCS: Final = 256
"""RPCs that a worker serves beside those of its sequences: probes, status, requests that it is about to refuse."""

HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds for a connection to become one: TLS and HTTP/2."""

FIRST_MESSAGE_TIMEOUT: Final = 10.0
"""Seconds for the first message of an RPC to arrive whole."""

IDLE_TIMEOUT: Final = 1800.0
"""Seconds that a connection may stay without an RPC; clients open another one when they need it."""
