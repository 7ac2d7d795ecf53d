"""A worker's links to its ranks: one Unix socket for each, with commands, answers by number, and pings.

A thread of its own reads, writes and pings. So it notices a lost rank while the event loop and the engine are busy.
"""

from __future__ import annotations

import hmac
import itertools
import logging
import os
import secrets
import selectors
import signal
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from overfill.engine.vllm.ranks.messages import (
    NO_COMMAND,
    TOKEN_BYTES,
    BrokenLink,
    Cancel,
    Done,
    Failed,
    MessageDecoder,
    Ping,
    RankHello,
    encode,
)
from overfill.errors import Unavailable
from overfill.kv.ranks import Moved, RankLost
from overfill.rpc.status import from_bytes

log = logging.getLogger(__name__)

SILENCE = 15.0
"""Seconds without an answer to a ping after which a rank is lost."""

_PING_INTERVAL = 3.0  # seconds
_TICK = 0.5  # seconds between looks at the clock
_HANDSHAKE = 10.0  # seconds for a new connection to send its token and its first message
_MAX_UNSENT = 256 << 20  # bytes that a rank may leave unread before it is lost
_RECEIVE = 1 << 18  # bytes
_PEER_CREDENTIALS = struct.Struct("3i")

OnMoved = Callable[[Moved], None]


@dataclass(frozen=True, slots=True)
class Sent:
    """A command that one rank executes. ``future`` gets its value or its error."""

    rank: int
    number: int
    future: Future[Any]


@dataclass(slots=True)
class _Call:
    future: Future[Any]
    on_moved: OnMoved


@dataclass(slots=True, eq=False)
class _Peer:
    """A connection: to any process of this user before its ``hello``, to a rank afterwards.

    Attributes:
        token: what has arrived of the token.
        unsent: messages that the socket has not taken yet; of the first one, the rest.
        num_unsent: bytes of these.
        sending: whether ``_flush`` runs.
        silent: seconds without a byte since ``pinged`` became true, as far as the links' thread was running.
        calls: commands without an answer, by number.
        lost: whether the link has ended.
    """

    sock: socket.socket
    connected_at: float
    token: bytes = b""
    hello: RankHello | None = None
    decoder: MessageDecoder = field(default_factory=MessageDecoder)
    unsent: deque[memoryview] = field(default_factory=deque)
    num_unsent: int = 0
    sending: bool = False
    pinged: bool = False
    pinged_at: float = 0.0
    silent: float = 0.0
    calls: dict[int, _Call] = field(default_factory=dict)
    lost: bool = False


