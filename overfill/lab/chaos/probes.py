"""Runs a service with a probe: a trial sees the phase of each request and can hold a request there.

``python -m overfill.lab.chaos.probes SOCKET NAME MODULE [ARGS...]`` connects to the trial's Unix socket, wraps
the functions that a request passes through, and runs MODULE as ``__main__``. The service's own code is unchanged.

Each packet is one JSON object. The probe sends:

* ``{"name", "stages"}`` once;
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
from collections.abc import Callable, Iterable
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


def watch_router(probe: Probe) -> None:
    from overfill.routing.relay import Relay

    start, on_placed = Relay.start, Relay._on_placed
    starting: set[Relay] = set()
    tasks: set[asyncio.Task[None]] = set()

    async def hold(relay: Relay, outcome: Any) -> None:
        await probe.hold("queued", relay.request.id)
        on_placed(relay, outcome)

    def start_watched(self: Relay) -> None:
        # A request that waits for a worker stays in the queue; one that has a worker is held before it is sent there.
        starting.add(self)
        try:
            start(self)
            if self in starting and not self._closed:
                probe.reached("queued", self.request.id)
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


class _Scheduling:
    """Holds prompts when an engine has scheduled their first chunk, before it computes."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._requests: dict[str, str] = {}  # sequence -> request

    def add(self, sequence: str, request: str) -> None:
        self._requests[sequence] = request
        if len(self._requests) > 10_000:
            self._requests.pop(next(iter(self._requests)))

    def request_of(self, sequence: str) -> str:
        return self._requests.get(sequence, "")

    def held(self, emit: Callable[[list[Any]], None]) -> Callable[[list[Any]], None]:
        """Returns ``emit`` with the hold. Every engine emits on its own thread."""
        from overfill.engine.sequence import PrefillScheduled

        def emit_and_hold(events: list[Any]) -> None:
            emit(events)
            if scheduled := [event for event in events if isinstance(event, PrefillScheduled)]:
                self._probe.hold_thread("prefill", self.request_of(scheduled[0].id))

        return emit_and_hold


def watch_prefill(probe: Probe) -> None:
    scheduling = _watch_prefill_service(probe)
    loading: Any = importlib.import_module("services.loading")
    load = loading.load_half_of

    async def load_held(*arguments: Any) -> Any:
        loaded = await load(*arguments)

        def new_core(emit: Callable[[list[Any]], None], *rest: Any) -> Any:
            return loaded.new_core(scheduling.held(emit), *rest)

        return dataclasses.replace(loaded, new_core=new_core)

    loading.load_half_of = load_held


def watch_prefill_beside_decode(probe: Probe) -> None:
    """Watches the prefill stage of a worker with both: prompts of other workers, and its own."""
    from overfill.engine.colocated import ColocatedEngine

    loaded: Any = importlib.import_module("overfill.engine.load").LoadedColocated
    scheduling = _watch_prefill_service(probe)
    local = importlib.import_module("services.colocated.local_prefill").LocalPrefills
    new_core, own_sequence, copy = loaded.new_core, local.sequence, ColocatedEngine._copy

    def new_core_held(self: Any, emit_prefill: Any, emit_decode: Any, *rest: Any) -> Any:
        return new_core(self, scheduling.held(emit_prefill), scheduling.held(emit_decode), *rest)

    async def own_sequence_and_tell(self: Any, session: Any) -> Any:
        sequence = await own_sequence(self, session)
        scheduling.add(sequence.id, session.start.request_id)
        return sequence

    def copy_held(self: ColocatedEngine, here: Any, computed: Any) -> Any:
        probe.hold_thread("handoff", scheduling.request_of(computed.id))
        return copy(self, here, computed)

    loaded.new_core, local.sequence = new_core_held, own_sequence_and_tell
    ColocatedEngine._copy = copy_held  # type: ignore[method-assign]


def _watch_prefill_service(probe: Probe) -> _Scheduling:
    import overfill.kv.sender

    # By name: the library never imports services.
    servicer = importlib.import_module("services.prefill.servicer").PrefillServicer
    sender: Any = overfill.kv.sender
    accept, join, read = servicer._accept, sender.join_chunks, sender.KvSender._read_message
    scheduling = _Scheduling(probe)

    def accept_and_tell(self: Any, start: Any, *rest: Any) -> Any:
        lease = accept(self, start, *rest)
        scheduling.add(lease.sequence.id, start.request_id)
        return lease

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

    servicer._accept = accept_and_tell
    sender.join_chunks, sender.KvSender._read_message = damage_and_join, read_and_damage
    return scheduling


def watch_decode(probe: Probe) -> None:
    import overfill.kv.puller
    from overfill.engine.sequence import Reserved, TokenSampled
    from overfill.telemetry import logs

    session = importlib.import_module("services.decode.sequence_session").SequenceSession
    puller: Any = overfill.kv.puller
    transfer = puller._Transfer
    handle, init, write_message, check = session._handle, transfer.__init__, transfer._write_message, puller.check_head
    take, take_plain = session.take, session.take_plain

    def take_plain_held(self: Any, *token: Any) -> bool:
        return not probe.waits_for("decode") and bool(take_plain(self, *token))

    def take_held(self: Any, event: Any) -> None:
        if isinstance(event, TokenSampled) and probe.waits_for("decode", "finishing"):
            self.inbox.put_nowait(event)  # only the session's task can be held
        else:
            take(self, event)

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

    def init_named(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        self.request = logs.request_id.get()

    def write_held(self: Any, *arguments: Any) -> None:
        probe.hold_thread("handoff", self.request)
        write_message(self, *arguments)

    def damage_and_check(spec: Any, chunk: Any) -> Any:
        if (flip := probe.flip(len(chunk.payload))) is not None:
            damaged = bytearray(chunk.payload)
            damaged[flip[0]] ^= flip[1]
            chunk.payload = damaged
        return check(spec, chunk)

    session._handle, session.take, session.take_plain = handle_held, take_held, take_plain_held
    transfer.__init__, transfer._write_message = init_named, write_held
    puller.check_head = damage_and_check


WATCH: dict[str, dict[str, Callable[[Probe], None]]] = {
    "services.router.main": {"router": watch_router},
    "services.prefill.main": {"prefill": watch_prefill},
    "services.decode.main": {"decode": watch_decode},
    "services.colocated.main": {"prefill": watch_prefill_beside_decode, "decode": watch_decode},
}
"""Module -> the stages of its process, each with the function that watches it."""


def main() -> None:
    path, name, module = sys.argv[1:4]
    probe = Probe(path, name, WATCH[module])
    for watch in WATCH[module].values():
        watch(probe)
    sys.argv = [module, *sys.argv[4:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
