"""A modelled decode worker: continuous batching over paged KV. A ``DecodeModel`` gives the time; a phase is one event.

A phase is a series of steps with the same batch. It ends when a sequence ends, joins, moves or is preempted. Each step
attends to one more token per sequence than the last, so the phase's duration is a polynomial, and tokens need no
events. Reservation, refusal and preemption are those of ``engine/decode.py``.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from overfill.lab.simulate.clock import Clock, Event
from overfill.lab.simulate.histogram import Histogram
from overfill.lab.simulate.profiles import Profile
from overfill.v1 import decode_pb2

_TOLERANCE = 1e-9
"""Seconds by which times may differ that are meant to be equal."""


class SequenceState(enum.Enum):
    RECEIVING = "blocks are reserved; KV is arriving"
    JOINING = "KV is complete; runs from the next step on"
    RUNNING = "running"
    PREEMPTED = "its blocks were freed"
    ENDED = "ended"


@dataclass(eq=False, slots=True)
class SimSequence:
    """One answer on a decode worker. Listeners identify it by its object.

    Attributes:
        prompt_tokens, output_tokens: Lengths. The answer ends after ``output_tokens``.
        emitted: Tokens of the answer before the running phase; ``SimDecode.emitted`` adds those of the phase.
        blocks: Blocks held, without those that the running phase takes.
        replay: Emitted tokens that the decoder recomputes when the sequence joins.
    """

    prompt_tokens: int
    output_tokens: int
    emitted: int
    state: SequenceState = SequenceState.RECEIVING
    blocks: int = 0
    replay: int = 0

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.emitted


class DecodeListener(Protocol):
    """The owner of decode workers. ``gaps`` has the seconds between tokens, over all sequences."""

    clock: Clock
    gaps: Histogram

    def answer_done(self, sequence: Any) -> None: ...

    def kv_needed(self, sequence: Any) -> None:
        """A preempted sequence has blocks again and needs its prompt's KV again."""

    def preempted(self, sequence: Any) -> None:
        """A sequence lost its blocks. KV that is still arriving for it is useless."""