class RankLinks:
    """Links to ``num_ranks`` processes, which connect by themselves. Every method may be called from any thread.

    Args:
        on_lost: called once for each rank that has closed its link or does not answer, with the reason. The links'
            thread calls it, after the rank's commands have failed.
        silence: seconds without an answer to a ping after which a rank is killed, and lost.

    Attributes:
        config: what a rank needs to connect. It goes to vLLM as a part of ``kv_connector_extra_config``.
    """

    def __init__(self, num_ranks: int, on_lost: Callable[[int, str], None], silence: float = SILENCE) -> None:
        self._num_ranks = num_ranks
        self._on_lost = on_lost
        self._silence = silence
        self._token = secrets.token_bytes(TOKEN_BYTES)
        name = f"overfill-ranks-{secrets.token_hex(16)}"
        self.config: Mapping[str, str] = {"link": name, "link_token": self._token.hex()}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"\0{name}")
        self._listener.listen(num_ranks)
        self._listener.setblocking(False)
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._changed = threading.Condition()  # guards everything below, and what ``_Peer`` has to send
        self._peers: set[_Peer] = set()
        self._ranks: dict[int, _Peer] = {}
        self._reason = ""  # why the first lost rank was lost
        self._numbers = itertools.count(NO_COMMAND + 1)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="rank-links", daemon=True)
        self._thread.start()

    def wait(self, timeout: float) -> list[RankHello]:
        """Waits until every rank has connected, and returns what they say of themselves, by rank.

        Raises:
            Unavailable: a rank is lost, or has not connected within ``timeout`` seconds.
            OverfillError: the error that a rank reports of itself.
        """
        with self._changed:
            self._changed.wait_for(self._settled, timeout)
            hellos = [peer.hello for _, peer in sorted(self._ranks.items()) if peer.hello is not None]
            for hello in hellos:
                if hello.error:
                    raise from_bytes(hello.error, f"rank {hello.rank}")
            if self._reason:
                raise Unavailable(self._reason)
            if len(hellos) < self._num_ranks:
                missing = sorted({*range(self._num_ranks)} - self._ranks.keys())
                raise Unavailable(f"ranks {missing} have not connected within {timeout:g} s")
            return hellos

    def call(self, ranks: Sequence[int], command: object, on_moved: OnMoved = lambda moved: None) -> list[Sent]:
        """Sends a command to ``ranks``. It is encoded once.

        Args:
            on_moved: called with every ``Moved`` of a ``Pull``, on the links' thread and before the answer.

        Returns:
            The command at each rank. Its future raises the rank's error, or RankLost.
        """
        number = next(self._numbers)
        data, sent = encode(number, command), []
        for rank in ranks:
            future: Future[Any] = Future()
            future.set_running_or_notify_cancel()  # the answer comes in any case
            with self._changed:
                peer = self._ranks.get(rank)
                if peer is None or peer.lost:
                    future.set_exception(RankLost(self._reason or f"rank {rank} has no link"))
                else:
                    peer.calls[number] = _Call(future, on_moved)
                    self._send(peer, data)
                    if peer.unsent:
                        self._wake()
            sent.append(Sent(rank, number, future))
        return sent

    def cancel(self, sent: Sent) -> None:
        """Cancels a command. Its future ends, usually with RequestCancelled, once nothing of it runs any more."""
        with self._changed:
            peer = self._ranks.get(sent.rank)
            if peer is not None and not peer.lost:
                self._send(peer, encode(NO_COMMAND, Cancel(sent.number)))
                if peer.unsent:
                    self._wake()

    def close(self) -> None:
        """Closes the links and joins their thread. Commands without an answer fail, but no rank counts as lost."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _settled(self) -> bool:
        hellos = [peer.hello for peer in self._ranks.values() if peer.hello is not None]
        return len(hellos) == self._num_ranks or bool(self._reason) or any(hello.error for hello in hellos)

    def _send(self, peer: _Peer, data: bytes) -> None:
        """Sends now what the socket takes, and the rest later, in this order. Holds the lock."""
        peer.unsent.append(memoryview(data))
        peer.num_unsent += len(data)
        self._flush(peer)

    @staticmethod
    def _flush(peer: _Peer) -> None:
        """Sends what the socket takes. Holds the lock.

        The garbage collector may run here and drop a processor, which sends a ``Forget`` within this call. The outer
        call sends it then.
        """
        if peer.sending:
            return
        peer.sending = True
        try:
            while peer.unsent:
                first = peer.unsent[0]
                taken = peer.sock.send(first)
                peer.num_unsent -= taken
                if taken < len(first):
                    peer.unsent[0] = first[taken:]
                else:
                    peer.unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:  # the links' thread sees the end of the stream
            peer.unsent.clear()
            peer.num_unsent = 0
        finally:
            peer.sending = False

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it has been woken already
            self._waker.send(b"\0")

    # The links' thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        last = time.monotonic()
        while not self._closed:
            for key, _ in self._selector.select(_TICK):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._woken:
                    self._woken.recv(_RECEIVE)
                elif key.data in self._peers:
                    self._serve(key.data)
            if len(self._ranks) == self._num_ranks and self._listener.fileno() >= 0:
                self._selector.unregister(self._listener)  # no other process may connect
                self._listener.close()
            now = time.monotonic()
            # Time in which this thread did not run, as when the whole worker was stopped, does not count as silence.
            self._look_at_clock(now, min(now - last, 2 * _TICK))
            last = now
            self._look_at_unsent()
        for peer in list(self._peers):
            self._drop(peer, "the worker has closed the link")
        for end in (self._listener, self._waker, self._woken, self._selector):
            end.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # too many open files: the rank waits in the socket's queue
            log.warning("cannot accept a rank's link yet: %s", error)
            time.sleep(_TICK)
            return
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        if _PEER_CREDENTIALS.unpack(credentials)[1] != os.getuid():
            sock.close()
            return
        sock.setblocking(False)
        peer = _Peer(sock, time.monotonic())
        self._peers.add(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)

    def _serve(self, peer: _Peer) -> None:
        """Reads from a socket that is ready, and ends what it cannot read."""
        try:
            data = peer.sock.recv(_RECEIVE)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(peer, f"its link broke: {error}")
            return
        if not data:
            self._end(peer, "it has closed its link, as it does when it ends")
            return
        peer.silent = 0.0
        if len(peer.token) < TOKEN_BYTES:
            missing = TOKEN_BYTES - len(peer.token)
            peer.token, data = peer.token + data[:missing], data[missing:]
            if len(peer.token) < TOKEN_BYTES:
                return
            if not hmac.compare_digest(peer.token, self._token):
                self._end(peer, "wrong token")
                return
        try:
            for number, body in peer.decoder.feed(data):
                self._take(peer, number, body)
        except BrokenLink as error:
            self._end(peer, str(error))
        except Exception as error:
            log.exception("a rank's message cannot be handled")
            self._end(peer, f"its message cannot be handled: {error}")

    def _take(self, peer: _Peer, number: int, body: object) -> None:
        if peer.hello is None:
            if not isinstance(body, RankHello) or not 0 <= body.rank < self._num_ranks or body.rank in self._ranks:
                raise BrokenLink("the first message does not introduce a rank that is missing")
            with self._changed:
                peer.hello = body
                self._ranks[body.rank] = peer
                self._changed.notify_all()
            return
        if number == NO_COMMAND:
            peer.pinged = False
            return
        with self._changed:
            call = peer.calls.get(number)
            if call is None or not isinstance(body, Moved | Done | Failed):
                raise BrokenLink(f"{type(body).__name__} answers command {number}, which does not await it")
            if not isinstance(body, Moved):
                del peer.calls[number]
        match body:
            case Moved():
                call.on_moved(body)
            case Done(value):
                call.future.set_result(value)
            case Failed(error):
                call.future.set_exception(from_bytes(error))

    def _look_at_clock(self, now: float, elapsed: float) -> None:
        """Sends pings, and gives up silent ranks and strangers."""
        for peer in list(self._peers):
            if peer.hello is None:
                if now - peer.connected_at > _HANDSHAKE:
                    self._end(peer, "no introduction")
            elif not peer.pinged:
                if now - peer.pinged_at >= _PING_INTERVAL:
                    peer.pinged, peer.pinged_at, peer.silent = True, now, 0.0
                    with self._changed:
                        self._send(peer, _PING)
            else:
                peer.silent += elapsed
                if peer.silent >= self._silence:
                    # While vLLM loads, it waits for the process, and learns of the loss by its end.
                    with suppress(ProcessLookupError):
                        os.kill(peer.hello.pid, signal.SIGKILL)
                    self._end(peer, f"it has not answered for {self._silence:g} s")

    def _look_at_unsent(self) -> None:
        """Sends what was left, and watches the sockets that take no more of it."""
        for peer in list(self._peers):
            with self._changed:
                self._flush(peer)
                unsent = peer.num_unsent
            if unsent > _MAX_UNSENT:
                self._end(peer, f"it has left {unsent} bytes of commands unread")
                continue
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if unsent else 0)
            if self._selector.get_key(peer.sock).events != events:
                self._selector.modify(peer.sock, events, peer)

    def _end(self, peer: _Peer, reason: str) -> None:
        """Ends a link. If it was a rank's, the rank is lost."""
        if peer.hello is None:
            log.warning("closed a connection to the ranks' link: %s", reason)
            self._drop(peer, reason)
            return
        lost = f"rank {peer.hello.rank} (process {peer.hello.pid}) is lost: {reason}"
        with self._changed:
            self._reason = self._reason or lost
        self._drop(peer, lost)
        with self._changed:
            self._changed.notify_all()
        if not self._closed:
            self._on_lost(peer.hello.rank, lost)

    def _drop(self, peer: _Peer, reason: str) -> None:
        self._selector.unregister(peer.sock)
        self._peers.discard(peer)
        with self._changed:
            calls, peer.calls, peer.lost = peer.calls, {}, True
            peer.sock.close()
        for call in calls.values():
            call.future.set_exception(RankLost(reason))


_PING = encode(NO_COMMAND, Ping())
