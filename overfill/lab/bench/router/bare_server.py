"""The peer of ``overfill bench router``: a gRPC server that answers the public RPC at once, without workers.

``python -m overfill.lab.bench.router.bare_server PORT`` serves it on loopback. Its cost is that of gRPC and the client.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from overfill.rpc.channel import server_options
from overfill.v1 import common_pb2, inference_pb2, inference_pb2_grpc

_END = inference_pb2.Finished(reason=common_pb2.FINISH_REASON_LENGTH)


class _Inference(inference_pb2_grpc.InferenceServicer):
    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        tokens = request.sampling.max_tokens
        accepted = inference_pb2.Accepted(request_id="bare", prompt_tokens=len(request.token_ids.ids))
        yield inference_pb2.GenerateResponse(accepted=accepted)
        for index in range(tokens):
            delta = inference_pb2.Delta(first_index=index, token_ids=[1], text="x")
            yield inference_pb2.GenerateResponse(delta=delta)
        yield inference_pb2.GenerateResponse(finished=_END)


async def _serve(port: int) -> None:
    server = grpc.aio.server(options=server_options())
    inference_pb2_grpc.add_InferenceServicer_to_server(_Inference(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
