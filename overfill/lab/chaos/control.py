"""The trial's side of the probes: learns which process has a request, holds a request in a phase, and releases it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overfill.lab.chaos.fault_plan import Phase

STAGE_OF: dict[Phase, str] = {
    "queued": "router",
    "reserving": "decode",
    "prefill": "prefill",
    "handoff": "decode",
    "decode": "decode",
    "finishing": "decode",
    "lending": "prefill",
    "saving": "prefill",
}
"""Phase -> the stage whose processes report that a request is in it."""

_MAX_REQUESTS = 10_000  # requests for which the processes are remembered


@dataclass(frozen=True, slots=True)
class HeldRequest:
    """A request that a process holds in a phase.

    Attributes:
        breakpoint: Identifier of the breakpoint that holds the request.
        process: Name of that process.
    """

    breakpoint: int
    process: str
    request: str


@dataclass(frozen=True, slots=True)
class _Peer:
    """A connected process."""

    socket: socket.socket
    stages: frozenset[str]


class ProbeControl:
    """Listens at ``folder / "probes"``. A process is known by its name while it is connected."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "probes")
        self._processes: dict[str, _Peer] = {}
        self._request_processes: dict[str, dict[str, str]] = {}
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[HeldRequest]] = {}
        self._breakpoints: dict[int, tuple[Phase, float]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ProbeControl:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(self.path)
        self._listener.listen()
        self._spawn(self._accept())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()
        os.unlink(self.path)

    def processes_of(self, request: str) -> dict[str, str]:
        """Returns stage -> process that has, or last had, the request. Unknown stages are missing."""
        return self._request_processes.get(request, {})

    async def hold_next(self, phase: Phase, hold: float, timeout: float) -> HeldRequest:
        """Waits for the next request that enters ``phase``. It is held there for ``hold`` seconds or until ``release``.

        Raises:
            TimeoutError: No request entered the phase within ``timeout`` seconds.
        """
        breakpoint = next(self._ids)
        self._waiting[breakpoint] = asyncio.get_running_loop().create_future()
        self._breakpoints[breakpoint] = (phase, hold)
        self._send_to_stage(phase, {"breakpoint": breakpoint, "phase": phase, "hold": hold})
        try:
            async with asyncio.timeout(timeout):
                return await self._waiting[breakpoint]
        finally:
            del self._waiting[breakpoint], self._breakpoints[breakpoint]
            self._send_to_stage(phase, {"remove": breakpoint})

    def release(self, held: HeldRequest) -> None:
        self.send(held.process, {"release": held.breakpoint})

    def send(self, name: str, packet: dict[str, Any]) -> None:
        """Sends ``packet`` to a process and its ranks. Does nothing when none of them is connected."""
        for of, peer in [*self._processes.items()]:
            if of.partition("/")[0] == name:
                with contextlib.suppress(OSError):
                    peer.socket.send(json.dumps(packet).encode())

    def _send_to_stage(self, phase: Phase, packet: dict[str, Any]) -> None:
        for name, peer in [*self._processes.items()]:
            if STAGE_OF[phase] in peer.stages:
                self.send(name, packet)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        while True:
            peer, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            self._spawn(self._receive(peer))

    async def _receive(self, connection: socket.socket) -> None:
        loop, name = asyncio.get_running_loop(), ""
        with connection:
            try:
                while packet := await loop.sock_recv(connection, 4096):
                    message = json.loads(packet)
                    if "name" in message:
                        name = message["name"]
                        peer = self._processes[name] = _Peer(connection, frozenset(message["stages"]))
                        for breakpoint, (phase, hold) in self._breakpoints.items():  # it connected during a wait
                            if STAGE_OF[phase] in peer.stages:
                                self.send(name, {"breakpoint": breakpoint, "phase": phase, "hold": hold})
                    else:
                        self._on(name, message)
            except OSError:
                pass  # the process was killed
            finally:
                if name in self._processes and self._processes[name].socket is connection:
                    del self._processes[name]

    def _on(self, name: str, message: dict[str, Any]) -> None:
        request = message["request"]
        self._request_processes.setdefault(request, {})[STAGE_OF[message["at"]]] = name
        while len(self._request_processes) > _MAX_REQUESTS:
            self._request_processes.pop(next(iter(self._request_processes)))
        if message["breakpoint"] is None:
            return
        held = HeldRequest(message["breakpoint"], name, request)
        waiting = self._waiting.get(held.breakpoint)
        if waiting is None or waiting.done():  # another process was first to reach the phase
            self.release(held)
        else:
            waiting.set_result(held)
