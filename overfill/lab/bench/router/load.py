"""Client processes that load a server over HTTP or gRPC, and count what it sends without reading it any further.

A client process is a selector loop on raw sockets. It costs a fraction of what a server spends on the same event. The
parent starts a ``Load`` in all processes of a ``LoadProcesses``, and reads their counts at any time.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import re
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import Connection
from typing import Any, Literal

from overfill.errors import Unavailable
from overfill.v1 import inference_pb2

TOKEN_TEXT = b"~"
"""Text of every token that mock workers send."""

Api = Literal["chat", "responses", "messages"]
"""The APIs over HTTP."""

_TOKENS: dict[Api, re.Pattern[bytes]] = {
    "chat": re.compile(b'"content":"(~+)"'),
    "responses": re.compile(b'"delta":"(~+)"'),
    "messages": re.compile(b'"text":"(~+)"'),
}
"""The tokens of one event. Events of the end that repeat the whole text do not match."""

GRPC_PATH = b"/overfill.v1.Inference/Generate"

Protocol = Literal["http", "grpc"]


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that a client process sends.

    Attributes:
        address: ``host:port`` of the server.
        requests: Whole HTTP requests, or serialized ``GenerateRequest``s, of which each client process sends one after
            another in turn.
        tokens: Tokens of a complete answer.
        streams: Number of requests that run at any time. The next one starts when one ends.
        rate: Requests per second, sent at fixed times instead. None means ``streams``.
        api: API of a request over HTTP.
    """

    protocol: Protocol
    address: str
    requests: tuple[bytes, ...]
    tokens: int
    streams: int = 0
    rate: float | None = None
    api: Api = "chat"


@dataclass(slots=True)
class Received:
    """What client processes have received since the load began.

    Attributes:
        begun: Requests whose first token has arrived.
        ended: Complete answers.
        failed: Requests that ended without all their tokens.
        events: Server-sent events or messages that carry tokens.
        tokens: Received tokens.
        ttft: Seconds to the first token of each request that got it since the counts were last read.
        gaps: Seconds between two events with tokens of the same stream, since the counts were last read.
        cpu: Seconds of CPU time of each process.
    """

    begun: int = 0
    ended: int = 0
    failed: int = 0
    events: int = 0
    tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, other: Received) -> None:
        """Adds the counts of another process."""
        for counter in fields(self):
            setattr(self, counter.name, getattr(self, counter.name) + getattr(other, counter.name))


