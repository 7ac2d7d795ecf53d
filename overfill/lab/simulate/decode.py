"""A modelled decode worker: continuous batching over paged KV. A ``DecodeModel`` gives the time; a phase is one event.

A phase is a series of steps with the same batch. It ends when a sequence ends, joins, moves or is preempted. Each step
attends to one more token per sequence than the last, so the phase's duration is a polynomial, and tokens need no
events. Reservation, refusal and preemption are those of ``engine/decode.py``.
"""

from __future__ import annotations

import enum
import heapq
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from overfill.lab.simulate.clock import Clock, Event
from overfill.lab.simulate.histogram import Histogram
from overfill.lab.simulate.profiles import Profile


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
        emitted: Tokens of the answer when it last joined the batch; ``SimDecode.emitted`` adds those since.
        reserved: Blocks held while the sequence is not running.
        joined: Number of the worker's step at which it joined.
        replay: Emitted tokens that the decoder recomputes when the sequence joins.
    """

    prompt_tokens: int
    output_tokens: int
    emitted: int
    state: SequenceState = SequenceState.RECEIVING
    reserved: int = 0
    joined: int = 0
    replay: int = 0


class DecodeListener(Protocol):
    def answer_done(self, sequence: Any) -> None: ...

    def kv_needed(self, sequence: Any) -> None:
        """A preempted sequence has blocks again and needs its prompt's KV again."""

    def preempted(self, sequence: Any) -> None:
        """A sequence lost its blocks. KV that is still arriving for it is useless."""


