"""HTTP listener for the probes of Kubernetes: ``/livez``, ``/readyz``, ``/startupz``, on a port and thread of its own.

It answers while the event loop is busy, and while no other port of the process accepts connections. Probes need no
client certificate, because the kubelet shows none.
"""

from __future__ import annotations

import asyncio
import logging
import re
import selectors
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

from overfill.errors import Unavailable
from overfill.rpc.addresses import socket_host
from overfill.rpc.tls import ServerTls

logger = logging.getLogger(__name__)

HANG_SECONDS = 30.0
"""Seconds for which the event loop may not run before ``/livez`` and ``/readyz`` fail."""

BEAT_SECONDS = 1.0
"""Seconds between two notes of the event loop that it runs."""

MAX_CONNECTIONS = 32
"""Maximum open connections. For a further one, the listener drops one of the address that has most of them."""

CONNECTION_SECONDS = 2.0
"""Seconds for a whole connection: TLS handshake, head and answer."""

MAX_HEAD = 4 << 10
"""Maximum size of a request's head in bytes."""

_BACKLOG = 4096  # connections that the kernel accepts for the thread meanwhile; the kernel lowers it to its own maximum
_BATCH = 128  # connections that the thread accepts before it serves the open ones again
_PAUSE = 0.05  # seconds before the thread tries again to accept where the process may open no further file

_REQUEST = re.compile(rb"(\S+) (/[^\s?]*)(?:\?\S*)? HTTP/1\.[01]\r\n")
_STATUS = {
    200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed",
    431: "Request Header Fields Too Large", 503: "Service Unavailable",
}  # fmt: skip


class ProcessState:
    """The state of a process that probes ask for. The event loop writes it, and any thread may read it.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._unready = ""
        self._ran: float | None = None  # when the event loop ran last; None while the process starts

    def beat(self, unready: str) -> None:
        """Notes that the process has started, that the event loop runs, and why the process is not ready, if so."""
        self._unready = unready
        self._ran = self._clock()

    def fault(self, probe: str) -> str:
        """Returns why ``probe`` fails; empty if it succeeds. While the process starts, it counts as alive.

        Args:
            probe: ``livez``, ``readyz`` or ``startupz``.
        """
        if self._ran is None:
            return "" if probe == "livez" else "the process is starting"
        silent = self._clock() - self._ran
        if probe != "startupz" and silent > HANG_SECONDS:
            return f"the event loop has not run for {silent:.0f} s"
        return self._unready if probe == "readyz" else ""


def respond(head: bytes, state: ProcessState) -> bytes:
    """Returns the response to a request with this ``head``, of which at least ``MAX_HEAD`` bytes or all are there."""
    request = _REQUEST.match(head)
    method, path = request.groups() if request else (b"", b"")
    probe = path.removeprefix(b"/").decode("latin-1")
    if b"\r\n\r\n" not in head[:MAX_HEAD]:
        status, text = 431, f"a head has at most {MAX_HEAD} bytes"
    elif request is None:
        status, text = 400, "expected a request of HTTP/1.1"
    elif probe not in ("livez", "readyz", "startupz"):
        status, text = 404, "not found; this port serves /livez, /readyz and /startupz"
    elif method not in (b"GET", b"HEAD"):
        status, text = 405, "a probe is GET or HEAD"
    else:
        fault = state.fault(probe)
        status, text = (503, fault) if fault else (200, "ok")
    body = f"{text}\n".encode()
    lines = [f"HTTP/1.1 {status} {_STATUS[status]}", "Content-Type: text/plain; charset=utf-8"]
    lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + (b"" if method == b"HEAD" else body)


class ProbeConnection:
    """One connection of a client.

    Attributes:
        host: the client's address.
        heard: True once the client has sent something.
        deadline: time at which the connection ends, on the clock ``time.monotonic``.
    """

    def __init__(self, connection: socket.socket, host: str) -> None:
        self._socket = connection
        self._head = b""
        self.host = host
        self.heard = False
        self.deadline = time.monotonic() + CONNECTION_SECONDS

    def fileno(self) -> int:
        return self._socket.fileno()

    def advance(self, state: ProcessState) -> bool:
        """Reads what has arrived, and answers a whole head. Returns True when the connection is over; never waits."""
        self.heard = True
        try:
            while b"\r\n\r\n" not in self._head and len(self._head) < MAX_HEAD:
                if not (data := self._socket.recv(MAX_HEAD)):  # with TLS, the first reads make the handshake
                    return True
                self._head += data
            self._socket.send(respond(self._head, state))  # the kernel's buffer has room for it
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:  # includes ssl.SSLError
            pass
        return True

    def close(self) -> None:
        self._socket.close()


def dropped(connections: Sequence[ProbeConnection]) -> ProbeConnection:
    """Returns the one of ``connections``, oldest first, that is dropped for a new one.

    It is of the address with most connections, so that no neighbour ends a probe of the kubelet. Of these, it is the
    oldest that has sent nothing, or else the oldest.
    """
    held = Counter(one.host for one in connections)
    return max(connections, key=lambda one: (held[one.host], not one.heard))


class ProbeServer:
    """Serves probes from construction until the process ends. ``follow`` ends its start.

    Args:
        host, port: address to listen on; port 0 picks a free one, which the log names.
        tls: certificate and key; None serves without TLS.

    Raises:
        Unavailable: the address is in use, or does not belong to this machine.
        TlsError: a TLS file cannot be read.
    """

    def __init__(self, host: str, port: int, tls: ServerTls | None) -> None:
        bare, family = socket_host(host)
        self._contexts = None if tls is None else tls.contexts(client_certificates=False)
        try:
            self._listener = socket.create_server(
                (bare, port), family=family, backlog=_BACKLOG, dualstack_ipv6=family == socket.AF_INET6
            )
        except OSError as error:
            raise Unavailable(f"cannot serve probes on {host}:{port}: {error.strerror}") from error
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._connections: list[ProbeConnection] = []  # oldest first
        self._state = ProcessState()
        self._beating: asyncio.Task[None] | None = None
        threading.Thread(target=self._serve, name="probes", daemon=True).start()
        logger.info("serves probes on %s:%d", host, self._listener.getsockname()[1])

    def follow(self, unready: Callable[[], str]) -> None:
        """Tells probes that the process has started, and from now on what this event loop says of it.

        Args:
            unready: returns why the process is not ready, or nothing; called on this event loop.
        """

        async def beat() -> None:
            while True:
                self._state.beat(unready())
                await asyncio.sleep(BEAT_SECONDS)

        self._beating = asyncio.create_task(beat())

    def _serve(self) -> None:
        while True:
            first = self._connections[0].deadline - time.monotonic() if self._connections else None
            for key, _ in self._selector.select(first):
                if isinstance(key.fileobj, ProbeConnection) and key.fileobj.advance(self._state):
                    self._end(key.fileobj)
            while self._connections and self._connections[0].deadline <= time.monotonic():
                self._end(self._connections[0])
            self._accept()

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                plain, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:
                time.sleep(_PAUSE)
                return
            with suppress(OSError):  # the client has disconnected
                plain.setblocking(False)
                self._add(plain, address[0])

    def _add(self, plain: socket.socket, host: str) -> None:
        if self._contexts is not None:
            plain = self._contexts.value.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        connection = ProbeConnection(plain, host)
        if len(self._connections) >= MAX_CONNECTIONS:
            self._end(dropped(self._connections))
        self._connections.append(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _end(self, connection: ProbeConnection) -> None:
        self._selector.unregister(connection)
        self._connections.remove(connection)
        connection.close()
