"""A prefill worker's lease: one prompt from acceptance to release, and what reads and writes its blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from concurrent.futures import Executor
from typing import assert_never

from overfill.engine.protocol import ServedHalf
from overfill.engine.sequence import (
    AwaitingImport,
    ChunkComputed,
    KvWritten,
    LayerStarted,
    Lent,
    PrefillEvent,
    PrefillScheduled,
    PrefillSequence,
    PromptComputed,
    SequenceFailed,
)
from overfill.kv.chunks import TransferSpec
from overfill.kv.imports import Imports
from overfill.kv.sender import KvSender
from overfill.kv.stall import TransferLimits, watch_transfer
from overfill.kv.streams import TransferStreams
from overfill.v1 import kv_pb2, prefill_pb2


class Lease:
    """One prompt from acceptance to release: its sequence, the sender of its KV, and the streams that read it."""

    def __init__(
        self, start: prefill_pb2.StartPrefill, sequence: PrefillSequence, served: ServedHalf, executor: Executor
    ) -> None:
        self.spec = TransferSpec(
            start.transfer_id,
            start.attempt,
            served.kv,
            tuple(start.layers),
            (start.already_held_tokens, len(sequence.prompt)),
            start.codec,
        )
        self.start = start
        self.sequence = sequence
        self.received_ns = time.monotonic_ns()
        # Queue of the RPC: engine events, an error that ends the RPC, or None to check for the end again.
        self.events: asyncio.Queue[PrefillEvent | Exception | None] = asyncio.Queue()
        self.sender = KvSender(self.spec, served.store, executor)
        self.streams = TransferStreams(self.sender)
        self.ranks = served.ranks
        self.computed = False  # True after the engine's last event
        self.released = False  # True once the decode worker needs no more KV
        self.scheduled_ns = 0
        self.tells_times = start.HasField("answer_start")  # the decoder samples the first token
        self.trace = kv_pb2.PrefillTrace()
        self.imports = Imports()
        self._importing: asyncio.Task[None] | None = None

    def on_event(self, event: PrefillEvent) -> None:
        """Handles an engine event. Call it on the event loop."""
        match event:
            case PrefillScheduled(blocks=blocks, cached_tokens=cached, event=mark, time_ns=now):
                self.scheduled_ns = now
                self.sender.begin(blocks, cached, mark)
            case LayerStarted(layer=layer, time_ns=now):
                if layer == 0:
                    del self.trace.layer_start_ns[:]
                    del self.trace.layer_end_ns[:]
                else:
                    self.trace.layer_end_ns.append(now - self.scheduled_ns)
                self.trace.layer_start_ns.append(now - self.scheduled_ns)
                return
            case KvWritten(layers=layers, token_end=end, event=mark):
                for layer in layers:
                    self.sender.mark_ready(layer, end, mark)
                return
            case PromptComputed(time_ns=now):
                self.computed = True
                if self.trace.layer_start_ns:  # the engine reports layers
                    self.trace.layer_end_ns.append(now - self.scheduled_ns)
            case AwaitingImport() | Lent() | ChunkComputed() | SequenceFailed():
                pass
            case _:
                assert_never(event)
        self.events.put_nowait(event)

    async def guard(self, work: Coroutine[object, object, None]) -> None:
        """Runs ``work`` beside the RPC. Its end wakes the RPC; its failure ends the RPC."""
        try:
            await work
        except Exception as error:
            self.events.put_nowait(error)
        else:
            self.events.put_nowait(None)

    def begin_import(self, work: Coroutine[object, object, None]) -> None:
        """Runs ``work``, which writes to the prompt's blocks, beside the RPC until ``join_streams``."""
        self._importing = asyncio.ensure_future(self.guard(work))

    async def watch_transfer(self, limits: TransferLimits) -> None:
        """Raises TransferFailed when the decode worker stops acknowledging KV although some is ready."""
        sender = self.sender
        ready, moved = (lambda: 0 if self.released else sender.ready_bytes), (lambda: sender.acknowledged_bytes)
        await watch_transfer("the decode worker", self.spec.total_bytes, limits, ready, moved)

    async def begin_streams(self, event: PrefillScheduled) -> None:
        """Has the ranks that hold the KV serve it; without ranks, this process serves it already."""
        if self.ranks is not None:
            await self.ranks.open(self.spec, event.blocks, event.cached_tokens)

    async def join_streams(self) -> None:
        """Ends the import that writes to the blocks, and every stream that reads them, here and in ranks.

        Waits until all have ended.
        """
        if self._importing is not None:
            self._importing.cancel()
            await asyncio.wait([self._importing])
        await self.streams.join()
        if self.ranks is not None:
            first, last = await self.ranks.close(self.spec.transfer_id)
            self.sender.first_sent_ns, self.sender.last_sent_ns = first or None, last or None

    def finished_trace(self) -> kv_pb2.PrefillTrace:
        now = time.monotonic_ns()
        self.trace.first_kv_sent_ns = (self.sender.first_sent_ns or now) - self.scheduled_ns
        self.trace.last_kv_sent_ns = (self.sender.last_sent_ns or now) - self.scheduled_ns
        self.trace.last_ack_ns = now - self.scheduled_ns
        return self.trace
