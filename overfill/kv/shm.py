"""KV payloads through memory that a prefill and a decode worker on one host share, instead of sockets.

``ShmServer`` is the prefill worker's end, ``ShmClient`` the decode worker's; prefill.proto describes the messages at
``ShmOffer``. A link is a Unix socket and a segment of slots. The socket proves that both ends are on one host and run
as one user, and carries the segment's descriptor. When one end exits, the other sees the socket close at once. Neither
socket nor segment has a name in a file system, so no exit leaves anything behind.

A slot belongs to the server until the chunk in it is sent. It then belongs to the client until the client gives it back
or the client's socket closes. In between, neither end writes to the slot. The chunk's checksum covers the payload, as
it does on the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hmac
import logging
import mmap
import os
import secrets
import socket
import struct
import sys
from collections.abc import Callable, Sequence

from overfill.errors import TransferFailed, Unavailable
from overfill.kv.sender import Slot
from overfill.rpc.constants import MAX_SHARED_PAYLOAD
from overfill.v1 import kv_pb2, prefill_pb2

logger = logging.getLogger(__name__)

SUPPORTED = sys.platform == "linux"
"""Whether this system has abstract Unix sockets and anonymous memory files."""

SLOTS = 8
"""Slots of 8 MiB per link: enough for two streams while both ends work on a message's chunks."""

_TOKEN_BYTES = _ID_BYTES = 16
_GRANT = struct.Struct("<16sII")
_RETURN = struct.Struct("<BI")
_SLOT, _STREAM = 0, 1
_PEER_CREDENTIALS = struct.Struct("3i")
_TIMEOUT = 2.0  # seconds for the handshake on the socket
_ACCEPT_RETRY_DELAY = 0.1  # seconds


class ShmStream:
    """The slots of one PullKv stream; a ``Slots`` of ``kv.sender``.

    Attributes:
        held: slots that are in use. If the stream ends early, they stay in use until both ends are done with them.
    """

    def __init__(self, link: ShmLink, number: int) -> None:
        self._link = link
        self.number = number
        self.held: set[int] = set()
        self.writing = self.reading = True

    @property
    def free(self) -> bool:
        return bool(self._link.free)

    async def acquire(self) -> Slot:
        """Waits for a free slot. Raises Unavailable if the client has gone."""
        number = await self._link.take()
        self.held.add(number)
        return Slot(number, self._link.memory[number * MAX_SHARED_PAYLOAD :][:MAX_SHARED_PAYLOAD])

    def writes_finished(self) -> None:
        """Records that this end writes nothing more to the stream's slots."""
        self.writing = False
        self._link.settle(self)


