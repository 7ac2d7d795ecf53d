"""Runs both engines of a pair on one thread, a step of one at a time, and copies KV from one to the other.

- **Two stages.** The prefill engine computes prompts for this worker and for others; the decode engine answers prompts
  that this worker or another one computed. Each has its own pool of blocks.
- **Turns.** ``Turns`` decides which engine steps next and how many prompt tokens a step computes.
- **Loans.** ``Lend`` lends the blocks of the prefill engine.
- **Handoff.** ``PrefillHere`` computes a prompt and copies its KV into the blocks of a decode sequence. Both engines
  launch their kernels in the thread's current stream, so a copy runs behind the step that wrote the KV.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from overfill.engine.decode import DecodeEngine
from overfill.engine.device import on_cpu
from overfill.engine.prefill import PrefillEngine
from overfill.engine.sequence import (
    AwaitingImport,
    ChangeAdapter,
    DecodeEvent,
    Imported,
    Lend,
    PrefillEvent,
    PrefillHere,
    PrefillScheduled,
    PromptComputed,
    Release,
    Reserve,
    SequenceFailed,
    Share,
    Start,
    Submit,
    Yielded,
)
from overfill.engine.turns import Turns
from overfill.engine.work import Runner
from overfill.telemetry.engine_load import EngineLoad

log = logging.getLogger(__name__)

ColocatedEvent = DecodeEvent | AwaitingImport | PrefillScheduled | PromptComputed
"""An event for the decode stage's servicer: of the decode engine, or of a prompt that is computed for it."""


