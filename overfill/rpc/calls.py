"""Reads and writes of an asyncio call, with every failure as an OverfillError."""

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
    """Awaits ``call.read()`` or a whole call to ``peer``.

    Raises:
        InternalError: what came is no message of its type; gRPC gives None then and only logs it.
        OverfillError: as ``checked_write``.
    """
    message = await checked_write(operation, peer)
    if message is None:
        raise InternalError(f"{peer} sent what is no message of its type")
    return message


async def checked_write(operation: Awaitable[T], peer: str) -> T:
    """Awaits ``call.write(...)`` to ``peer``.

    Raises:
        RequestCancelled: the peer answered CANCELLED, which gRPC otherwise raises as asyncio.CancelledError, as
            if this task had been cancelled.
        Unavailable: written to a call that has ended; a read tells how it ended.
        OverfillError: the peer's error, or the connection's.
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
    """The messages of a streaming ``call`` to ``peer``, to its end; raises as ``checked_response`` does."""
    while (message := await checked_response(call.read(), peer)) is not grpc.aio.EOF:  # type: ignore[attr-defined]
        yield message
