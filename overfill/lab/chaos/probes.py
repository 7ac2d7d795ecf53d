"""Runs a service with a probe: a trial sees the phase of each request and can hold a request there.

``python -m overfill.lab.chaos.probes SOCKET NAME MODULE [ARGS...]`` connects to the trial's Unix socket, wraps
the functions that a request passes through, and runs MODULE as ``__main__``. The service's own code is unchanged.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import io
import os
import runpy
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from overfill.lab.chaos.probe import Probe, damage_received, damage_sent
from overfill.lab.chaos.rank_probes import watch_ranks
from overfill.settings.reader import SETTINGS

_DECODE_TOKENS = 3  # token index from which on a sequence is in the phase decode


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
    # By name: the library never imports services.
    servicer = importlib.import_module("services.prefill.servicer").PrefillServicer
    accept = servicer._accept
    scheduling = _Scheduling(probe)

    def accept_and_tell(self: Any, start: Any, *rest: Any) -> Any:
        lease = accept(self, start, *rest)
        scheduling.add(lease.sequence.id, start.request_id)
        return lease

    servicer._accept = accept_and_tell
    damage_sent(probe)
    _watch_loans(probe)
    _watch_disk(probe)
    return scheduling


def _watch_loans(probe: Probe) -> None:
    """Holds loans before a message of their KV. Every import pays: a tiny model would compute sooner."""
    imports: Any = importlib.import_module("overfill.kv.imports")
    lender = importlib.import_module("services.lending").Lender
    check, pull = lender._check, lender.pull
    requests: dict[bytes, str] = {}  # transfer -> request

    def check_and_note(self: Any, start: Any) -> None:
        check(self, start)
        requests[start.transfer_id] = start.request_id
        if len(requests) > 10_000:
            requests.pop(next(iter(requests)))

    async def pull_held(self: Any, request: Any) -> AsyncIterator[Any]:
        async with aclosing(pull(self, request)) as messages:
            async for message in messages:
                await probe.hold("lending", requests.get(request.transfer_id, ""), quiet=True)
                yield message

    lender._check, lender.pull = check_and_note, pull_held
    imports.Importer._pays = lambda self, tokens, *costs: tokens > 0


def _watch_disk(probe: Probe) -> None:
    """Holds the disk tier's writer when half of a file is written."""
    disk_files: Any = importlib.import_module("overfill.kv.disk_files")

    class HeldFile(io.BufferedWriter):
        def write(self, content: Any) -> int:
            if not probe.waits_for("saving"):
                return super().write(content)
            half = super().write(content[: len(content) // 2])
            self.flush()
            probe.hold_thread("saving", f"a block of {os.getpid()}")
            return half + super().write(content[half:])

    def open_held(path: Any, mode: str, *rest: Any, **how: Any) -> Any:
        file: Any = open(path, mode, *rest, **how)  # noqa: SIM115  # the caller closes it
        return HeldFile(file.detach()) if mode == "wb" else file

    disk_files.open = open_held


def watch_decode(probe: Probe) -> None:
    import overfill.kv.puller
    from overfill.engine.sequence import Reserved, TokenSampled
    from overfill.telemetry import logs

    session = importlib.import_module("services.decode.sequence_session").SequenceSession
    puller: Any = overfill.kv.puller
    transfer = puller._Transfer
    handle, init, write_message = session._handle, transfer.__init__, transfer._write_message
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

    session._handle, session.take, session.take_plain = handle_held, take_held, take_plain_held
    transfer.__init__, transfer._write_message = init_named, write_held
    damage_received(probe)


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
    if '"engine": "vllm"' in os.environ.get(SETTINGS, ""):
        watch_ranks(probe, path, name)
    sys.argv = [module, *sys.argv[4:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
