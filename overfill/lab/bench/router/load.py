"""A client that loads a server with streamed chat completions, and counts what it sends.

The client is a selector loop on raw sockets, on a thread of this process, which does nothing else meanwhile. It costs a
fraction of what a router spends on the same event; an asyncio client costs more than most routers.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import httptools

from overfill.lab.peers.process import PeerFailed
from overfill.lab.peers.routers import RunningRouter

_PROMPT = "Some words of a prompt. " * 16
_HEAD = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
_CONTENT = re.compile(rb'"content":"((?:[^"\\]|\\.)+)"')
_USAGE = re.compile(rb'"completion_tokens":(\d+)')
_LONGEST_WAIT = 0.05
"""Seconds after which the client looks whether it has to stop."""


@dataclass(frozen=True, slots=True)
class HttpLoad:
    """Requests that the client sends.

    Attributes:
        tokens: Tokens of a complete answer.
        streams: Number of requests that run at any time. The next one starts when one ends.
        rate: Requests per second, sent at fixed times instead. None means ``streams``.
        once: Whether no request follows those that start first.
        quick_ack: Whether the client acknowledges what it receives at once, and not up to 40 ms later.
    """

    server: RunningRouter
    tokens: int
    streams: int = 0
    rate: float | None = None
    once: bool = False
    quick_ack: bool = False


@dataclass(slots=True)
class Received:
    """What the client has received since the load began.

    Attributes:
        ended: Complete answers.
        failed: Requests that ended without all their tokens.
        events: Server-sent events that carry text.
        tokens: Received tokens.
        ttft: Seconds to the first token of each request that has got it.
    """

    ended: int = 0
    failed: int = 0
    events: int = 0
    tokens: int = 0
    ttft: list[float] = field(default_factory=list)


def _request(model: str, tokens: int) -> bytes:
    """Returns a request for a greedy, streamed chat completion of ``tokens`` tokens."""
    fields = {"model": model, "messages": [{"role": "user", "content": _PROMPT}], "max_tokens": tokens}
    fields |= {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(fields)
    return f"{_HEAD}content-length: {len(body)}\r\n\r\n{body}".encode()


@contextmanager
def running(load: HttpLoad) -> Iterator[Callable[[], Received]]:
    """Runs a load. Yields a function that returns what was received so far.

    Raises:
        PeerFailed: The server cannot be reached.
    """
    client = _Client(load)
    with ThreadPoolExecutor(1, "client") as thread:
        done = thread.submit(client.run)

        def counts() -> Received:
            if done.done():
                done.result()
            return replace(client.counts, ttft=list(client.counts.ttft))

        try:
            yield counts
        finally:
            client.stop.set()
        done.result()


class _Client:
    """Runs one ``HttpLoad`` on its thread."""

    def __init__(self, load: HttpLoad) -> None:
        self.load = load
        self.counts = Received()
        self.stop = threading.Event()
        self.selector = selectors.DefaultSelector()
        self.request = _request(load.server.model, load.tokens)
        self.idle: list[_Connection] = []

    def run(self) -> None:
        rate, sent, start = self.load.rate, 0, time.perf_counter()
        try:
            for _ in range(self.load.streams):
                self._begin()
            while not self.stop.is_set():
                wait = _LONGEST_WAIT
                if rate is not None:
                    while (late := time.perf_counter() - start - sent / rate) >= 0:
                        self._begin()
                        sent += 1
                    wait = min(wait, -late)
                for key, _ in self.selector.select(wait):
                    key.data.read()
        except OSError as error:
            raise PeerFailed(f"{self.load.server.about}: {error}") from error
        finally:
            for key in list(self.selector.get_map().values()):
                key.data.close()
            self.selector.close()

    def ended(self, connection: _Connection, whole: bool) -> None:
        """Notes the end of an answer, and starts the next request of a closed loop."""
        if whole:
            self.counts.ended += 1
            self.idle.append(connection)
        else:
            self.counts.failed += 1
            connection.close()
        if self.load.rate is None and not self.load.once:
            self._begin()

    def _begin(self) -> None:
        (self.idle.pop() if self.idle else _Connection(self)).begin()


class _Connection:
    """A connection with one request at a time. Its parser calls the methods ``on_...``."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        host, _, port = client.load.server.address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.selector.register(self._socket, selectors.EVENT_READ, self)

    def begin(self) -> None:
        self._sent, self._first, self._usage = time.perf_counter(), True, 0
        self._parser: Any = httptools.HttpResponseParser(self)
        self._body, self._whole = b"", False  # the body has no complete event
        self._socket.sendall(self._client.request)

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        self._whole = True

    def close(self) -> None:
        with suppress(KeyError):
            self._client.selector.unregister(self._socket)
        self._socket.close()

    def read(self) -> None:
        data = b""
        with suppress(ConnectionResetError):
            data = self._socket.recv(1 << 18)
        if self._client.load.quick_ack:  # the kernel ends this mode by itself, so it is set again each time
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if self in self._client.idle:  # the server ends connections that nothing uses
            self._client.idle.remove(self)
            return self.close()
        self._parser.feed_data(data)
        events, _, self._body = self._body.rpartition(b"\n\n")
        self._count(events)
        if self._whole or not data:
            complete = self._parser.get_status_code() == 200 and self._usage == self._client.load.tokens
            self._client.ended(self, complete)

    def _count(self, events: bytes) -> None:
        counts, token = self._client.counts, self._client.load.server.token
        if found := _CONTENT.findall(events):
            if self._first:
                self._first = False
                counts.ttft.append(time.perf_counter() - self._sent)
            counts.events += len(found)
            counts.tokens += sum(map(len, found)) // len(token) if token else len(found)
        if b'"usage"' in events and (usage := _USAGE.search(events)):
            self._usage = int(usage[1])
