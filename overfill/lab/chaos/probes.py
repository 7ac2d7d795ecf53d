"""Runs a service with a probe: a trial sees the phase of each request and can hold a request there.

``python -m overfill.lab.chaos.probes SOCKET NAME MODULE [ARGS...]`` connects to the trial's Unix socket, wraps
the functions that a request passes through, and runs MODULE as ``__main__``. The service's own code is unchanged.
"""

from __future__ import annotations

import asyncio
import importlib
import io
import os
import runpy
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from overfill.lab.chaos.patching import around, damage_received, damage_sent, runs_vllm
from overfill.lab.chaos.probe import Probe, Recent
from overfill.lab.chaos.rank_probes import give_probes, watch_rank_pulls

_DECODE_TOKENS = 3  # token index from which on a sequence is in the phase decode


def watch_router(probe: Probe) -> None:
    from overfill.routing.relay import Relay

    starting: set[Relay] = set()
    tasks: set[asyncio.Task[None]] = set()

    @around(Relay, "start")
    def start_watched(start: Any, self: Relay) -> None:
        # A request that waits for a worker stays in the queue; one that has a worker is held before it is sent there.
        starting.add(self)
        try:
            start(self)
            if self in starting and not self._closed:
                probe.reached("queued", self.request.id)
        finally:
            starting.discard(self)

    @around(Relay, "_on_placed")
    def on_placed_watched(on_placed: Any, self: Relay, outcome: Any) -> None:
        async def hold() -> None:
            await probe.hold("queued", self.request.id)
            on_placed(self, outcome)

        if self not in starting:
            on_placed(self, outcome)
            return
        starting.discard(self)
        task = asyncio.ensure_future(hold())
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def watch_prefill(probe: Probe) -> Recent[str, str]:
    """Watches a prefill worker. Returns sequence -> request, of those that the worker has accepted."""
    from overfill.engine.sequence import PrefillScheduled

    requests: Recent[str, str] = Recent()

    # By name: the library never imports services.
    @around(importlib.import_module("services.prefill.servicer").PrefillServicer, "_accept")
    def accept_and_note(accept: Any, self: Any, start: Any, *rest: Any) -> Any:
        lease = accept(self, start, *rest)
        requests[lease.sequence.id] = start.request_id
        return lease

    # An engine's thread makes this event when it has scheduled the prompt's first chunk, before it computes.
    @around(PrefillScheduled, "__init__")
    def init_held(init: Any, self: Any, id: str, *rest: Any) -> None:
        init(self, id, *rest)
        probe.hold_thread("prefill", requests.get(id, ""))

    damage_sent(probe.flip)
    _watch_loans(probe)
    _watch_disk(probe)
    return requests


def watch_prefill_beside_decode(probe: Probe) -> None:
    """Watches the prefill stage of a worker with both: prompts of other workers, and its own."""
    from overfill.engine.colocated import ColocatedEngine

    requests = watch_prefill(probe)

    @around(importlib.import_module("services.colocated.local_prefill").LocalPrefills, "sequence")
    async def sequence_and_note(own_sequence: Any, self: Any, session: Any) -> Any:
        sequence = await own_sequence(self, session)
        requests[sequence.id] = session.start.request_id
        return sequence

    @around(ColocatedEngine, "_copy")
    def copy_held(copy: Any, self: Any, here: Any, computed: Any) -> Any:
        probe.hold_thread("handoff", requests.get(computed.id, ""))
        return copy(self, here, computed)


def _watch_loans(probe: Probe) -> None:
    """Holds loans before a message of their KV. Every import pays: a tiny model would compute sooner."""
    lender = importlib.import_module("services.lending").Lender
    requests: Recent[bytes, str] = Recent()  # transfer -> request

    @around(lender, "_check")
    def check_and_note(check: Any, self: Any, start: Any) -> None:
        check(self, start)
        requests[start.transfer_id] = start.request_id

    @around(lender, "pull")
    async def pull_held(pull: Any, self: Any, request: Any) -> AsyncIterator[Any]:
        async with aclosing(pull(self, request)) as messages:
            async for message in messages:
                await probe.hold("lending", requests.get(request.transfer_id, ""), quiet=True)
                yield message

    @around(importlib.import_module("overfill.kv.imports").Importer, "_pays")
    def pays(_: Any, self: Any, tokens: int, *costs: Any) -> bool:
        return tokens > 0


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
    transfer = overfill.kv.puller._Transfer

    @around(session, "take_plain")
    def take_plain_held(take_plain: Any, self: Any, *token: Any) -> bool:
        return not probe.waits_for("decode") and bool(take_plain(self, *token))

    @around(session, "take")
    def take_held(take: Any, self: Any, event: Any) -> None:
        if isinstance(event, TokenSampled) and probe.waits_for("decode", "finishing"):
            self.inbox.put_nowait(event)  # only the session's task can be held
        else:
            take(self, event)

    @around(session, "_handle")
    async def handle_held(handle: Any, self: Any, item: Any) -> bool:
        request = self.start.request_id
        if isinstance(item, Reserved):
            await probe.hold("reserving", request)
        elif isinstance(item, TokenSampled):
            if item.finish is not None:
                await probe.hold("finishing", request, quiet=True)
            elif item.index >= _DECODE_TOKENS:
                await probe.hold("decode", request, quiet=True)
        return bool(await handle(self, item))

    @around(transfer, "__init__")
    def init_named(init: Any, self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        self.request = logs.request_id.get()

    @around(transfer, "_write_message")
    def write_held(write_message: Any, self: Any, *arguments: Any) -> None:
        probe.hold_thread("handoff", self.request)
        write_message(self, *arguments)

    damage_received(probe.flip)
    if runs_vllm():
        watch_rank_pulls(probe)


WATCH: dict[str, tuple[Callable[[Probe], object], ...]] = {
    "services.router.main": (watch_router,),
    "services.prefill.main": (watch_prefill,),
    "services.decode.main": (watch_decode,),
    "services.colocated.main": (watch_prefill_beside_decode, watch_decode),
}
"""Module -> the functions that watch its process."""


def main() -> None:
    path, name, module = sys.argv[1:4]
    probe = Probe(path, name)
    for watch in WATCH[module]:
        watch(probe)
    if runs_vllm():
        give_probes(path, name)
    sys.argv = [module, *sys.argv[4:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
