"""A process's end of the socket between it and a trial: reports requests and holds them.

Each packet is a line of JSON. The probe sends:

* ``{"name"}`` once;
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
from collections.abc import Iterator
from typing import Any, TypeVar

_POLL = 0.002  # seconds between checks whether a held request was released

K = TypeVar("K")
V = TypeVar("V")


class Recent(dict[K, V]):
    """A dictionary that forgets all but the last 10,000 keys."""

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        if len(self) > 10_000:
            del self[next(iter(self))]


class _Breakpoint:
    def __init__(self, id: int, phase: str, hold: float) -> None:
        self.id = id
        self.phase = phase
        self.hold = hold
        self.until: float | None = None  # None while no request has reached it

    @property
    def holds(self) -> bool:
        return self.until is not None and time.monotonic() < self.until


class Probe:
    """This process's end of the socket. Thread-safe."""

    def __init__(self, path: str, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._lock = threading.Lock()
        self._breakpoints: dict[int, _Breakpoint] = {}
        self._corrupt = 0
        self._rng = random.Random(name)
        self._tell({"name": name})
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
            breakpoint = next(self._open(phase), None)
            if breakpoint is not None:
                breakpoint.until = time.monotonic() + breakpoint.hold
        if breakpoint is not None or not quiet:
            self._tell({"at": phase, "request": request, "breakpoint": None if breakpoint is None else breakpoint.id})
        return breakpoint

    def waits_for(self, *phases: str) -> bool:
        """True while a request that enters one of ``phases`` is to be held."""
        with self._lock:
            return any(self._open(*phases))

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

    def _open(self, *phases: str) -> Iterator[_Breakpoint]:
        """Yields the breakpoints that no request has reached."""
        return (one for one in self._breakpoints.values() if one.phase in phases and one.until is None)

    def _tell(self, packet: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):  # the trial has ended
            self._socket.sendall(json.dumps(packet).encode() + b"\n")

    def _listen(self) -> None:
        for order in map(json.loads, self._socket.makefile()):
            with self._lock:
                if (id := order.get("breakpoint")) is not None:
                    self._breakpoints[id] = _Breakpoint(id, order["phase"], order["hold"])
                elif (id := order.get("remove")) in self._breakpoints and self._breakpoints[id].until is None:
                    del self._breakpoints[id]
                elif held := self._breakpoints.pop(order.get("release"), None):
                    held.until = 0.0
                self._corrupt = order.get("corrupt", self._corrupt)
