"""Runs a service with a probe: a trial sees the phase of each request and can hold a request there.

``python -m overfill.lab.chaos.probes SOCKET NAME MODULE [ARGS...]`` connects to the trial's Unix socket, wraps
the functions that a request passes through, and runs MODULE as ``__main__``. The service's own code is unchanged.

Each packet is one JSON object. The probe sends:

* ``{"name"}`` once;
* ``{"at", "request", "breakpoint"}`` when a request enters a phase; ``breakpoint`` is null unless the request is held.

The trial sends:

* ``{"breakpoint", "phase", "hold"}``: hold the next request that enters ``phase``, for at most ``hold`` seconds;
* ``{"release": breakpoint}``: release the request that is held; ``{"remove": breakpoint}``: hold no request;
* ``{"corrupt": n}``: flip one bit in each of the next n KV chunks. A chunk that this process sends is changed after its
  checksum was computed, a chunk that it receives before the checksum is compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
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

_POLL = 0.002  # seconds between checks whether a held request was released
_DECODE_TOKENS = 3  # token index from which on a sequence is in the phase decode


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
    """This process's end of the socket. Thread-safe."""

    def __init__(self, path: str, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(path)
        self._lock = threading.Lock()
        self._breakpoints: dict[str, list[_Breakpoint]] = {}
        self._held: dict[int, _Breakpoint] = {}
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
            breakpoints = self._breakpoints.get(phase)
            breakpoint = breakpoints.pop(0) if breakpoints else None
            if breakpoint is not None:
                breakpoint.until = time.monotonic() + breakpoint.hold
                self._held[breakpoint.id] = breakpoint
        if breakpoint is not None or not quiet:
            self._tell({"at": phase, "request": request, "breakpoint": None if breakpoint is None else breakpoint.id})
        return breakpoint

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


def watch_router(probe: Probe) -> None:
    from overfill.routing.relay import Relay

    start, on_placed = Relay.start, Relay._on_placed
    starting: set[Relay] = set()
    tasks: set[asyncio.Task[None]] = set()

    async def hold(relay: Relay, outcome: Any) -> None:
        await probe.hold("queued", relay._job.id)
        on_placed(relay, outcome)

    def start_watched(self: Relay) -> None:
        # A request that waits for a worker stays in the queue; one that has a worker is held before it is sent there.
        starting.add(self)
        try:
            start(self)
            if self in starting and not self._closed:
                probe.reached("queued", self._job.id)
        finally:
            starting.discard(self)

    def on_placed_watched(self: Relay, outcome: Any) -> None:
        if self not in starting:
            on_placed(self, outcome)
            return
        starting.discard(self)
        task = asyncio.ensure_future(hold(self, outcome))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    Relay.start = start_watched  # type: ignore[method-assign]
    Relay._on_placed = on_placed_watched  # type: ignore[method-assign]


def watch_prefill(probe: Probe) -> None:
    import overfill.kv.sender
    from overfill.engine.sequence import PrefillScheduled

    # By name: the library never imports services.
    hosting: Any = importlib.import_module("services.hosting")
    servicer = importlib.import_module("services.prefill.servicer").PrefillServicer
    sender: Any = overfill.kv.sender
    accept, load, seal, seal_in_place = servicer._accept, hosting.load_half_of, sender.seal, sender.seal_in_place
    requests: dict[str, str] = {}  # sequence -> request

    def accept_and_tell(self: Any, start: Any, *rest: Any) -> Any:
        lease = accept(self, start, *rest)
        requests[lease.sequence.id] = start.request_id
        if len(requests) > 10_000:
            requests.pop(next(iter(requests)))
        return lease

    async def load_held(*arguments: Any) -> Any:
        loaded = await load(*arguments)

        def new_core(emit: Callable[[list[Any]], None], metrics: Any) -> Any:
            def emit_and_hold(events: list[Any]) -> None:
                emit(events)
                # Every engine says this on its own thread, after it has planned a step and before it computes.
                if scheduled := [event for event in events if isinstance(event, PrefillScheduled)]:
                    probe.hold_thread("prefill", requests.get(scheduled[0].id, ""))

            return loaded.new_core(emit_and_hold, metrics)

        return dataclasses.replace(loaded, new_core=new_core)

    def seal_and_damage(spec: Any, box: Any, payload: Any, *rest: Any) -> Any:
        frame = seal(spec, box, payload, *rest)
        if isinstance(payload, memoryview):
            damage(payload)  # a view into the frame's memory, or into shared memory
        return frame

    def seal_in_place_and_damage(blank: Any, *rest: Any) -> None:
        seal_in_place(blank, *rest)
        damage(blank.payload)

    def damage(payload: memoryview) -> None:
        if (flip := probe.flip(len(payload))) is not None:
            payload[flip[0]] ^= flip[1]

    servicer._accept = accept_and_tell
    hosting.load_half_of = load_held
    sender.seal, sender.seal_in_place = seal_and_damage, seal_in_place_and_damage


def watch_decode(probe: Probe) -> None:
    import overfill.kv.receiver
    from overfill.engine.sequence import Reserved, TokenSampled
    from overfill.kv.receiver import PromptPull

    session = importlib.import_module("services.decode.sequence_session").SequenceSession
    receiver: Any = overfill.kv.receiver
    handle, write_message, check = session._handle, PromptPull._write_message, receiver.check_head

    async def handle_held(self: Any, item: Any) -> bool:
        request = self.start.request_id
        if isinstance(item, Reserved):
            await probe.hold("reserving", request)
        elif isinstance(item, TokenSampled):
            if item.finish is not None:
                await probe.hold("finishing", request, quiet=True)
            elif item.index >= _DECODE_TOKENS:
                await probe.hold("decode", request, quiet=True)
        return bool(await handle(self, item))

    def write_held(self: PromptPull, *arguments: Any) -> None:
        probe.hold_thread("handoff", self._start.start.request_id)
        write_message(self, *arguments)

    def damage_and_check(spec: Any, chunk: Any) -> Any:
        if (flip := probe.flip(len(chunk.payload))) is not None:
            damaged = bytearray(chunk.payload)
            damaged[flip[0]] ^= flip[1]
            chunk.payload = damaged
        return check(spec, chunk)

    session._handle = handle_held
    receiver.PromptPull._write_message = write_held
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