class SimDecode:
    """The engine of a modelled decode worker.

    Attributes:
        gaps: Seconds between tokens, over all sequences.
        busy: Seconds spent in steps.
        steps: Number of steps of all phases that have ended.
        batch: Number of running sequences.
        sequences: The sequences on the worker, oldest first.
        on_ready: Called when a phase may begin. A worker with both stages replaces it, because its stages take turns.
    """

    def __init__(
        self,
        clock: Clock,
        profile: Profile,
        listener: DecodeListener,
        gaps: Histogram,
        load_changed: Callable[[], object],
    ) -> None:
        model = profile.decode
        self._clock, self._model, self._listener, self.gaps = clock, model, listener, gaps
        self._load_changed = load_changed
        self.total = model.kv_tokens // model.block_size
        self.busy = 0.0
        self._reserved = 0  # blocks held, without those that the running phase takes
        self.sequences: dict[SimSequence, None] = {}
        self._num_preempted = 0
        self._joining: list[SimSequence] = []
        self._leaving: list[SimSequence] = []
        self._heap: list[tuple[int, int, SimSequence]] = []  # (step after which it ends, order, sequence)
        self._order = 0
        self.batch = 0
        self._context = 0  # tokens that the next step attends to
        self._crossings = [0] * model.block_size  # step modulo block_size -> sequences that take a block in it
        self.steps = 0
        self._phase: Event | None = None
        self._phase_start = 0.0
        self._phase_steps = 0
        self._extra = 0.0  # seconds that replays add to the phase's first step
        self._paused_since: float | None = None  # end of the last phase, if sequences have waited since
        self.on_ready: Callable[[], object] = self.begin_phase

    @property
    def stepping(self) -> bool:
        return self._phase is not None

    @property
    def runnable(self) -> bool:
        """True if a step would generate a token."""
        return bool(self.batch or self._joining)

    @property
    def used(self) -> int:
        """Blocks in use now."""
        return self._reserved + (self._blocks_taken(self._steps_begun()) if self._phase is not None else 0)

    def reserve(self, sequence: SimSequence) -> bool:
        """Reserves blocks for prompt + emitted + 1 tokens. Returns False if the worker refuses."""
        if len(self.sequences) >= self._model.max_num_seqs or self._num_preempted:
            return False
        blocks = self._blocks_for(sequence.prompt_tokens + sequence.emitted + 1)
        if blocks + self._num_growing > self.total - self.used:
            return False
        sequence.reserved = blocks
        self._reserved += blocks
        if self._phase is not None and self._blocks_taken(self._phase_steps) > self.total - self._reserved:
            self.end_soon()  # the phase would have needed these blocks
        self.sequences[sequence] = None
        self._load_changed()
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
        self._cut()

    def release(self, sequence: SimSequence) -> None:
        """Removes a sequence that the router moves or cancels. Its blocks are free after the running step."""
        if sequence.state is SequenceState.RUNNING:
            self._leaving.append(sequence)
            if self._phase is None:
                self._let_leave()
            self._cut()
            return
        if sequence.state is SequenceState.ENDED:
            return
        if sequence.state is SequenceState.JOINING:
            self._joining.remove(sequence)
        if sequence.state is SequenceState.PREEMPTED:
            self._num_preempted -= 1
        self._forget(sequence)
        if self._phase is None:
            self.on_ready()

    def kill(self) -> None:
        if self._phase is not None:
            self._phase.cancel()
        for sequence in self.sequences:
            sequence.state = SequenceState.ENDED

    def emitted(self, sequence: SimSequence) -> int:
        """Returns the number of tokens that a sequence has emitted so far."""
        if sequence.state is not SequenceState.RUNNING:
            return sequence.emitted
        done = self._steps_done() if self._phase is not None else 0
        return sequence.emitted + self.steps + done - sequence.joined

    def check(self) -> None:
        """Raises AssertionError unless the counters agree with the sequences."""
        held = sum(self._blocks_held(sequence) for sequence in self.sequences)
        _require(held == self._reserved, f"{held} blocks held, {self._reserved} counted")
        _require(0 <= self.used <= self.total, f"{self.used} of {self.total} blocks used")
        running = sum(sequence.state is SequenceState.RUNNING for sequence in self.sequences)
        _require(running == self.batch == len(self._heap), f"{running} run, {self.batch} counted")
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

    def _steps_within(self, seconds: float) -> float:
        """Returns how many steps of the phase fit into ``seconds``, with a fraction for the step that has begun."""
        seconds -= self._extra
        if seconds <= 0:
            return 0.0
        square = self._model.per_kv_token * self.batch / 2
        line = (
            self._model.base
            + self._model.per_sequence * self.batch
            + self._model.per_kv_token * (self._context - self.batch / 2)
        )
        if square <= 1e-18:
            return seconds / line
        return (math.sqrt(line * line + 4 * square * seconds) - line) / (2 * square)

    def _steps_begun(self) -> int:
        """Returns the number of the phase's steps that have begun; at least 1."""
        return min(self._phase_steps, max(1, math.ceil(self._steps_within(self._clock.now - self._phase_start) - 1e-6)))

    def _steps_done(self) -> int:
        return min(self._phase_steps, math.floor(self._steps_within(self._clock.now - self._phase_start) + 1e-6))

    # -- blocks ----------------------------------------------------------------------------------------------------

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._model.block_size)

    def _blocks_held(self, sequence: SimSequence) -> int:
        if sequence.state is SequenceState.RUNNING:
            # The next step writes the last token's KV and takes the block for it.
            tokens = sequence.prompt_tokens + sequence.emitted + self.steps - sequence.joined - 1
            return self._blocks_for(tokens)
        return sequence.reserved

    def _blocks_taken(self, steps: int) -> int:
        """Returns the blocks that the phase's first ``steps`` steps take."""
        size = self._model.block_size
        rounds, rest = divmod(steps, size)
        return rounds * self.batch + sum(self._crossings[(self.steps + step) % size] for step in range(rest))

    def _steps_with_room(self, max_steps: int) -> int:
        """Returns how many steps the free blocks allow, up to ``max_steps``."""
        free = self.total - self._reserved
        if self._blocks_taken(max_steps) <= free:
            return max_steps
        return bisect_right(range(max_steps), free, key=self._blocks_taken) - 1

    @property
    def _num_growing(self) -> int:
        """Sequences that hold blocks. For each, one free block must remain when another is admitted or resumed."""
        return len(self.sequences) - self._num_preempted

    # -- phases ----------------------------------------------------------------------------------------------------

    def _cut(self) -> None:
        """Ends the phase after the current step, so that the next one begins with the latest changes."""
        if self._phase is None:
            self.on_ready()
        else:
            self.end_soon()

    def end_soon(self) -> None:
        """Ends the running phase after its current step."""
        assert self._phase is not None
        steps = self._steps_begun()
        if steps < self._phase_steps:
            self._phase_steps = steps
            self._phase.cancel()
            self._phase = self._clock.at(self._phase_start + self._seconds(steps), self._end_phase)

    def begin_phase(self, max_steps: int | None = None) -> None:
        """Begins a phase of at most ``max_steps`` steps, if a sequence can run."""
        joined, self._joining = self._joining, []
        for sequence in joined:
            self._join(sequence)
        steps = 0
        while self.batch and not (steps := self._steps_with_room(self._heap[0][0] - self.steps)):
            self._preempt_youngest()
        self._resume_preempted()
        if not self.batch:
            return
        steps = self._steps_with_room(min(steps, max_steps or steps))
        self._phase_start, self._phase_steps = self._clock.now, steps
        self._phase = self._clock.after(self._seconds(steps), self._end_phase)

    def _end_phase(self) -> None:
        steps, self._phase = self._phase_steps, None
        seconds = self._seconds(steps)
        self.busy += seconds
        first = self._seconds(1)
        paused = 0.0 if self._paused_since is None else self._phase_start - self._paused_since
        self.gaps.add(paused + first, self.batch)
        if steps > 1:
            self.gaps.add((seconds - first) / (steps - 1), self.batch * (steps - 1))
        self._extra = 0.0
        self._reserved += self._blocks_taken(steps)
        self.steps += steps
        self._context += steps * self.batch
        while self._heap and self._heap[0][0] == self.steps:
            sequence = self._heap[0][2]
            self._leave(sequence)
            self._end(sequence)
        self._let_leave()
        self._paused_since = self._clock.now if self.batch else None
        self.on_ready()
        self._load_changed()

    def _let_leave(self) -> None:
        for sequence in self._leaving:
            if sequence.state is SequenceState.RUNNING:
                self._leave(sequence)
                self._forget(sequence)
        self._leaving.clear()

    def _join(self, sequence: SimSequence) -> None:
        length = sequence.prompt_tokens + sequence.emitted  # the last token's KV is not written yet
        sequence.state, sequence.joined = SequenceState.RUNNING, self.steps
        if sequence.replay:
            self._extra += sequence.replay * self._model.replay_per_token
            sequence.replay = 0
        # The step that writes the last token's KV takes the block for it, as for all later tokens.
        held = self._blocks_for(length - 1)
        self._reserved -= sequence.reserved - held
        sequence.reserved = held
        self._crossings[self._crossing(sequence, length)] += 1
        self.batch += 1
        self._context += length
        self._order += 1
        ends = self.steps + sequence.output_tokens - sequence.emitted
        heapq.heappush(self._heap, (ends, self._order, sequence))

    def _crossing(self, sequence: SimSequence, length: int) -> int:
        """Returns the steps, modulo block size, that take a block for a sequence of ``length`` tokens at its start."""
        return (sequence.joined - (length - 1)) % self._model.block_size

    def _leave(self, sequence: SimSequence) -> None:
        """Removes a sequence from the batch between two phases."""
        if self._heap[0][2] is sequence:
            heapq.heappop(self._heap)
        else:
            self._heap = [entry for entry in self._heap if entry[2] is not sequence]
            heapq.heapify(self._heap)
        length = sequence.prompt_tokens + sequence.emitted
        steps = self.steps - sequence.joined
        self._crossings[self._crossing(sequence, length)] -= 1
        self.batch -= 1
        self._context -= length + steps
        sequence.reserved = self._blocks_held(sequence)
        sequence.emitted += steps
        sequence.state = SequenceState.PREEMPTED

    def _end(self, sequence: SimSequence) -> None:
        self._forget(sequence)
        self._listener.answer_done(sequence)

    def _forget(self, sequence: SimSequence) -> None:
        self._reserved -= sequence.reserved
        sequence.reserved = 0
        sequence.state = SequenceState.ENDED
        self.sequences.pop(sequence, None)
        self._load_changed()

    def _preempt_youngest(self) -> None:
        victim = next(
            s for s in reversed(self.sequences) if s.state in (SequenceState.RUNNING, SequenceState.RECEIVING)
        )
        if victim.state is SequenceState.RUNNING:
            self._leave(victim)
        victim.state = SequenceState.PREEMPTED
        self._reserved -= victim.reserved
        victim.reserved = 0
        self._num_preempted += 1
        self._listener.preempted(victim)

    def _resume_preempted(self) -> None:
        """Gives free blocks to preempted sequences, strictly oldest first."""
        if not self._num_preempted:
            return
        for sequence in list(self.sequences):
            if sequence.state is not SequenceState.PREEMPTED:
                continue
            blocks = self._blocks_for(sequence.prompt_tokens + sequence.emitted + 1)
            if blocks + self._num_growing > self.total - self._reserved:
                return
            sequence.reserved = blocks
            sequence.state = SequenceState.RECEIVING
            sequence.replay = max(0, sequence.emitted - 1)
            self._reserved += blocks
            self._num_preempted -= 1
            self._listener.kv_needed(sequence)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