class LoadProcesses:
    """``count`` client processes. Use it as a context manager; one load runs at a time."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_client_process, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> LoadProcesses:
        return self

    def __exit__(self, *exc: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.kill()

    @contextlib.contextmanager
    def running(self, load: Load) -> Iterator[Callable[[], Received]]:
        """Divides ``load`` among the processes. Yields a function that returns the counts so far."""
        count = len(self._pipes)
        for index, pipe in enumerate(self._pipes):
            streams = load.streams // count + (index < load.streams % count)
            rate = None if load.rate is None else load.rate / count
            # The processes of an open loop take turns.
            pause = 0.0 if load.rate is None else index / load.rate
            pipe.send((replace(load, streams=streams, rate=rate), pause))
        try:
            yield self._counts
        finally:
            for pipe in self._pipes:
                _ask(pipe, "stop")

    def _counts(self) -> Received:
        total = Received()
        for pipe in self._pipes:
            total.add(_ask(pipe, "counts"))
        return total


def _ask(pipe: Connection, command: str) -> Any:
    try:
        pipe.send(command)
        return pipe.recv()
    except (EOFError, OSError) as error:
        raise Unavailable("a client process has ended; its output says why") from error


def _client_process(pipe: Connection) -> None:
    while True:
        try:
            load, pause = pipe.recv()
        except (EOFError, OSError):
            return
        if not _Client(load, pipe).run(pause):
            return


class _Client:
    """Runs one ``Load`` in a client process."""

    def __init__(self, load: Load, pipe: Connection) -> None:
        self.load = load
        self.requests = itertools.cycle(load.requests)
        self.counts = Received()
        self.selector = selectors.DefaultSelector()
        self.selector.register(pipe, selectors.EVENT_READ, self._obey)
        self._pipe = pipe
        self._stopped = False
        self._sockets: list[socket.socket] = []
        self._idle: list[_HttpConnection] = []
        self._grpc = _GrpcConnection(self) if load.protocol == "grpc" else None

    def run(self, pause: float) -> bool:
        """Runs until the parent says stop. Returns False if the parent has gone."""
        rate, sent, start = self.load.rate, 0, time.perf_counter() + pause
        for _ in range(self.load.streams):
            self._begin()
        try:
            while not self._stopped:
                wait = None
                if rate is not None:
                    while (wait := start + sent / rate - time.perf_counter()) <= 0:
                        self._begin()
                        sent += 1
                for key, _ in self.selector.select(wait):
                    key.data()
        except EOFError:
            return False
        finally:
            self.selector.close()
            for one in self._sockets:
                one.close()
        self._pipe.send("stopped")
        return True

    def connect(self, read: Callable[[], None]) -> socket.socket:
        """Opens a connection; ``read`` is called when it has data."""
        host, _, port = self.load.address.rpartition(":")
        found = socket.create_connection((host, int(port)), timeout=30)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(found, selectors.EVENT_READ, read)
        self._sockets.append(found)
        return found

    def first(self, sent: float) -> float:
        """Notes the first token of a request that was sent at ``sent``, and returns its time."""
        now = time.perf_counter()
        self.counts.begun += 1
        self.counts.ttft.append(now - sent)
        return now

    def events(self, previous: float, count: int) -> float:
        """Notes ``count`` events with tokens that arrive now, after one at ``previous``, and returns the time."""
        now = time.perf_counter()
        self.counts.gaps += (now - previous, *[0.0] * (count - 1))
        return now

    def ended(self, tokens: int, connection: _HttpConnection | None = None) -> None:
        """Notes the end of an answer, and starts the next request of a closed loop."""
        if tokens == self.load.tokens:
            self.counts.ended += 1
        else:
            self.counts.failed += 1
        if connection is not None:
            self._idle.append(connection)
        if self.load.rate is None:
            self._begin()

    def _begin(self) -> None:
        if self._grpc is not None:
            self._grpc.begin()
        else:
            (self._idle.pop() if self._idle else _HttpConnection(self)).begin()

    def _obey(self) -> None:
        command = self._pipe.recv()
        if command == "counts":
            self.counts.cpu = [time.process_time()]
            self._pipe.send(self.counts)
            self.counts.ttft.clear()
            self.counts.gaps.clear()
        else:
            self._stopped = True


class _HttpConnection:
    """A connection with one request at a time. It finds the tokens of an event by the name before their text."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        self._socket = client.connect(self._read)
        self._sent = self._last = 0.0
        self._find_tokens = _TOKENS[client.load.api].findall
        self._tokens = 0
        self._rest = b""  # of an event that has not arrived as a whole
        self._tail = b""

    def begin(self) -> None:
        self._sent, self._tokens, self._rest, self._tail = time.perf_counter(), 0, b"", b""
        self._socket.sendall(next(self._client.requests))

    def _read(self) -> None:
        data = self._socket.recv(1 << 18)
        counts = self._client.counts
        whole, _, self._rest = (self._rest + data).rpartition(b"\n\n")
        if found := self._find_tokens(whole):
            events, tokens = len(found), sum(map(len, found))
            if self._tokens:
                self._last = self._client.events(self._last, events)
            else:
                self._last = self._client.first(self._sent)
            self._tokens += tokens
            counts.tokens += tokens
            counts.events += events
        self._tail = (self._tail + data)[-5:]
        if self._tail == b"0\r\n\r\n":
            self._client.ended(self._tokens, self)
        elif not data or (not self._tokens and data.startswith(b"HTTP/1.1 ") and data[9:12] != b"200"):
            # The server refused the request or closed the connection; the next request takes a new connection.
            self._client.selector.unregister(self._socket)
            self._socket.close()
            self._client.ended(self._tokens)