class SimDecode:
    """The engine of a modelled decode worker.

    Attributes:
        total: Number of blocks.
        busy: Seconds spent in steps.
        sequences: The sequences on the worker, oldest first.
        on_load: Called when a report of the load would change.
        on_step: Called after a phase with the mean seconds of its steps.
        on_ready: Called when a phase may begin. A worker with both stages replaces it, because its stages take turns.
    """

    def __init__(self, profile: Profile, listener: DecodeListener) -> None:
        self._clock, self._model, self._listener = listener.clock, profile.decode, listener
        self.total = self._model.kv_tokens // self._model.block_size
        self.busy = 0.0
        self.sequences: dict[SimSequence, None] = {}
        self._joining: list[SimSequence] = []
        self._running: dict[SimSequence, None] = {}  # in the order in which they joined
        self._leaving: list[SimSequence] = []
        self._phase: Event | None = None
        self._phase_start = 0.0
        self._phase_steps = 0
        self._context = 0  # tokens that the phase's first step attends to
        self._extra = 0.0  # seconds that replays add to the phase's first step
        self._paused_since: float | None = None  # end of the last phase, if sequences have waited since
        self.on_load: Callable[[], object] = lambda: None
        self.on_step: Callable[[float], object] = lambda seconds: None
        self.on_ready: Callable[[], object] = self.begin_phase

    @property
    def stepping(self) -> bool:
        return self._phase is not None

    @property
    def batch(self) -> int:
        """Number of running sequences."""
        return len(self._running)

    @property
    def runnable(self) -> bool:
        """True if a step would generate a token."""
        return bool(self._running or self._joining)

    @property
    def used(self) -> int:
        """Blocks in use now."""
        return self._held + (self._blocks_taken(self._steps_begun()) if self._phase is not None else 0)

    def reserve(self, sequence: SimSequence) -> bool:
        """Reserves blocks for a sequence. Returns False if the worker refuses."""
        preempted = any(other.state is SequenceState.PREEMPTED for other in self.sequences)
        if preempted or len(self.sequences) >= self._model.max_num_seqs or not self._take_blocks(sequence):
            return False
        self.sequences[sequence] = None
        if self._phase is not None and self._blocks_taken(self._phase_steps) > self.total - self._held:
            self.end_soon()  # the phase would have needed these blocks
        self.on_load()
        return True

    def first_token(self, sequence: SimSequence) -> None:
        """Notes the first token, which the full model sampled."""
        if sequence.state is not SequenceState.RECEIVING or sequence.emitted:
            return
        sequence.emitted = 1
        if sequence.output_tokens == 1:
            self._end(sequence)
            if self._phase is None:
                self.on_ready()

    def kv_arrived(self, sequence: SimSequence) -> None:
        """Notes that all KV of the prompt has arrived. The sequence joins at the next step."""
        if sequence.state is not SequenceState.RECEIVING:
            return
        sequence.state = SequenceState.JOINING
        self._joining.append(sequence)
        if self._phase is None:
            self.on_ready()
        else:
            self.end_soon()

    def release(self, sequence: SimSequence) -> None:
        """Removes a sequence that the router moves or cancels. Its blocks are free after the running step."""
        if sequence.state is SequenceState.RUNNING and self._phase is not None:
            self._leaving.append(sequence)
            self.end_soon()
            return
        if sequence.state is SequenceState.ENDED:
            return
        if sequence.state is SequenceState.JOINING:
            self._joining.remove(sequence)
        self._forget(sequence)
        if self._phase is None:
            self.on_ready()

    def load(self) -> decode_pb2.WorkerLoad:
        return decode_pb2.WorkerLoad(
            kv_blocks_used=self.used,
            kv_blocks_total=self.total,
            block_size=self._model.block_size,
            running=self.batch,
            waiting=len(self.sequences) - self.batch,
        )

    def kill(self) -> None:
        if self._phase is not None:
            self._phase.cancel()
        for sequence in self.sequences:
            sequence.state = SequenceState.ENDED

    def emitted(self, sequence: SimSequence) -> int:
        """Returns the number of tokens that a sequence has emitted so far."""
        if sequence.state is not SequenceState.RUNNING or self._phase is None:
            return sequence.emitted
        return sequence.emitted + self._steps_done()

    def check(self) -> None:
        """Raises AssertionError unless the blocks suffice and agree with the lengths of the running sequences."""
        _require(0 <= self.used <= self.total, f"{self.used} of {self.total} blocks used")
        running = {s for s in self.sequences if s.state is SequenceState.RUNNING}
        _require(running == {*self._running}, "the batch has sequences that do not run, or lacks some")
        counted = all(s.blocks == self._blocks_for(s.length - 1) for s in running)
        _require(counted, "a running sequence has too few blocks, or too many")
        alone = self.on_ready == self.begin_phase
        _require(self.stepping or not (alone and self.runnable), "sequences run in no phase")

    # -- time ------------------------------------------------------------------------------------------------------

    def _seconds(self, steps: int) -> float:
        """Returns the seconds of the phase's first ``steps`` steps."""
        kv = steps * self._context + self.batch * (steps * (steps - 1) // 2)
        return (
            self._extra
            + steps * (self._model.base + self._model.per_sequence * self.batch)
            + self._model.per_kv_token * kv
        )

    def _steps_begun(self) -> int:
        """Returns the number of the phase's steps that have begun; at least 1."""
        passed = self._clock.now - self._phase_start - _TOLERANCE
        return 1 + bisect_left(range(1, self._phase_steps), passed, key=self._seconds)

    def _steps_done(self) -> int:
        passed = self._clock.now - self._phase_start + _TOLERANCE
        return bisect_right(range(1, self._phase_steps + 1), passed, key=self._seconds)

    # -- blocks ----------------------------------------------------------------------------------------------------

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._model.block_size)

    @property
    def _held(self) -> int:
        """Blocks in use, without those that the running phase takes."""
        return sum(sequence.blocks for sequence in self.sequences)

    def _blocks_taken(self, steps: int) -> int:
        """Returns the blocks that the phase's first ``steps`` steps take."""
        return sum(self._blocks_for(s.length - 1 + steps) - s.blocks for s in self._running)

    def _steps_with_room(self, max_steps: int) -> int:
        """Returns how many steps the free blocks allow, up to ``max_steps``."""
        free = self.total - self._held
        if self._blocks_taken(max_steps) <= free:
            return max_steps
        return bisect_right(range(max_steps), free, key=self._blocks_taken) - 1

    def _take_blocks(self, sequence: SimSequence) -> bool:
        """Gives a sequence without blocks those for its tokens and one more. Returns False if too few are free.

        For each sequence that holds blocks, one must remain free.
        """
        blocks = self._blocks_for(sequence.length + 1)
        growing = sum(other.state is not SequenceState.PREEMPTED for other in self.sequences)
        if blocks + growing > self.total - self.used:
            return False
        sequence.blocks = blocks
        return True

    # -- phases ----------------------------------------------------------------------------------------------------

    def end_soon(self) -> None:
        """Ends the running phase after its current step, so that the next one begins with the latest changes."""
        assert self._phase is not None
        steps = self._steps_begun()
        if steps < self._phase_steps:
            self._phase_steps = steps
            self._phase.cancel()
            self._phase = self._clock.at(self._phase_start + self._seconds(steps), self._end_phase)

    def begin_phase(self, max_steps: int | None = None) -> None:
        """Begins a phase of at most ``max_steps`` steps, if a sequence can run."""
        for sequence in self._joining:
            sequence.state = SequenceState.RUNNING
            self._running[sequence] = None
            self._extra += sequence.replay * self._model.replay_per_token
            sequence.replay = 0
            # The last token's KV is not written yet. The step that writes it takes the block, as for all later tokens.
            sequence.blocks = self._blocks_for(sequence.length - 1)
        self._joining.clear()
        steps = 0
        while self._running and not steps:
            steps = self._steps_with_room(min(s.output_tokens - s.emitted for s in self._running))
            if not steps:
                self._preempt_youngest()
        self._resume_preempted()
        if not self._running:
            return
        self._context = sum(sequence.length for sequence in self._running)
        steps = self._steps_with_room(min(steps, max_steps or steps))
        self._phase_start, self._phase_steps = self._clock.now, steps
        self._phase = self._clock.after(self._seconds(steps), self._end_phase)

    def _end_phase(self) -> None:
        steps, self._phase = self._phase_steps, None
        seconds, first = self._seconds(steps), self._seconds(1)
        self.busy += seconds
        self.on_step(seconds / steps)
        paused = 0.0 if self._paused_since is None else self._phase_start - self._paused_since
        self._listener.gaps.add(paused + first, self.batch)
        if steps > 1:
            self._listener.gaps.add((seconds - first) / (steps - 1), self.batch * (steps - 1))
        self._extra = 0.0
        for sequence in self._running:
            sequence.emitted += steps
            sequence.blocks = self._blocks_for(sequence.length - 1)
        for sequence in [s for s in self._running if s.emitted == s.output_tokens]:
            self._end(sequence)
        for sequence in self._leaving:
            if sequence.state is SequenceState.RUNNING:
                self._forget(sequence)
        self._leaving.clear()
        self._paused_since = self._clock.now if self._running else None
        self.on_ready()
        self.on_load()

    def _end(self, sequence: SimSequence) -> None:
        self._forget(sequence)
        self._listener.answer_done(sequence)

    def _forget(self, sequence: SimSequence) -> None:
        sequence.state, sequence.blocks = SequenceState.ENDED, 0
        self.sequences.pop(sequence, None)
        self._running.pop(sequence, None)
        self.on_load()

    def _preempt_youngest(self) -> None:
        victim = next(
            s for s in reversed(self.sequences) if s.state in (SequenceState.RUNNING, SequenceState.RECEIVING)
        )
        self._running.pop(victim, None)
        victim.state, victim.blocks = SequenceState.PREEMPTED, 0
        self._listener.preempted(victim)

    def _resume_preempted(self) -> None:
        """Gives free blocks to preempted sequences, strictly oldest first."""
        for sequence in [s for s in self.sequences if s.state is SequenceState.PREEMPTED]:
            if not self._take_blocks(sequence):
                return
            sequence.state = SequenceState.RECEIVING
            sequence.replay = max(0, sequence.emitted - 1)
            self._listener.kv_needed(sequence)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
