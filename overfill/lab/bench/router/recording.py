"""The requests that the benchmark sends, and the router's answer to them as a peer sends it."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence

import grpc

from overfill.errors import Unavailable
from overfill.lab.bench.router.bare_server import Recording
from overfill.lab.bench.router.load import GRPC_PATH, TOKEN_TEXT, Api, Protocol
from overfill.request.params import SamplingParams
from overfill.v1 import inference_pb2

_PROMPT = range(10, 139)
"""Token ids of the prompt over gRPC. The text over HTTP has about as many tokens."""

_TEXT = "Some words of a prompt. " * 16

_END = b"\n\n"
"""End of a server-sent event."""


_PATHS: dict[Api, str] = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}


def make_request(protocol: Protocol, model: str, tokens: int, api: Api = "chat") -> bytes:
    """A greedy request for ``tokens`` tokens: a whole HTTP request to ``api``, streamed, or a ``GenerateRequest``."""
    if protocol == "grpc":
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True).to_proto()
        ids = inference_pb2.TokenIds(ids=_PROMPT)
        return inference_pb2.GenerateRequest(token_ids=ids, sampling=sampling).SerializeToString()
    items, most = ("input", "max_output_tokens") if api == "responses" else ("messages", "max_tokens")
    message = {"role": "user", "content": _TEXT}
    body = json.dumps({"model": model, items: [message], most: tokens, "temperature": 0, "stream": True}).encode()
    head = (
        f"POST {_PATHS[api]} HTTP/1.1\r\nhost: localhost\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def record(protocol: Protocol, address: str, model: str) -> Recording:
    """Records the router's answer of one token.

    Raises:
        Unavailable: The router did not answer with one event per token.
    """
    request = make_request(protocol, model, 1)
    events = _grpc_events(address, request) if protocol == "grpc" else _http_events(address, request)
    with_token = [index for index, event in enumerate(events) if TOKEN_TEXT in event]
    if len(with_token) != 1:
        raise Unavailable(f"{address}: expected one event with a token, got {len(with_token)} in {events!r}")
    place = with_token[0]
    head, tail = events[:place], events[place + 1 :]
    if protocol == "http":  # the router writes what is ready at once
        head, tail = [b"".join(head)], [b"".join(tail)]
    return Recording(tuple(head), events[place], tuple(tail))


def _grpc_events(address: str, request: bytes) -> Sequence[bytes]:
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_stream(GRPC_PATH.decode(), request_serializer=None, response_deserializer=None)
        return list(call(request, timeout=30))


def _http_events(address: str, request: bytes) -> Sequence[bytes]:
    host, _, port = address.rpartition(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request)
        while not received.endswith(b"0\r\n\r\n") and (data := connection.recv(1 << 16)):
            received += data
    body, rest = b"", received.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body += rest[:length]
        rest = rest[length + 2 :]
    # A chunk may hold several events, so the chunks do not say where an event ends.
    return [event + _END for event in body.split(_END) if event]
