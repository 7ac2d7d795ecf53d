"""The trial's side of the probes: learns which process has a request, holds a request in a phase, and releases it."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overfill.lab.chaos.fault_plan import KV_PHASES, PHASES, Phase
from overfill.lab.chaos.probe import Recent


@dataclass(frozen=True, slots=True)
class HeldRequest:
    """A request that a process holds in a phase; all fields are empty if no request entered the phase in time.

    Attributes:
        breakpoint: Identifier of the breakpoint that holds the request.
        process: Name of that process.
    """

    breakpoint: int = 0
    process: str = ""
    request: str = ""


class ProbeControl:
    """Listens at ``folder / "probes"``. A process is known by its name while it is connected."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "probes")
        self._writers: dict[str, asyncio.StreamWriter] = {}
        self._request_processes: Recent[str, dict[str, str]] = Recent()
        self._ids = itertools.count(1)
        self._waiting: dict[int, tuple[dict[str, Any], asyncio.Future[HeldRequest]]] = {}

    async def __aenter__(self) -> ProbeControl:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers.values():
            writer.close()

    def processes_of(self, request: str) -> dict[str, str]:
        """Returns stage -> process that has, or last had, the request. Unknown stages are missing."""
        return self._request_processes.get(request, {})

    async def hold_next(self, phase: Phase, hold: float, timeout: float) -> HeldRequest:
        """Waits ``timeout`` seconds for the next request that enters ``phase``.

        The process holds the request there for ``hold`` seconds, or until ``release``.
        """
        breakpoint = next(self._ids)
        held: asyncio.Future[HeldRequest] = asyncio.get_running_loop().create_future()
        order = {"breakpoint": breakpoint, "phase": phase, "hold": hold}
        self._waiting[breakpoint] = order, held
        self.send(order)  # only processes whose probes watch the phase reach it
        try:
            async with asyncio.timeout(timeout):
                return await held
        except TimeoutError:
            return HeldRequest()
        finally:
            del self._waiting[breakpoint]
            self.send({"remove": breakpoint})

    def release(self, held: HeldRequest) -> None:
        """Lets a held request go on."""
        self.send({"release": held.breakpoint}, held.process)

    def send(self, packet: dict[str, Any], name: str | None = None) -> None:
        """Sends ``packet`` to all processes that are connected, or to the one with this name and its ranks."""
        for of, writer in self._writers.items():
            if name in (None, of.partition("/")[0]):
                writer.write(json.dumps(packet).encode() + b"\n")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = ""
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if "name" not in message:
                    self._on(name, message)
                    continue
                name = message["name"]
                self._writers[name] = writer
                for order, _ in self._waiting.values():  # it connected during a wait
                    self.send(order, name)
        except OSError:
            pass  # the process was killed
        finally:
            if self._writers.get(name) is writer:
                del self._writers[name]
            writer.close()

    def _on(self, name: str, message: dict[str, Any]) -> None:
        request, breakpoint = message["request"], message["breakpoint"]
        self._request_processes[request] = self.processes_of(request) | {(PHASES | KV_PHASES)[message["at"]]: name}
        if breakpoint is None:
            return
        held = HeldRequest(breakpoint, name, request)
        _, waiting = self._waiting.get(breakpoint, (None, None))
        if waiting is None or waiting.done():  # another process was first to reach the phase
            self.release(held)
        else:
            waiting.set_result(held)
