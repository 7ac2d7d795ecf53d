"""A process's end of the socket between it and a trial: reports requests, holds them, and damages KV.

Each packet is one JSON object. The probe sends:

* ``{"name", "stages"}`` once;
* ``{"at", "request", "breakpoint"}`` when a request enters a phase; ``breakpoint`` is null unless the request is held.

The trial sends:

* ``{"breakpoint", "phase", "hold"}``: hold the next request that enters ``phase``, for at most ``hold`` seconds;
* ``{"release": breakpoint}``: release the request that is held; ``{"remove": breakpoint}``: hold no request;
* ``{"corrupt": n}``: flip one bit in each of the next n KV chunks, of each rank. A chunk that this process sends is
  changed after its checksum was computed, a chunk that it receives before the checksum is compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any

_POLL = 0.002  # seconds between checks whether a held request was released


class _Breakpoint:
    def __init__(self, id: int, hold: float) -> None:
        self.id = id
        self.hold = hold
        self.until = 0.0
        self.released = False

    @property
    def holds(self) -> bool:
        return not self.released and time.monotonic() < self.until


class Probe:
    """This process's end of the socket. Thread-safe.

    Args:
        stages: the stages of the process.
    """

    def __init__(self, path: str, name: str, stages: Iterable[str]) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(path)
        self._lock = threading.Lock()
        self._breakpoints: dict[str, list[_Breakpoint]] = {}
        self._held: dict[int, _Breakpoint] = {}
        self._corrupt = 0
        self._rng = random.Random(name)
        self._tell({"name": name, "stages": [*stages]})
        self._listening = threading.Thread(target=self._listen, name="probe", daemon=True)
        self._listening.start()

    def close(self) -> None:
        """Disconnects from the trial."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._listening.join()
        self._socket.close()

    def reached(self, phase: str, request: str, *, quiet: bool = False) -> _Breakpoint | None:
        """Notes that a request is in ``phase``, and returns the breakpoint that holds it, if any.

        Reports to the trial, unless ``quiet`` is set and no breakpoint holds the request.
        """
        with self._lock:
            breakpoints = self._breakpoints.get(phase)
            breakpoint = breakpoints.pop(0) if breakpoints else None
            if breakpoint is not None:
                breakpoint.until = time.monotonic() + breakpoint.hold
                self._held[breakpoint.id] = breakpoint
        if breakpoint is not None or not quiet:
            self._tell({"at": phase, "request": request, "breakpoint": None if breakpoint is None else breakpoint.id})
        return breakpoint

    def waits_for(self, *phases: str) -> bool:
        """True while a request that enters one of ``phases`` is to be held."""
        with self._lock:
            return any(self._breakpoints.get(phase) for phase in phases)

    async def hold(self, phase: str, request: str, *, quiet: bool = False) -> None:
        """Calls ``reached``, and waits while a breakpoint holds the request."""
        breakpoint = self.reached(phase, request, quiet=quiet)
        while breakpoint is not None and breakpoint.holds:  # noqa: ASYNC110  # another thread releases it
            await asyncio.sleep(_POLL)

    def hold_thread(self, phase: str, request: str) -> None:
        """Does the same as ``hold`` outside of the event loop: blocks the calling thread."""
        breakpoint = self.reached(phase, request, quiet=True)
        while breakpoint is not None and breakpoint.holds:
            time.sleep(_POLL)

    def flip(self, size: int) -> tuple[int, int] | None:
        """Returns the byte to damage in a chunk of ``size`` bytes and the bit's mask. None means no damage."""
        with self._lock:
            if not self._corrupt or not size:
                return None
            self._corrupt -= 1
            return self._rng.randrange(size), 1 << self._rng.randrange(8)

    def _tell(self, packet: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the trial does not read, or has ended
            self._socket.send(json.dumps(packet).encode(), socket.MSG_DONTWAIT)

    def _listen(self) -> None:
        while packet := self._socket.recv(4096):
            order = json.loads(packet)
            with self._lock:
                if "breakpoint" in order:
                    self._breakpoints.setdefault(order["phase"], []).append(
                        _Breakpoint(order["breakpoint"], order["hold"])
                    )
                elif "remove" in order:
                    for breakpoints in self._breakpoints.values():
                        breakpoints[:] = [breakpoint for breakpoint in breakpoints if breakpoint.id != order["remove"]]
                elif "release" in order and (held := self._held.pop(order["release"], None)):
                    held.released = True
                elif "corrupt" in order:
                    self._corrupt = order["corrupt"]


def damage_sent(probe: Probe) -> None:
    """Damages chunks that this process sends, when the trial says so."""
    import overfill.kv.sender

    sender: Any = overfill.kv.sender
    join, read = sender.join_chunks, sender.KvSender._read_message

    def damage(chunks: Any) -> None:
        """Damages payloads behind their checksums: views into the message, into shared memory or of codes."""
        for chunk in chunks:
            if (flip := probe.flip(len(chunk.payload))) is not None:
                memoryview(chunk.payload)[flip[0]] ^= flip[1]

    def damage_and_join(chunks: Any) -> Any:
        damage(chunks)
        return join(chunks)

    def read_and_damage(self: Any, chunks: Any) -> Any:
        message = read(self, chunks)
        if self._raw and chunks[0].slot is None:  # the message was not joined
            damage(chunks)
        return message

    sender.join_chunks, sender.KvSender._read_message = damage_and_join, read_and_damage


def damage_received(probe: Probe) -> None:
    """Damages chunks that this process receives, when the trial says so."""
    import overfill.kv.puller

    puller: Any = overfill.kv.puller
    check = puller.check_head

    def damage_and_check(spec: Any, chunk: Any) -> Any:
        if (flip := probe.flip(len(chunk.payload))) is not None:
            damaged = bytearray(chunk.payload)
            damaged[flip[0]] ^= flip[1]
            chunk.payload = damaged
        return check(spec, chunk)

    puller.check_head = damage_and_check