class ColocatedEngine:
    """Single-threaded core of a worker with both stages: ``handle`` takes the messages of both, ``step`` computes.

    Ids of prompts and of decode sequences are distinct. A prompt of ``PrefillHere`` ends with ``PromptComputed`` or
    ``SequenceFailed``, and the engine frees its blocks itself; a later ``Release`` does nothing.

    Args:
        new_prefill: makes the prefill engine from the function that takes its events.
        full, decoder: the engines' runners.
        layer_map: as in ``Runner.copy_kv``.
        emit_prefill: takes the events of prompts that other workers asked for, and of loans.
        emit_decode: takes the events of decode sequences, and of prompts that are computed for them: when one awaits an
            import, when it is scheduled, when its KV is copied, and when it failed.
    """

    def __init__(
        self,
        new_prefill: Callable[[Callable[[list[PrefillEvent]], None]], PrefillEngine],
        decode: DecodeEngine,
        full: Runner,
        decoder: Runner,
        layer_map: Sequence[int],
        turns: Turns,
        emit_prefill: Callable[[list[PrefillEvent]], None],
        emit_decode: Callable[[Sequence[ColocatedEvent]], None],
    ) -> None:
        self._here: dict[str, _Here] = {}  # by the prompt's id
        self._ended: list[PromptComputed | SequenceFailed] = []  # in the running step, of prompts in ``_here``
        self._prefill = new_prefill(_PrefillEvents(self._here, self._ended, emit_prefill, emit_decode))
        self._decode = decode
        self._full = full
        self._decoder = decoder
        self._layer_map = layer_map
        self._turns = turns
        self._emit_decode = emit_decode
        self._stepping: PrefillEngine | DecodeEngine = decode
        self._prompts_blocked = False  # since the latest message, no prompt could be computed

    def load(self) -> EngineLoad:
        """A snapshot of the decode engine's load, with that of the prefill engine."""
        return replace(self._decode.load(), prefill=self._prefill.load())

    @property
    def delay(self) -> float:
        """Seconds until the decode engine's next step is due, while no prompt can be computed."""
        if not self._prompts_blocked and next(self._prefill.queue(), None) is not None:
            return 0.0
        return self._decode.delay

    @property
    def new_loans(self) -> Callable[[], Sequence[Lend]]:
        """As of the prefill engine."""
        return self._prefill.new_loans

    @new_loans.setter
    def new_loans(self, take: Callable[[], Sequence[Lend]]) -> None:
        self._prefill.new_loans = take

    @property
    def step_shape(self) -> tuple[int, int]:
        """Sequences and tokens in the latest step of either engine."""
        return self._stepping.step_shape

    def check(self) -> None:
        """Raises AssertionError when a block of either pool is lost or owned twice."""
        self._prefill.check()
        self._decode.check()

    def close(self) -> None:
        self._prefill.close()
        self._decode.close()

    def handle(
        self,
        message: Submit | PrefillHere | Imported | Lend | Reserve | Share | Start | Yielded | Release | ChangeAdapter,
    ) -> None:
        self._prompts_blocked = False
        match message:
            case PrefillHere(sequence=sequence, into=into):
                target = self._decode.receiving(into)
                if target is not None:  # else the sequence was preempted before the message arrived
                    self._here[sequence.id] = _Here(message, target.blocks)
                    self._prefill.handle(Submit(sequence))
            case Submit() | Imported() | Lend():
                self._prefill.handle(message)
            case Release(id):
                self._here.pop(id, None)
                self._prefill.handle(message)
                self._decode.handle(message)
            case _:
                self._decode.handle(message)

    def step(self) -> bool:
        """Steps one of the two engines. Returns False when neither has anything to compute, now or after ``delay``."""
        waits = self._decode.delay > 0  # asked before the steps: it may be due when they have ended
        if self._turns.decode_first:
            return self._step_decode() or self._step_prefill() or waits
        return self._step_prefill() or self._step_decode() or waits

    def _step_decode(self) -> bool:
        started = time.monotonic()
        self._stepping = self._decode
        if not self._decode.step():
            return False
        self._turns.decoded(None if self._decode.replayed_last else time.monotonic() - started)
        return True

    def _step_prefill(self) -> bool:
        started = time.monotonic()
        oldest, second = (*islice(self._prefill.queue(), 2), None, None)[:2]
        remaining, waited = (0, 0.0) if oldest is None else (oldest.remaining, started - oldest.submitted)
        decoding, before = self._decode.num_running > 0, self._prefill.tokens_computed
        self._stepping = self._prefill
        computed = self._prefill.step(self._turns.chunk(decoding, remaining, waited, alone=second is None))
        self._prompts_blocked = not computed
        if not computed:
            return False
        # A step that samples nothing returns before the device has computed it. Waiting for it to measure it would cost
        # the overlap of steps, which only counts while nothing decodes.
        measured = self._turns.measures and (decoding or on_cpu(self._full.device))
        if measured:
            self._full.synchronize()
        tokens = self._prefill.tokens_computed - before if measured else 0
        self._turns.prefilled(tokens, time.monotonic() - started)
        for event in self._ended:
            self._end(event)
        self._ended.clear()
        return True

    def _end(self, event: PromptComputed | SequenceFailed) -> None:
        """Ends a prompt of this worker: copies its KV and frees its blocks."""
        here = self._here.pop(event.id)
        target = self._decode.receiving(here.message.into)
        # A sequence that was preempted and resumed meanwhile has another list of blocks.
        wanted = target is not None and target.blocks is here.blocks
        if wanted and isinstance(event, PromptComputed):
            event = self._copy(here, event)
        self._prefill.handle(Release(event.id))
        if wanted:
            self._emit_decode([event])

    def _copy(self, here: _Here, computed: PromptComputed) -> PromptComputed | SequenceFailed:
        """Copies the KV of a computed prompt into its decode sequence. Returns the event that ends the prompt."""
        prompt = here.message.sequence
        try:
            self._decoder.copy_kv(
                *(self._full, prompt.blocks, here.blocks, self._layer_map),
                num_tokens=len(prompt.prompt),
                start=here.message.held_tokens,
            )
            if computed.first is None:
                self._decoder.synchronize()  # no step waits before the sequence's KV is read beside the steps
        except Exception as error:
            log.exception("copying KV failed")
            self._decoder.clean_up(error)
            return SequenceFailed(computed.id, error)
        return replace(computed, time_ns=time.monotonic_ns())


@dataclass(frozen=True, slots=True)
class _Here:
    """A prompt of ``PrefillHere``; ``blocks`` is the list of the decode sequence's blocks when the message arrived."""

    message: PrefillHere
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class _PrefillEvents:
    """Passes on what the prefill engine emits, inside a step.

    It has no reference to the ``ColocatedEngine``. A reference cycle would keep the weights and the KV caches in the
    device's memory until Python collects garbage.
    """

    here: Mapping[str, _Here]
    ended: list[PromptComputed | SequenceFailed]
    emit_prefill: Callable[[list[PrefillEvent]], None]
    emit_decode: Callable[[Sequence[ColocatedEvent]], None]

    def __call__(self, events: list[PrefillEvent]) -> None:
        for_others: list[PrefillEvent] = []
        for event in events:
            if event.id not in self.here:
                for_others.append(event)
            elif isinstance(event, AwaitingImport | PrefillScheduled):
                self.emit_decode([event])
            elif isinstance(event, PromptComputed | SequenceFailed):
                self.ended.append(event)
        if for_others:
            self.emit_prefill(for_others)
