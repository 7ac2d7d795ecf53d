"""Every exception a servicer raises reaches the client as the right status; bad bytes are the sender's fault.

Servicers are asyncio: coroutines or async generators. Streamed requests are read by iterating over them.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NamedTuple, NoReturn, TypeAlias

import grpc
import grpc.aio

from overfill.errors import InvalidRequest
from overfill.rpc.status import to_status

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Behaviour = Callable[[Any, Any], Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Maps exceptions with ``to_status``, and undecodable requests to INVALID_ARGUMENT, for all RPC kinds."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler: Handler | None = await continuation(handler_call_details)
        if handler is None:
            return handler  # type: ignore[return-value]  # gRPC answers UNIMPLEMENTED
        kind = f"{_arity(handler.request_streaming)}_{_arity(handler.response_streaming)}"
        behaviour: Behaviour = getattr(handler, kind)
        if not (inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour)):
            return handler  # a method that the servicer does not override
        make_handler = getattr(grpc, f"{kind}_rpc_method_handler")
        guarded: Handler = make_handler(
            _guard(behaviour, handler.request_streaming),
            request_deserializer=_lenient(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )
        return guarded


class _Undecodable(NamedTuple):
    """Takes the place of a request that could not be decoded, where gRPC would answer INTERNAL."""

    reason: str


def _guard(behaviour: Behaviour, request_streaming: bool) -> Behaviour:
    # A coroutine even around a generator: it closes the generator at once, also when a write is cancelled.
    async def guarded(request: Any, context: Context) -> Any:
        try:
            decoded = _checked_stream(request) if request_streaming else _checked(request)
            if inspect.isasyncgenfunction(behaviour):
                async with aclosing(behaviour(decoded, context)) as responses:
                    async for response in responses:
                        await context.write(response)
                return None
            return await behaviour(decoded, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    return guarded


async def _abort(context: Context, error: Exception) -> NoReturn:
    code, message, trailing_metadata = to_status(error)
    await context.abort(code, message, trailing_metadata)


def _lenient(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception as error:
            return _Undecodable(str(error))

    return decode


def _checked(request: Any) -> Any:
    if isinstance(request, _Undecodable):
        raise InvalidRequest("", f"the request is not a valid message: {request.reason}")
    return request


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"
