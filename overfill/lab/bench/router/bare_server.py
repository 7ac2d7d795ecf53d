"""The peers of ``overfill bench router``: servers that send the router's bytes, and do nothing else.

The peers are uvicorn with httptools over HTTP, and grpc.aio, the router's own library, over gRPC. A peer reads a
request's ``max_tokens``, and answers with the events that were recorded from the router.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio
import uvicorn

from overfill.lab.bench.router.load import Protocol
from overfill.rpc.channel import server_options
from overfill.v1 import inference_pb2

_BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class Recording:
    """The events of one answer of the router, over HTTP or gRPC, as bytes.

    Attributes:
        head: Events before the first token.
        token: The event of a token.
        tail: Events after the last token.
    """

    head: tuple[bytes, ...]
    token: bytes
    tail: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SendingPace:
    """Time between tokens, as mock decode workers keep it.

    Attributes:
        step: Seconds of a step, in which each running answer gets one token.
        per_sequence: Seconds that a step takes longer for each running sequence of a worker.
        workers: Number of workers among which the sequences are divided.
    """

    step: float = 0.0
    per_sequence: float = 0.0
    workers: int = 1


@contextlib.contextmanager
def bare_server(protocol: Protocol, recording: Recording, pace: SendingPace) -> Iterator[tuple[str, int]]:
    """Starts a peer; yields its address and process id."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(protocol, recording, pace, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert process.pid is not None
        yield f"127.0.0.1:{ours.recv()}", process.pid
    finally:
        process.kill()
        process.join()


def _serve(protocol: Protocol, recording: Recording, pace: SendingPace, pipe: Connection) -> None:
    serve = _serve_http if protocol == "http" else _serve_grpc
    asyncio.run(serve(_Answers(recording, pace), pipe.send))


class _Answers:
    """The running answers. Each yields the recorded events, one token per step."""

    def __init__(self, recording: Recording, pace: SendingPace) -> None:
        self._recording = recording
        self._pace = pace
        self._running = 0
        self._step = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    async def events(self, tokens: int) -> AsyncIterator[bytes]:
        """Yields the events of one answer. The first token comes at once."""
        self._running += 1
        try:
            for event in self._recording.head:
                yield event
            yield self._recording.token
            for _ in range(tokens - 1):
                await self._next_step()
                yield self._recording.token
            for event in self._recording.tail:
                yield event
        finally:
            self._running -= 1

    async def _next_step(self) -> None:
        pace = self._pace
        seconds = pace.step + pace.per_sequence * -(-self._running // pace.workers)
        if not seconds:
            await asyncio.sleep(0)
            return
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._end_step)
        await self._step.wait()

    def _end_step(self) -> None:
        self._timer = None
        self._step.set()
        self._step.clear()


async def _serve_http(answers: _Answers, ready: Callable[[int], None]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        tokens = json.loads(body)["max_tokens"]
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in answers.events(tokens):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(
        app, loop="asyncio", http="httptools", ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, backlog=_BACKLOG,
    )  # fmt: skip
    # With the protocol named, asyncio sets TCP_NODELAY on accepted connections.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(_BACKLOG)
        ready(listener.getsockname()[1])
        await uvicorn.Server(config).serve(sockets=[listener])


async def _serve_grpc(answers: _Answers, ready: Callable[[int], None]) -> None:
    async def generate(request: inference_pb2.GenerateRequest, context: Any) -> None:
        async for event in answers.events(request.sampling.max_tokens):
            await context.write(event)

    handler = grpc.unary_stream_rpc_method_handler(
        generate, request_deserializer=inference_pb2.GenerateRequest.FromString
    )
    server = grpc.aio.server(options=server_options())
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("overfill.v1.Inference", {"Generate": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ready(port)
    await server.wait_for_termination()
