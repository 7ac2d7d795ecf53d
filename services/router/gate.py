"""API keys in front of the public RPCs. Workers and administrators have services of their own on the same port."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import NoReturn

import grpc
import grpc.aio

from overfill.api.keys import ApiKey, KeyRing, bearer
from overfill.errors import Unauthenticated
from overfill.rpc.interceptors import Context, Handler
from overfill.v1 import inference_pb2

caller: ContextVar[ApiKey | None] = ContextVar("caller", default=None)
"""The key that the RPC being served came with; None where no keys are wanted."""

_PUBLIC = f"/{inference_pb2.DESCRIPTOR.services_by_name['Inference'].full_name}/"


class KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Refuses RPCs of Inference that come without a key (metadata ``authorization: Bearer KEY``)."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler: Handler | None = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_PUBLIC) or self._known(handler_call_details):
            return handler  # type: ignore[return-value]  # None: gRPC answers UNIMPLEMENTED
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_refuse, handler.request_deserializer)
        return grpc.unary_unary_rpc_method_handler(_refuse, handler.request_deserializer)

    def _known(self, call: grpc.HandlerCallDetails) -> bool:
        metadata = dict(call.invocation_metadata or ())
        shown = bearer(str(metadata.get("authorization", "")))
        key = None if shown is None else self._keys.find(shown)
        if key is None:
            return False
        caller.set(key)  # gRPC runs interceptors and the handler of an RPC in one task of its own
        return True


async def _refuse(request: object, context: Context) -> NoReturn:
    raise Unauthenticated("a valid API key is wanted, in the metadata 'authorization: Bearer KEY'")