_FRAME = struct.Struct(">HBBBI")
"""Length in 16 + 8 bits, type, flags, stream."""

_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_LARGEST_WINDOW = (1 << 31) - 1
_GRANT = 1 << 24
"""Received bytes after which the connection's window is opened again."""


class _GrpcConnection:
    """As much HTTP/2 as a gRPC client needs to start streams and to count their messages."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        self._socket = client.connect(self._read)
        self._received = b""
        self._unacknowledged = 0
        self._send_window = 65_535
        self._waiting: deque[tuple[int, bytes]] = deque()  # bytes of the message, and the frames of the request
        self._streams: dict[int, list[Any]] = {}  # id -> [time of the request or last event, tokens, rest of a message]
        self._next_id = 1
        authority = client.load.address.encode()
        # HPACK without compression: indexed fields, then literals that are not indexed.
        self._head = b"".join(
            [
                b"\x83\x86",  # :method POST, :scheme http
                b"\x04" + bytes([len(GRPC_PATH)]) + GRPC_PATH,
                b"\x01" + bytes([len(authority)]) + authority,
                b"\x0f\x10\x10application/grpc",  # content-type
                b"\x00\x02te\x08trailers",
            ]
        )
        settings = struct.pack(">HIHI", 4, _LARGEST_WINDOW, 5, 1 << 20)  # window of a stream, size of a frame
        self._socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_WINDOW, 0, 0, struct.pack(">I", _LARGEST_WINDOW - 65_535))
        )

    def begin(self) -> None:
        stream = self._next_id
        self._next_id += 2
        self._streams[stream] = [time.perf_counter(), 0, b""]
        message = next(self._client.requests)
        message = b"\0" + struct.pack(">I", len(message)) + message
        head = _frame(_HEADERS, _END_HEADERS, stream, self._head)
        self._waiting.append((len(message), head + _frame(_DATA, _END_STREAM, stream, message)))
        self._send()

    def _send(self) -> None:
        while self._waiting and self._send_window >= self._waiting[0][0]:
            size, frames = self._waiting.popleft()
            self._send_window -= size
            self._socket.sendall(frames)

    def _read(self) -> None:
        data = self._socket.recv(1 << 18)
        if not data:
            raise ConnectionResetError("the server closed a gRPC connection")
        received, at = self._received + data, 0
        while len(received) - at >= 9:
            high, low, kind, flags, stream = _FRAME.unpack_from(received, at)
            end = at + 9 + (high << 8 | low)
            if len(received) < end:
                break
            self._take(kind, flags, stream, received[at + 9 : end])
            at = end
        self._received = received[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            self._unacknowledged += len(payload)
            if self._unacknowledged > _GRANT:
                self._socket.sendall(_frame(_WINDOW, 0, 0, struct.pack(">I", self._unacknowledged)))
                self._unacknowledged = 0
            self._messages(self._streams[stream], payload)
        elif kind == _SETTINGS and not flags & _ACK:
            self._socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._socket.sendall(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW and stream == 0:
            self._send_window += struct.unpack(">I", payload)[0]
            self._send()
        if (kind == _RST or (kind in (_DATA, _HEADERS) and flags & _END_STREAM)) and stream in self._streams:
            self._client.ended(self._streams.pop(stream)[1])

    def _messages(self, state: list[Any], payload: bytes) -> None:
        rest = state[2] + payload
        while len(rest) >= 5 and len(rest) >= (end := 5 + int.from_bytes(rest[1:5], "big")):
            response = inference_pb2.GenerateResponse.FromString(rest[5:end])
            tokens = len(response.delta.token_ids) + len(response.finished.rest.token_ids)
            rest = rest[end:]
            if tokens:
                state[0] = self._client.events(state[0], 1) if state[1] else self._client.first(state[0])
                state[1] += tokens
                self._client.counts.events += 1
                self._client.counts.tokens += tokens
        state[2] = rest


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _FRAME.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload
