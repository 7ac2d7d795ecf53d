"""Server interceptor: checks access, decodes requests and maps exceptions to statuses, for every RPC.

Servicers are asyncio: coroutines or async generators, which iterate over streamed requests. The interceptor handles
every RPC as a request stream, as it is on the wire. So it checks the caller before it reads the message, and gives the
caller ``FIRST_MESSAGE_TIMEOUT`` to send it. What a caller has open counts against its share (``RpcShares``).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NamedTuple, NoReturn, TypeAlias

import grpc
import grpc.aio

from overfill.errors import DeadlineExceeded, InvalidRequest, PermissionDenied
from overfill.rpc.access import AccessPolicy, bearer, caller, roles_of
from overfill.rpc.constants import FIRST_MESSAGE_TIMEOUT
from overfill.rpc.shared_timeout import SharedTimeout
from overfill.rpc.shares import OpenRpc, RpcShares, current
from overfill.rpc.status import to_status
from overfill.telemetry import tracing

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Behaviour = Callable[[Any, Any], Any]


TRACED = {
    "/overfill.v1.Inference/Generate": "router.request",
    "/overfill.v1.Prefill/Prefill": "prefill.prompt",
    "/overfill.v1.Prefill/PrefillAtOnce": "prefill.prompt",
}
"""RPCs that are traced, with the names of their spans."""


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Refuses callers that ``access`` does not admit, and maps exceptions to statuses with ``to_status``.

    A request that cannot be decoded ends with INVALID_ARGUMENT. The interceptor wraps each RPC's handler once and
    caches it. gRPC would call interceptors after this one only for the first call of each RPC, so there are none.

    Args:
        access: the policy; None admits every caller to every listed RPC.
        certificates: the listener requires client certificates, so roles are read from them.
        max_rpcs: the server's limit on concurrent RPCs, of which callers have shares; None means no limit.
    """

    def __init__(
        self, access: AccessPolicy | None = None, certificates: bool = False, max_rpcs: int | None = None
    ) -> None:
        self._access = access or AccessPolicy()
        self._certificates = certificates
        self._shares = RpcShares(max_rpcs)
        self._handlers: dict[str, Handler] = {}
        self._first_messages = SharedTimeout()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        method = handler_call_details.method
        guarded = self._handlers.get(method)
        if guarded is None:
            handler: Handler | None = await continuation(handler_call_details)
            if handler is None:
                return handler  # type: ignore[return-value]  # gRPC answers UNIMPLEMENTED
            guarded = self._handlers[method] = self._guarded(method, handler)
        return guarded

    def _guarded(self, method: str, handler: Handler) -> Handler:
        kind = f"{_arity(handler.request_streaming)}_{_arity(handler.response_streaming)}"
        behaviour: Behaviour = getattr(handler, kind)
        if not (inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour)):
            behaviour = _unimplemented  # a method that the servicer does not override
        span = TRACED.get(method)
        traced = behaviour if span is None else _traced(behaviour, span)
        answer = None if handler.response_streaming else handler.response_serializer or _as_it_is
        make_handler = getattr(grpc, f"stream_{_arity(handler.response_streaming)}_rpc_method_handler")
        guarded: Handler = make_handler(
            _guard(
                traced,
                handler.request_streaming,
                answer,
                lambda context: self._admit(method, context),
                self._first_messages,
            ),
            request_deserializer=_lenient(handler.request_deserializer),
            response_serializer=handler.response_serializer if answer is None else None,
        )
        return guarded

    def _admit(self, method: str, context: Context) -> OpenRpc:
        rule = self._access.rpc(method)
        if rule is None:
            raise PermissionDenied(f"{method} has no access rule on this server, so every call is refused")
        roles = None
        if self._certificates:
            names = context.auth_context().get("x509_subject_alternative_name", ())
            roles = roles_of(bytes(name).decode(errors="replace") for name in names)
        key = self._access.check(rule, _shown(context), roles)
        rpc = self._shares.open(key, not rule.open, context.peer())
        context.add_done_callback(lambda _: rpc.end())  # type: ignore[arg-type]
        # gRPC runs the handler of an RPC in a task of its own.
        caller.set(key)
        current.set(rpc)
        return rpc


