"""Asks a stack's router for its status, without the SDK."""

from __future__ import annotations

import grpc

from overfill.rpc.access import Role
from overfill.rpc.channel import open_sync_channel
from overfill.rpc.tls import Credentials
from overfill.v1 import admin_pb2, admin_pb2_grpc

_TIMEOUT = 10.0  # seconds


def router_status(address: str, shown: Credentials) -> admin_pb2.StatusResponse | None:
    """Returns the status of the router at ``address``; None if it does not answer."""
    with open_sync_channel(address, shown, role=Role.ROUTER) as channel:
        try:
            status: admin_pb2.StatusResponse = admin_pb2_grpc.AdminStub(channel).Status(
                admin_pb2.StatusRequest(), timeout=_TIMEOUT
            )
        except grpc.RpcError:
            return None
        return status
