"""The public API over gRPC: text in, text out. ``Generator`` does everything but the protocol."""

from __future__ import annotations

import asyncio
from typing import Any

from overfill.rpc.access import caller
from overfill.rpc.interceptors import Context
from overfill.v1 import inference_pb2, inference_pb2_grpc
from services.router.generation import Generator

_Response = inference_pb2.GenerateResponse


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Serves Inference. It raises OverfillErrors, which an interceptor maps to gRPC status."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        received = asyncio.get_running_loop().time()
        key: Any = caller.get()  # an ApiKey: the router has no other callers here
        checked = await self._generator.check(request, key, context.time_remaining())
        with self._generator.starting(key) as start:
            generation = start(checked, received, context.time_remaining())
        with generation:
            await context.write(_Response(accepted=generation.accepted))
            while (delta := await generation.next()) is not None:
                await context.write(_Response(delta=delta.to_proto()))
            await context.write(_Response(finished=generation.finished))

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        tiers = self._generator.tiers
        key: Any = caller.get()  # an ApiKey: the router has no other callers here
        return inference_pb2.ListModelsResponse(models=[tiers.describe(name) for name in tiers.listed(key)])

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        ids = await self._generator.tokenize(request)
        return inference_pb2.TokenizeResponse(ids=ids, max_model_len=self._generator.tiers.max_model_len())

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        return inference_pb2.DetokenizeResponse(text=await self._generator.detokenize(request))
