"""The trial's end of the probes: hears where requests are, has one held, says when it may go on."""

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

from overfill.lab.chaos.strikes import Phase

STAGE_OF: dict[Phase, str] = {
    "queued": "router",
    "reserving": "decode",
    "prefill": "prefill",
    "handoff": "decode",
    "decode": "decode",
    "finishing": "decode",
}
"""Which process knows that a request is in a phase."""

_KEPT = 10_000  # requests whose processes are remembered


@dataclass(frozen=True, slots=True)
class Caught:
    """A request that is held in a phase.

    Attributes:
        process: that holds it.
    """

    arm: int
    process: str
    request: str


class Control:
    """Listens at ``folder / "probes"``; a process is known by its name once it has connected, and until it goes."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "probes")
        self._processes: dict[str, socket.socket] = {}
        self._where: dict[str, dict[str, str]] = {}
        self._arms = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Caught]] = {}
        self._armed: dict[int, tuple[Phase, float]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Control:
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

    def where(self, request: str) -> dict[str, str]:
        """Stage -> the process of that stage that has, or last had, the request; as far as it is known."""
        return self._where.get(request, {})

    async def catch(self, phase: Phase, hold: float, timeout: float) -> Caught:
        """The next request that comes into ``phase``, held there for ``hold`` seconds or until it is released.

        Raises:
            TimeoutError: none came.
        """
        arm = next(self._arms)
        self._waiting[arm] = asyncio.get_running_loop().create_future()
        self._armed[arm] = (phase, hold)
        self._say_all(phase, {"arm": arm, "phase": phase, "hold": hold})
        try:
            async with asyncio.timeout(timeout):
                return await self._waiting[arm]
        finally:
            del self._waiting[arm], self._armed[arm]
            self._say_all(phase, {"disarm": arm})

    def release(self, caught: Caught) -> None:
        self.say(caught.process, {"release": caught.arm})

    def say(self, name: str, packet: dict[str, Any]) -> None:
        """Tells a process, if it is there."""
        if (peer := self._processes.get(name)) is not None:
            with contextlib.suppress(OSError):
                peer.send(json.dumps(packet).encode())

    def _say_all(self, phase: Phase, packet: dict[str, Any]) -> None:
        for name in [*self._processes]:
            if name.startswith(STAGE_OF[phase]):
                self.say(name, packet)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        while True:
            peer, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            self._spawn(self._hear(peer))

    async def _hear(self, peer: socket.socket) -> None:
        loop, name = asyncio.get_running_loop(), ""
        with peer:
            try:
                while packet := await loop.sock_recv(peer, 4096):
                    said = json.loads(packet)
                    if "name" in said:
                        name = said["name"]
                        self._processes[name] = peer
                        for arm, (phase, hold) in self._armed.items():  # it comes in the middle of a wait
                            if name.startswith(STAGE_OF[phase]):
                                self.say(name, {"arm": arm, "phase": phase, "hold": hold})
                    else:
                        self._on(name, said)
            except OSError:
                pass  # killed
            finally:
                if self._processes.get(name) is peer:
                    del self._processes[name]

    def _on(self, name: str, said: dict[str, Any]) -> None:
        request = said["request"]
        self._where.setdefault(request, {})[name.partition("-")[0]] = name
        while len(self._where) > _KEPT:
            self._where.pop(next(iter(self._where)))
        if said["arm"] is None:
            return
        caught = Caught(said["arm"], name, request)
        waiting = self._waiting.get(caught.arm)
        if waiting is None or waiting.done():  # several processes were asked, and another was first
            self.release(caught)
        else:
            waiting.set_result(caught)
