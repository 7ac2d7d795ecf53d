"""Reads and writes of asyncio gRPC calls, with every failure raised as an OverfillError."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import grpc
import grpc.aio

from overfill.errors import InternalError, RequestCancelled, Unavailable
from overfill.rpc.status import from_rpc_error

T = TypeVar("T")


async def checked_response(operation: Awaitable[T], peer: str) -> T:
    """Awaits ``call.read()``, or the response of a unary call, and returns the message. ``peer`` names the other end.

    Raises:
        InternalError: the message could not be decoded. gRPC only logs this and returns None.
        OverfillError: as ``checked_write``.
    """
    message = await checked_write(operation, peer)
    if message is None:
        raise InternalError(f"{peer} sent a message that cannot be decoded")
    return message


async def checked_write(operation: Awaitable[T], peer: str) -> T:
    """Awaits ``call.write(...)``. ``peer`` names the other end in messages.

    Raises:
        RequestCancelled: the peer answered CANCELLED. gRPC raises asyncio.CancelledError for this, as if this task had
            been cancelled.
        Unavailable: the call had already ended. A read raises the error that ended it.
        OverfillError: the peer sent an error, or the connection failed.
    """
    try:
        return await operation
    except grpc.RpcError as error:
        raise from_rpc_error(error, peer) from error
    except asyncio.InvalidStateError as error:
        raise Unavailable(f"{peer}: the call has ended") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RequestCancelled(f"{peer} cancelled the call") from error


async def responses(call: Any, peer: str) -> AsyncIterator[Any]:
    """Yields the messages of a streaming ``call`` until it ends. Raises as ``checked_response`` does."""
    while (message := await checked_response(call.read(), peer)) is not grpc.aio.EOF:  # type: ignore[attr-defined]
        yield message
