"""gRPC channels, and the HTTP/2 options of channels and servers. Addresses are ``host:port`` or ``unix:path``.

Every channel owns its TCP connection. By default gRPC lets channels to one address share a connection. Then a first
token would queue behind megabytes of KV, and *n* data streams would not be parallel.
"""

from __future__ import annotations

from typing import Any, cast

import grpc
import grpc.aio

from overfill.rpc.access import Role
from overfill.rpc.constants import (
    CONNECT_TIMEOUT,
    HANDSHAKE_TIMEOUT,
    IDLE_TIMEOUT,
    KEEPALIVE_MIN_INTERVAL,
    KEEPALIVE_TIME,
    KEEPALIVE_TIMEOUT,
    MAX_CONNECTIONS,
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
    MAX_PENDING_RPCS,
)
from overfill.rpc.renewal import RenewedChannel, close_soon
from overfill.rpc.tls import ClientTls, Credentials

Options = list[tuple[str, int]]


def open_channel(
    address: str,
    shown: ClientTls | Credentials | None = None,
    ping_timeout: float | None = None,
    *,
    role: Role | None = None,
) -> grpc.aio.Channel:
    """Returns an asyncio channel with its own connection, which opens on first use.

    When the files in ``shown`` change, new RPCs use a new connection with the new certificate.

    Args:
        ping_timeout: seconds that a ping may stay unanswered; None means ``KEEPALIVE_TIMEOUT``.
        role: role that the server's certificate must have where ``shown`` names the stack and not a host; None accepts
            any process of the stack.

    Raises:
        TlsError: a TLS file is missing, unreadable or does not match the others, and the process never read good ones.
    """
    return cast(grpc.aio.Channel, _open(address, shown, grpc.aio, role, ping_timeout))


def open_sync_channel(
    address: str, shown: ClientTls | Credentials | None = None, *, role: Role | None = None
) -> grpc.Channel:
    """Returns a blocking channel; otherwise as ``open_channel``."""
    return cast(grpc.Channel, _open(address, shown, grpc, role))


def _open(
    address: str,
    shown: ClientTls | Credentials | None,
    kind: Any,
    role: Role | None,
    ping_timeout: float | None = None,
) -> Any:
    if not isinstance(shown, Credentials):
        shown = Credentials(shown)
    tls = shown.tls
    options: list[tuple[str, Any]] = [*channel_options(ping_timeout)]
    metadata = (("authorization", f"Bearer {shown.secret}"),) if shown.secret else ()
    if tls is None:
        channel = kind.insecure_channel(address, options=options)
        return RenewedChannel(lambda _: channel, None, metadata, close_soon) if metadata else channel
    if name := tls.expected(role):
        options.append(("grpc.ssl_target_name_override", name))
    return RenewedChannel(
        lambda credentials: kind.secure_channel(address, credentials, options=options),
        tls.reloaded(),
        metadata,
        close_soon,
    )


def channel_options(ping_timeout: float | None = None) -> Options:
    """Options of every channel; ``ping_timeout`` as for ``open_channel``."""
    return [
        ("grpc.use_local_subchannel_pool", 1),
        # Processes of a stack connect directly: ignore http_proxy and similar variables.
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        # gRPC also uses this as the connect timeout.
        ("grpc.min_reconnect_backoff_ms", _milliseconds(CONNECT_TIMEOUT)),
        ("grpc.max_reconnect_backoff_ms", 2000),
        *_common_options(KEEPALIVE_TIMEOUT if ping_timeout is None else ping_timeout),
    ]


def server_options(share_port: bool = False, max_connection_age: float | None = None) -> Options:
    """Options of every server. ``share_port`` and ``max_connection_age`` as for ``RpcServer``."""
    age = [] if max_connection_age is None else [("grpc.max_connection_age_ms", _milliseconds(max_connection_age))]
    return [
        *age,
        # With SO_REUSEPORT, a second server on the same port gets half of the connections without an error.
        ("grpc.so_reuseport", int(share_port)),
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(KEEPALIVE_MIN_INTERVAL)),
        # Closes connections that stay silent or do not finish their handshake.
        ("grpc.server_handshake_timeout_ms", _milliseconds(HANDSHAKE_TIMEOUT)),
        ("grpc.max_connection_idle_ms", _milliseconds(IDLE_TIMEOUT)),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        # Above 1,000 RPCs that the process has not accepted yet, gRPC would cancel some without a reason. The limit on
        # concurrent RPCs refuses them with one.
        ("grpc.server.max_pending_requests", MAX_PENDING_RPCS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_RPCS),
        *_common_options(KEEPALIVE_TIMEOUT),
    ]


def _common_options(ping_timeout: float) -> Options:
    return [
        ("grpc.keepalive_time_ms", _milliseconds(KEEPALIVE_TIME)),
        ("grpc.keepalive_timeout_ms", _milliseconds(ping_timeout)),
        # gRPC core uses this timeout (60 s by default) for every ping and ignores keepalive_timeout_ms
        # (grpc/grpc#39239). Without it, a frozen peer is detected only after more than a minute.
        ("grpc.http2.ping_timeout_ms", _milliseconds(ping_timeout)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # A trailer carries an error message twice: percent-encoded and in base64.
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
