"""Channels, and the HTTP/2 options of both ends. Addresses are ``host:port`` or ``unix:path``.

Every channel owns its TCP connection. Channels that share one, as gRPC's do unless told otherwise, put a
first token behind megabytes of KV and turn *n* parallel streams into one.
"""

from __future__ import annotations

import grpc
import grpc.aio

from overfill.rpc.constants import (
    KEEPALIVE_MIN_INTERVAL,
    KEEPALIVE_TIME,
    KEEPALIVE_TIMEOUT,
    MAX_MESSAGE_BYTES,
)
from overfill.rpc.tls import ClientTls

Options = list[tuple[str, int]]


def open_channel(address: str, tls: ClientTls | None = None) -> grpc.aio.Channel:
    """An asyncio channel with its own connection, opened on first use. Raises TlsError on bad ``tls``."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=channel_options())
    return grpc.aio.secure_channel(address, tls.credentials(), options=[*channel_options(), *_expected(tls)])


def open_sync_channel(address: str, tls: ClientTls | None = None) -> grpc.Channel:
    """As ``open_channel``, for threads."""
    if tls is None:
        return grpc.insecure_channel(address, options=channel_options())
    return grpc.secure_channel(address, tls.credentials(), options=[*channel_options(), *_expected(tls)])


def _expected(tls: ClientTls) -> list[tuple[str, str]]:
    return [("grpc.ssl_target_name_override", tls.name)] if tls.name else []


def channel_options() -> Options:
    """Options of every channel."""
    return [
        ("grpc.use_local_subchannel_pool", 1),
        # Peers are named by address; a proxy from the environment never belongs between them.
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 2000),
        *_common_options(),
    ]


def server_options() -> Options:
    """Options of every server."""
    return [
        # With SO_REUSEPORT a second server on a taken port would silently get half of the connections.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(KEEPALIVE_MIN_INTERVAL)),
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
        ("grpc.max_metadata_size", 32 << 10),
    ]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