class ShmLink:
    """The server's end of a link to one client: its segment and the state of its slots.

    Attributes:
        descriptor: file descriptor of the segment, for the client. The caller closes it after it is sent.
    """

    def __init__(self) -> None:
        self.id = secrets.token_bytes(_ID_BYTES)
        descriptor = os.memfd_create("overfill-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(descriptor, 0o600)  # other users cannot open it through /proc
            os.ftruncate(descriptor, SLOTS * MAX_SHARED_PAYLOAD)
            # If the segment shrank, access to it would kill both processes with SIGBUS.
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.memory = memoryview(mmap.mmap(descriptor, SLOTS * MAX_SHARED_PAYLOAD))
            # The client's descriptor is read-only, so that it cannot write by accident.
            self.descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(descriptor)
        self.free = list(range(SLOTS))  # a stack: the slot used last is still in the CPU's caches
        self.closed = False
        self._streams: dict[int, ShmStream] = {}
        self._ended: set[int] = set()  # streams that the client ended before they were opened here
        self._changed = asyncio.Event()

    def stream(self, number: int) -> ShmStream:
        """Opens a stream. The caller calls ``writes_finished`` at its end.

        Raises:
            Unavailable: the link or the stream is closed.
        """
        if self.closed or number in self._streams or number in self._ended:
            self._ended.discard(number)
            raise Unavailable("the link of shared memory or the stream is closed")
        self._streams[number] = ShmStream(self, number)
        return self._streams[number]

    async def take(self) -> int:
        """Waits for a free slot and takes it. Raises Unavailable if the client has gone."""
        while not self.free and not self.closed:
            self._changed.clear()
            await self._changed.wait()
        if self.closed:
            raise Unavailable("the decode worker has closed its link of shared memory")
        return self.free.pop()

    def returned(self, kind: int, number: int) -> None:
        """Handles the client's return of a slot or of a whole stream. Raises ValueError if it has no such slot."""
        if kind == _STREAM:
            stream = self._streams.get(number)
            if stream is None:
                self._ended.add(number)
            else:
                stream.reading = False
                self.settle(stream)
        else:
            holder = next((s for s in self._streams.values() if number in s.held), None)
            if kind != _SLOT or holder is None:
                raise ValueError(f"the client gave back slot {number}, which it does not hold")
            holder.held.discard(number)
            self.free.append(number)
        self._changed.set()

    def settle(self, stream: ShmStream) -> None:
        """Frees the slots of ``stream`` if both ends are done with it."""
        if not stream.writing and not stream.reading:
            del self._streams[stream.number]
            self.free.extend(stream.held)
            self._changed.set()

    def close(self) -> None:
        """Stops handing out slots. The memory is freed after the last payload that is being written or read."""
        self.closed = True
        self._changed.set()


class ShmServer:
    """Shares memory with decode workers on this host.

    Attributes:
        offer: socket name and token for Describe. None means that this system cannot share memory, or not ``enabled``.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.offer: prefill_pb2.ShmOffer | None = None
        self._links: dict[bytes, ShmLink] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        if enabled and SUPPORTED:
            self.offer = prefill_pb2.ShmOffer(
                name=f"overfill-kv-{secrets.token_hex(16)}", token=secrets.token_bytes(_TOKEN_BYTES)
            )

    def start(self) -> None:
        """Starts to listen, on the running event loop."""
        if self.offer is not None:
            self._listener = _new_socket()
            self._listener.bind(f"\0{self.offer.name}")
            self._listener.listen()
            self._spawn(self._accept(self._listener))

    def link(self, id: bytes) -> ShmLink:
        """The link with that id. Raises Unavailable if it does not exist or has closed."""
        if id not in self._links:
            raise Unavailable("no such link of shared memory: payloads must travel")
        return self._links[id]

    async def stop(self) -> None:
        """Stops to listen and closes all links."""
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                peer, _ = await loop.sock_accept(listener)
            except OSError as error:  # too many open files: clients wait in the socket's queue
                logger.warning("cannot accept a link of shared memory yet; the decode worker waits: %s", error)
                await asyncio.sleep(_ACCEPT_RETRY_DELAY)
                continue
            self._spawn(self._serve(peer))

    async def _serve(self, peer: socket.socket) -> None:
        """Serves one client until its socket closes."""
        with peer:
            try:
                async with asyncio.timeout(_TIMEOUT):
                    if not await self._trusted(peer):
                        return
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                return
            try:
                link = ShmLink()
            except OSError as error:  # no memory, too many open files: the client sees the socket close
                logger.warning("cannot share memory with a decode worker, so payloads travel: %s", error)
                return
            self._links[link.id] = link
            try:
                try:
                    socket.send_fds(peer, [_GRANT.pack(link.id, SLOTS, MAX_SHARED_PAYLOAD)], [link.descriptor])
                finally:
                    os.close(link.descriptor)
                rest = b""
                while words := await asyncio.get_running_loop().sock_recv(peer, 4096):
                    rest += words
                    whole = len(rest) - len(rest) % _RETURN.size
                    for kind, number in _RETURN.iter_unpack(rest[:whole]):
                        link.returned(kind, number)
                    rest = rest[whole:]
            except OSError:
                pass  # the client has gone
            except ValueError as error:
                logger.warning("closing a link of shared memory: %s", error)
            finally:
                del self._links[link.id]
                link.close()

    async def _trusted(self, peer: socket.socket) -> bool:
        """Whether the client runs as this user and has the token."""
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        _, user, _ = _PEER_CREDENTIALS.unpack(credentials)
        token = await _receive(peer, _TOKEN_BYTES)
        assert self.offer is not None
        return user == os.getuid() and hmac.compare_digest(token, self.offer.token)


class ShmClient:
    """The client's end of a link. Made by ``connect``.

    Attributes:
        id: the link's id in PullKv.
        alive: False once the link has closed.
    """

    def __init__(self, sock: socket.socket, descriptor: int, id: bytes, slots: int) -> None:
        self.id = id
        self._socket = sock
        self._slots = slots
        try:
            mapped = mmap.mmap(descriptor, slots * MAX_SHARED_PAYLOAD, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        self._memory = memoryview(mapped)
        self._streams = 0
        self.alive = True
        asyncio.get_running_loop().add_reader(sock, self.close)  # the server sends nothing more: readable means closed

    @classmethod
    async def connect(cls, offer: prefill_pb2.ShmOffer) -> ShmClient:
        """Connects to the server that made ``offer``.

        Raises:
            OSError, TimeoutError, ValueError: the server is on another host, or refuses to share memory.
        """
        if not SUPPORTED:
            raise OSError("this system cannot share memory")
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(_new_socket())
            async with asyncio.timeout(_TIMEOUT):
                await loop.sock_connect(sock, f"\0{offer.name}")
                await loop.sock_sendall(sock, offer.token)
                await _readable(sock)
            data, descriptors, _, _ = socket.recv_fds(sock, _GRANT.size, 1)
            if len(data) != _GRANT.size or len(descriptors) != 1:
                for descriptor in descriptors:
                    os.close(descriptor)
                raise ValueError("the prefill worker closed the link")
            id, slots, size = _GRANT.unpack(data)
            if size != MAX_SHARED_PAYLOAD:
                os.close(descriptors[0])
                raise ValueError(f"the prefill worker's slots have {size} bytes, expected {MAX_SHARED_PAYLOAD}")
            client = cls(sock, descriptors[0], id, slots)
            stack.pop_all()
        return client

    def new_stream(self) -> int:
        """A new number for a PullKv stream."""
        self._streams += 1
        return self._streams

    def payload(self, shared: kv_pb2.SharedPayload) -> memoryview:
        """View of the payload. Raises TransferFailed if there is no such slot or it is too small."""
        if shared.slot >= self._slots or shared.length > MAX_SHARED_PAYLOAD:
            raise TransferFailed(
                f"a chunk names slot {shared.slot} and {shared.length} bytes, which the shared memory does not have"
            )
        start = shared.slot * MAX_SHARED_PAYLOAD
        return self._memory[start : start + shared.length]

    def give_back(self, slots: Sequence[int]) -> None:
        """Gives back slots whose payloads have been read."""
        if slots:
            self._send(b"".join(_RETURN.pack(_SLOT, slot) for slot in slots))

    def end_stream(self, stream: int) -> None:
        """Gives back all slots of the stream, which has ended."""
        self._send(_RETURN.pack(_STREAM, stream))

    def close(self) -> None:
        """Closes the link. Idempotent. Payloads that are being read stay readable."""
        if self.alive:
            self.alive = False
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    def _send(self, words: bytes) -> None:
        if self.alive:
            try:
                sent = self._socket.send(words)
            except OSError:
                sent = 0
            if sent != len(words):  # the server has gone, or has been frozen for long
                logger.warning("a link of shared memory is lost: payloads travel until the worker reconnects")
                self.close()


def _new_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


async def _receive(sock: socket.socket, size: int) -> bytes:
    """Receives exactly ``size`` bytes. Raises asyncio.IncompleteReadError at the end of the stream."""
    data = b""
    while len(data) < size:
        received = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not received:
            raise asyncio.IncompleteReadError(data, size)
        data += received
    return data


async def _readable(sock: socket.socket) -> None:
    """Waits until ``sock`` is readable."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    settle: Callable[[], None] = lambda: None if ready.done() else ready.set_result(None)  # noqa: E731
    loop.add_reader(sock, settle)
    try:
        await ready
    finally:
        loop.remove_reader(sock)
