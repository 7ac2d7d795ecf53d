"""Channels, and the HTTP/2 options of both ends. Addresses are ``host:port`` or ``unix:path``.

Every channel owns its TCP connection. Channels that share one, as gRPC's do unless told otherwise, put a
first token behind megabytes of KV and turn *n* parallel streams into one.
"""

from __future__ import annotations

from typing import Any, cast

import grpc
import grpc.aio

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
)
from overfill.rpc.renewal import RenewedChannel, close_soon
from overfill.rpc.tls import ClientTls, Credentials

Options = list[tuple[str, int]]


def open_channel(address: str, shown: ClientTls | Credentials | None = None) -> grpc.aio.Channel:
    """An asyncio channel with its own connection, opened on first use. Raises TlsError on bad TLS files.

    When the files of ``shown`` change, new RPCs go over a new connection.
    """
    return cast(grpc.aio.Channel, _open(address, shown, grpc.aio))


def open_sync_channel(address: str, shown: ClientTls | Credentials | None = None) -> grpc.Channel:
    """As ``open_channel``, for threads."""
    return cast(grpc.Channel, _open(address, shown, grpc))


def _open(address: str, shown: ClientTls | Credentials | None, kind: Any) -> Any:
    if not isinstance(shown, Credentials):
        shown = Credentials(shown)
    tls = shown.tls
    options: list[tuple[str, Any]] = [*channel_options()]
    metadata = (("authorization", f"Bearer {shown.secret}"),) if shown.secret else ()
    if tls is None:
        channel = kind.insecure_channel(address, options=options)
        return RenewedChannel(lambda _: channel, None, metadata, close_soon) if metadata else channel
    if tls.name:
        options.append(("grpc.ssl_target_name_override", tls.name))
    return RenewedChannel(
        lambda credentials: kind.secure_channel(address, credentials, options=options),
        tls.reloaded(),
        metadata,
        close_soon,
    )


def channel_options() -> Options:
    """Options of every channel."""
    return [
        ("grpc.use_local_subchannel_pool", 1),
        # Peers are named by address; a proxy from the environment never belongs between them.
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        # Which is also how long a connection may take, before its address counts as one that cannot be reached.
        ("grpc.min_reconnect_backoff_ms", _milliseconds(CONNECT_TIMEOUT)),
        ("grpc.max_reconnect_backoff_ms", 2000),
        *_common_options(),
    ]


def server_options() -> Options:
    """Options of every server."""
    return [
        # With SO_REUSEPORT a second server on a taken port would silently get half of the connections.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(KEEPALIVE_MIN_INTERVAL)),
        # A connection that says nothing, or half of a handshake, does not stay.
        ("grpc.server_handshake_timeout_ms", _milliseconds(HANDSHAKE_TIMEOUT)),
        ("grpc.max_connection_idle_ms", _milliseconds(IDLE_TIMEOUT)),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        *_common_options(),
    ]


def _common_options() -> Options:
    return [
        ("grpc.keepalive_time_ms", _milliseconds(KEEPALIVE_TIME)),
        ("grpc.keepalive_timeout_ms", _milliseconds(KEEPALIVE_TIMEOUT)),
        # gRPC core waits this long for the answer to any ping, 60 s by default, and never uses the line above
        # (grpc/grpc#39239): without it a frozen peer is noticed after more than a minute.
        ("grpc.http2.ping_timeout_ms", _milliseconds(KEEPALIVE_TIMEOUT)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # Error messages travel twice in a trailer, percent-encoded and in base64.
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