def _traced(behaviour: Behaviour, name: str) -> Behaviour:
    """Wraps ``behaviour`` in a span that is current in the RPC's task until the RPC ends."""

    async def traced(request: Any, context: Context) -> Any:
        span, answer = tracing.serve(name, context.invocation_metadata() or ()), None
        try:
            if inspect.isasyncgenfunction(behaviour):
                async with aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        await context.write(response)
            else:
                answer = await behaviour(request, context)
        except BaseException as error:
            span.end(error)
            raise
        span.end()
        return answer

    return traced


class _Undecodable(NamedTuple):
    """Stands for a request that could not be decoded. If decoding raised instead, gRPC would answer INTERNAL."""

    reason: str


def _guard(
    behaviour: Behaviour,
    request_streaming: bool,
    serialize: Callable[[Any], bytes] | None,
    admit: Callable[[Context], OpenRpc],
    limit: SharedTimeout,
) -> Behaviour:
    """Wraps ``behaviour`` in what every RPC needs; ``serialize`` is None if it streams its answer."""

    # A coroutine, even for a generator: it closes the generator at once, also when a write is cancelled.
    async def guarded(requests: Any, context: Context) -> Any:
        try:
            rpc = admit(context)
            decoded = _checked_stream(requests, context, limit) if request_streaming else await _only(context, limit)
            if inspect.isasyncgenfunction(behaviour):
                async with aclosing(behaviour(decoded, context)) as responses:
                    async for response in responses:
                        await context.write(response)
                return None
            response = await behaviour(decoded, context)
            if serialize is None:
                return None
            data = serialize(response)
            rpc.answer(len(data))
            return data
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            if _is_of_a_gone_caller(error):
                raise asyncio.CancelledError from None  # gRPC logs nothing for a cancelled call
            status = to_status(error)
        # Behind the handler of the exception, and without the request. The context keeps the exception of ``abort``,
        # which refers to this frame and so to the context. The garbage collector would find this circle late.
        decoded = None
        await _abort(context, *status)

    return guarded


async def _abort(
    context: Context, code: grpc.StatusCode, message: str, trailing_metadata: tuple[tuple[str, Any], ...]
) -> NoReturn:
    if trace_id := tracing.current().trace_id:
        trailing_metadata = (*trailing_metadata, (tracing.TRACE_ID, trace_id))
    try:
        await context.abort(code, message, trailing_metadata)
    except Exception as failure:
        if _is_of_a_gone_caller(failure):
            raise asyncio.CancelledError from None  # gRPC logs nothing for a cancelled call
        raise


def _is_of_a_gone_caller(error: Exception) -> bool:
    """Returns True if gRPC could not send because the caller reset the call. The error's class is not public."""
    return type(error).__name__ == "ExecuteBatchError"


def _as_it_is(message: bytes) -> bytes:
    return message


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


async def _checked_stream(requests: AsyncIterator[Any], context: Context, limit: SharedTimeout) -> AsyncIterator[Any]:
    first = await _first(context, limit)
    if first is grpc.aio.EOF:  # type: ignore[attr-defined]
        return
    yield _checked(first)
    async for request in requests:
        yield _checked(request)


async def _only(context: Context, limit: SharedTimeout) -> Any:
    """Returns the single message of a unary request."""
    first = await _first(context, limit)
    if first is grpc.aio.EOF:  # type: ignore[attr-defined]
        raise InvalidRequest("", "the request has no message")
    return _checked(first)


async def _first(context: Context, limit: SharedTimeout) -> Any:
    """Returns the first message; EOF when the stream ends without one."""
    try:
        return await limit.wait(context.read(), FIRST_MESSAGE_TIMEOUT)
    except TimeoutError:
        raise DeadlineExceeded(f"no message has arrived within {FIRST_MESSAGE_TIMEOUT:g} s") from None


async def _unimplemented(request: Any, context: Context) -> NoReturn:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server does not implement the RPC")


def _shown(context: Context) -> str | None:
    """Returns the API key or secret in an RPC's metadata."""
    header = next((value for key, value in context.invocation_metadata() or () if key == "authorization"), "")
    return bearer(header) if isinstance(header, str) else None


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"
