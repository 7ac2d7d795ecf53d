"""The public API over gRPC: text in, text out. ``RequestHandler`` does everything but the protocol."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from overfill.api.keys import ApiKey
from overfill.rpc.access import caller
from overfill.rpc.interceptors import Context
from overfill.v1 import inference_pb2, inference_pb2_grpc
from services.router.request_handler import RequestHandler

_Response = inference_pb2.GenerateResponse


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Serves Inference. It raises OverfillErrors, which an interceptor maps to gRPC status."""

    def __init__(self, handler: RequestHandler) -> None:
        self._handler = handler

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        received = asyncio.get_running_loop().time()
        key = _caller()
        checked = await self._handler.check(request, key, context.time_remaining())
        with self._handler.starting(key) as start:
            answer = start(checked, received, context.time_remaining())
        with answer:
            await context.write(_Response(accepted=answer.accepted))
            while (delta := await answer.next()) is not None:
                await context.write(_Response(delta=delta.to_proto()))
            await context.write(_Response(finished=answer.finished))

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        tiers = self._handler.tiers
        key = _caller()
        return inference_pb2.ListModelsResponse(models=[tiers.describe(name, key) for name in tiers.listed(key)])

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        ids = await self._handler.tokenize(request, _caller())
        return inference_pb2.TokenizeResponse(ids=ids, max_model_len=self._handler.tiers.max_model_len())

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        return inference_pb2.DetokenizeResponse(text=await self._handler.detokenize(request, _caller()))


def _caller() -> ApiKey | None:
    """The caller's API key; None when the router needs none."""
    key: Any = caller.get()  # the router has no other callers here
    return cast("ApiKey | None", key)
