"""Runs a service so that a trial sees where its requests are, and can hold one there for a moment.

``python -m overfill.lab.chaos.probes SOCKET NAME MODULE [ARGS...]`` connects to the trial's Unix socket, wraps the
functions that a request passes on its way, and runs MODULE as ``__main__``. Nothing in the service knows of it.

One packet of JSON at a time. To the trial: ``{"name"}`` once, then ``{"at", "request", "arm"}`` whenever a request
comes into a phase; ``arm`` is null unless it is held. From the trial: ``{"arm", "phase", "hold"}`` holds the next
request that comes into ``phase`` until ``{"release"}`` or for ``hold`` seconds; ``{"disarm"}``; ``{"corrupt": n}``
flips a bit of each of the next n KV chunks: of what this process sends, once the checksum has been taken, and of what
it receives, before it is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import random
import runpy
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_LOOK = 0.002  # seconds between looks at whether what is held may go on
_DECODING = 3  # tokens after which a sequence counts as being decoded


class _Arm:
    def __init__(self, number: int, hold: float) -> None:
        self.number = number
        self.hold = hold
        self.until = 0.0
        self.released = False

    @property
    def holds(self) -> bool:
        return not self.released and time.monotonic() < self.until


class Probe:
    """This process's end of the socket. Callable from any thread."""

    def __init__(self, path: str, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(path)
        self._lock = threading.Lock()
        self._armed: dict[str, list[_Arm]] = {}
        self._held: dict[int, _Arm] = {}
        self._corrupt = 0
        self._rng = random.Random(name)
        self._tell({"name": name})
        self._listening = threading.Thread(target=self._listen, name="probe", daemon=True)
        self._listening.start()

    def close(self) -> None:
        """The trial does not see this process any more."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._listening.join()
        self._socket.close()

    def reached(self, phase: str, request: str, *, quiet: bool = False) -> _Arm | None:
        """A request is in ``phase``. Tells the trial, unless ``quiet`` and nothing waits for it."""
        with self._lock:
            arms = self._armed.get(phase)
            arm = arms.pop(0) if arms else None
            if arm is not None:
                arm.until = time.monotonic() + arm.hold
                self._held[arm.number] = arm
        if arm is not None or not quiet:
            self._tell({"at": phase, "request": request, "arm": None if arm is None else arm.number})
        return arm

    async def hold(self, phase: str, request: str, *, quiet: bool = False) -> None:
        """``reached``, and waits if the trial says so."""
        arm = self.reached(phase, request, quiet=quiet)
        while arm is not None and arm.holds:  # noqa: ASYNC110  # another thread lets go
            await asyncio.sleep(_LOOK)

    def hold_thread(self, phase: str, request: str) -> None:
        """``hold`` for a thread of its own."""
        arm = self.reached(phase, request, quiet=True)
        while arm is not None and arm.holds:
            time.sleep(_LOOK)

    def flip(self, size: int) -> tuple[int, int] | None:
        """The byte of a chunk of ``size`` bytes, and the mask, with which it is to be damaged, if it is."""
        with self._lock:
            if not self._corrupt or not size:
                return None
            self._corrupt -= 1
            return self._rng.randrange(size), 1 << self._rng.randrange(8)

    def _tell(self, packet: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the trial is busy, or over
            self._socket.send(json.dumps(packet).encode(), socket.MSG_DONTWAIT)

    def _listen(self) -> None:
        while packet := self._socket.recv(4096):
            order = json.loads(packet)
            with self._lock:
                if "arm" in order:
                    self._armed.setdefault(order["phase"], []).append(_Arm(order["arm"], order["hold"]))
                elif "disarm" in order:
                    for arms in self._armed.values():
                        arms[:] = [arm for arm in arms if arm.number != order["disarm"]]
                elif "release" in order and (held := self._held.pop(order["release"], None)):
                    held.released = True
                elif "corrupt" in order:
                    self._corrupt = order["corrupt"]


def watch_router(probe: Probe) -> None:
    from overfill.routing.relay import Relay

    run = Relay._run

    async def watched(self: Relay, placement: Any) -> None:
        # Held or not, what waits for a place stays in the queue; what has one is held in front of its worker.
        if placement.done():
            await probe.hold("queued", self._request.id)
        else:
            probe.reached("queued", self._request.id)
        await run(self, placement)

    Relay._run = watched  # type: ignore[method-assign]


def watch_prefill(probe: Probe) -> None:
    import overfill.kv.sender
    from overfill.engine.prefill import PrefillEngine

    servicer = importlib.import_module("services.prefill.servicer").PrefillServicer  # named, as everywhere in here
    sender: Any = overfill.kv.sender
    accept, compute, seal, seal_in_place = servicer._accept, PrefillEngine._compute, sender.seal, sender.seal_in_place
    requests: dict[str, str] = {}  # by sequence

    def accept_and_tell(self: Any, start: Any, *rest: Any) -> Any:
        lease = accept(self, start, *rest)
        requests[lease.sequence.id] = start.request_id
        if len(requests) > 10_000:
            requests.pop(next(iter(requests)))
        return lease

    def compute_held(self: PrefillEngine, scheduled: Any) -> None:
        probe.hold_thread("prefill", requests.get(scheduled[0][0].id, ""))
        compute(self, scheduled)

    def seal_and_damage(spec: Any, box: Any, payload: Any, *rest: Any) -> Any:
        frame = seal(spec, box, payload, *rest)
        if isinstance(payload, memoryview):
            damage(payload)  # a view into what the frame is made of, or into shared memory
        return frame

    def seal_in_place_and_damage(blank: Any, *rest: Any) -> None:
        seal_in_place(blank, *rest)
        damage(blank.payload)

    def damage(payload: memoryview) -> None:
        if (flip := probe.flip(len(payload))) is not None:
            payload[flip[0]] ^= flip[1]

    servicer._accept = accept_and_tell
    PrefillEngine._compute = compute_held  # type: ignore[method-assign]
    sender.seal, sender.seal_in_place = seal_and_damage, seal_in_place_and_damage


def watch_decode(probe: Probe) -> None:
    import overfill.kv.receiver
    from overfill.engine.sequence import Reserved, TokenSampled
    from overfill.kv.receiver import PromptPull

    session = importlib.import_module("services.decode.sequence_session").SequenceSession
    receiver: Any = overfill.kv.receiver
    handle, take_all, check = session._handle, PromptPull._take_all, receiver.check_head

    async def handle_held(self: Any, item: Any) -> bool:
        request = self.start.request_id
        if isinstance(item, Reserved):
            await probe.hold("reserving", request)
        elif isinstance(item, TokenSampled):
            if item.finish is not None:
                await probe.hold("finishing", request, quiet=True)
            elif item.index >= _DECODING:
                await probe.hold("decode", request, quiet=True)
        return bool(await handle(self, item))

    def take_held(self: PromptPull, *arguments: Any) -> None:
        probe.hold_thread("handoff", self._request.request_id)
        take_all(self, *arguments)

    def damage_and_check(spec: Any, chunk: Any) -> Any:
        if (flip := probe.flip(len(chunk.payload))) is not None:
            damaged = bytearray(chunk.payload)
            damaged[flip[0]] ^= flip[1]
            chunk.payload = damaged
        return check(spec, chunk)

    session._handle = handle_held
    receiver.PromptPull._take_all = take_held
    receiver.check_head = damage_and_check


WATCH: dict[str, Callable[[Probe], None]] = {
    "services.router.main": watch_router,
    "services.prefill.main": watch_prefill,
    "services.decode.main": watch_decode,
}


def main() -> None:
    path, name, module = sys.argv[1:4]
    WATCH[module](Probe(path, name))
    sys.argv = [module, *sys.argv[4:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
