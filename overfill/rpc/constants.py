"""Timeouts, limits and meanings on which both ends of a connection must agree. Defined only here."""

from __future__ import annotations

from typing import Final

WIRE_VERSION: Final = 3
"""Version of the messages in ``proto/overfill/v1``; workers of different versions refuse each other."""

LAST_UPDATES: Final = ("done", "refused", "failed")
"""Kinds of ``SequenceUpdate`` that end a sequence."""

MAX_NAME_LENGTH: Final = 256
"""Maximum number of characters of a text in a Hello. Names of workers are labels of metrics and part of log lines."""

MAX_DATA_ADDRESSES: Final = 256
"""Maximum number of data addresses of a prefill worker: ranks with different KV heads have one each."""

MAX_STARTUP: Final = 86_400.0
"""Maximum ``startup_seconds`` of a Hello. A worker in a process that has run for longer says this."""

CONNECT_TIMEOUT: Final = 5.0
"""Seconds for a connection to open and carry its first frames; enough for a busy machine or a slow link."""

KEEPALIVE_TIME: Final = 2.0
"""Seconds without traffic after which an end sends an HTTP/2 ping."""

KEEPALIVE_TIMEOUT: Final = 8.0
"""Seconds that a ping may stay unanswered before the connection is closed.

A silent peer is given up after ``KEEPALIVE_TIME`` plus this: 10 s. Most of them are spent here, because a process on an
overloaded machine may get no CPU for seconds and still be alive.
"""

KEEPALIVE_MIN_INTERVAL: Final = 1.5
"""Minimum seconds between pings that a server accepts; must be less than ``KEEPALIVE_TIME``."""

STALL_TIMEOUT: Final = 30.0
"""Seconds without progress, while KV is ready to send, after which a KV transfer is given up.

Keepalive detects peers that are dead or frozen. This detects peers that answer pings but move no data; it is also the
time that a ping on a data connection may stay unanswered, because the answer waits behind KV. Progress is
counted in whole messages of up to 1 MiB. A link of 1 Gbit/s moves 3,500 of them in this time, so that many streams may
share it.
"""

MAX_TRANSFER_TIME: Final = 900.0
"""Default of ``--max-transfer-time``: seconds for a prompt's KV to move once all of it is computed.

64 GiB over 1 Gbit/s, such as 128 prompts of 512 MiB at once, take 550 s.
"""

MAX_IMPORT_TIME: Final = 10.0
"""Seconds that a prompt waits at most for KV from other workers and from disk, before the worker computes it.

Keepalive gives a silent peer up after the same time. Most imports may take less: twice the time of computing.
"""

MAX_LOAN_TIME: Final = 3 * MAX_IMPORT_TIME
"""Seconds after which a worker ends a loan of KV, so that no borrower holds cached blocks for ever. A borrower needs
them for ``MAX_IMPORT_TIME``; the rest is for the end of a connection that has broken."""

MAX_CHUNK_PAYLOAD: Final = 1 << 20
"""Maximum payload of a KV chunk sent over a socket, in bytes."""

MAX_SHARED_PAYLOAD: Final = 8 << 20
"""Maximum payload of a KV chunk passed through shared memory, in bytes."""

MAX_KV_AT_ONCE: Final = 64 << 10
"""Maximum bytes of raw KV that PrefillAtOnce sends with the first token. Streams of their own would cost more."""

MAX_MESSAGE_BYTES: Final = 8 << 20
"""Maximum size of a message in either direction, in bytes."""

MAX_METADATA_BYTES: Final = 32 << 10
"""Maximum size of an RPC's metadata in either direction, in bytes."""

MAX_CONNECTIONS: Final = 4096
"""Maximum number of open connections of a gRPC server."""

MAX_PENDING_RPCS: Final = 16_384
"""Maximum number of RPCs that have arrived at a gRPC server and that it has not accepted yet."""

MAX_DATA_STREAMS: Final = 64
"""Maximum number of parallel streams of one prompt's KV, from a decode worker with all of its ranks to a data address.

A stream that the decode worker does not read takes 3 MB of the process that sends."""

SPARE_RPCS: Final = 256
"""Concurrent RPCs that a worker allows in addition to those of its prompts: health checks, status, routers' streams."""

HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds for the TLS and HTTP/2 handshakes of a new connection."""

FIRST_MESSAGE_TIMEOUT: Final = 10.0
"""Seconds for the first message of an RPC to arrive whole."""

IDLE_TIMEOUT: Final = 1800.0
"""Seconds without an RPC after which a server closes a connection. Clients reconnect when they need to."""
