"""The peer of ``overfill bench kv``: a gRPC stream of 1 MiB messages, without checksums, copies or acknowledgements.

``python -m overfill.lab.bench.kv.raw_stream`` serves them and prints its address; ``pull_raw`` reads them.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from overfill.process.memory import freed_memory_kept
from overfill.rpc.channel import server_options
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD

_METHOD = "/overfill.bench.Raw/Pull"
_COUNT = struct.Struct("<I")


async def _serve() -> None:
    message = bytes(MAX_CHUNK_PAYLOAD)

    async def pull(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(_COUNT.unpack(request)[0]):
            yield message

    server = grpc.aio.server(options=server_options())
    service, method = _METHOD.strip("/").split("/")
    handlers = {method: grpc.unary_stream_rpc_method_handler(pull)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await server.wait_for_termination()


async def pull_raw(channels: list[grpc.aio.Channel], messages: int) -> int:
    """Reads ``messages`` messages, divided equally among the channels. Returns their bytes."""

    async def pull(channel: Any, count: int) -> int:
        call = channel.unary_stream(_METHOD)(_COUNT.pack(count))
        size = 0
        while (message := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            size += len(message)
        return size

    share, rest = divmod(messages, len(channels))
    return sum(await asyncio.gather(*(pull(c, share + (i < rest)) for i, c in enumerate(channels))))


if __name__ == "__main__":
    with freed_memory_kept(64 << 20):  # as in a worker
        asyncio.run(_serve())
