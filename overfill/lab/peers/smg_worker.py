"""A mock worker that speaks vLLM's gRPC, as smg's gateway needs it to tokenize; runs in smg's environment.

Called with a port, a folder with a tokenizer, and the seconds between two tokens of an answer. Its text is ``~~~``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
from smg_grpc_proto.generated import vllm_engine_pb2 as pb  # type: ignore[import-not-found]
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as service


class SmgWorker(service.VllmEngineServicer):  # type: ignore[misc]
    """Answers each prompt with as many tokens as it asks for. The running answers get their next token together."""

    def __init__(self, model: Path, step: float) -> None:
        self._model = model
        self._config = json.loads((model / "config.json").read_text())
        self._token = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]["~"]
        self._step = step
        self._next = asyncio.Event()

    async def steps(self) -> None:
        while True:
            await asyncio.sleep(self._step)
            self._next.set()
            self._next = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        counts = {"prompt_tokens": len(request.tokenized.input_ids)}
        tokens = request.sampling_params.max_tokens
        for done in range(1, tokens + 1):
            if done > 1:
                await self._next.wait()
            chunk = pb.GenerateStreamChunk(token_ids=[self._token], completion_tokens=done, **counts)
            yield pb.GenerateResponse(chunk=chunk)
        whole = {"output_ids": [self._token] * tokens, "completion_tokens": tokens, "finish_reason": "length"}
        yield pb.GenerateResponse(complete=pb.GenerateComplete(**whole, **counts))

    async def HealthCheck(self, request: Any, context: Any) -> Any:
        return pb.HealthCheckResponse(healthy=True)

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        sizes = {"max_context_length": "max_position_embeddings", "vocab_size": "vocab_size"}
        about = {field: self._config[name] for field, name in sizes.items()}
        about |= {"model_path": str(self._model), "tokenizer_path": str(self._model), "served_model_name": "mock"}
        return pb.GetModelInfoResponse(is_generation=True, model_type=self._config["model_type"], **about)


async def main(port: str, model: str, step: str) -> None:
    """Serves until the process ends."""
    worker, server = SmgWorker(Path(model), float(step)), grpc.aio.server()
    service.add_VllmEngineServicer_to_server(worker, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await worker.steps()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
