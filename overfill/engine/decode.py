"""Decode scheduling: continuous batching of sequences whose prompt KV came from elsewhere. No sockets, no text.

Every step computes one token of every running sequence. Sequences that come with emitted tokens (migrated or
preempted) first replay them through the decoder in one pass, in a step of their own, or in several when they are many.
When blocks run out, the youngest sequence loses its own; it comes back, before anything new is reserved, when blocks
are free again. Nobody comes or comes back unless a block is left over for each of the others to grow into: it would be
the next to lose its own, and all that was fetched and replayed for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from overfill.engine.runner import Choice, ModelRunner, Work
from overfill.engine.sequence import (
    DecodeEvent,
    DecodeSequence,
    DecodeState,
    EngineLoad,
    Preempted,
    Refused,
    Release,
    Reserve,
    Reserved,
    SequenceFailed,
    Start,
    TokenSampled,
    Yielded,
)
from overfill.kv.blocks import BlockPool
from overfill.kv.prefix import PrefixCache
from overfill.telemetry.metrics import DecodeMetrics

log = logging.getLogger(__name__)

_MAX_PUBLISHED = 256
"""Most blocks of received prompts that are shared between two steps. Sharing a prompt of 128 k tokens at once takes
25 ms and delays every stream."""


class DecodeEngine:
    """Single-threaded core: ``handle`` messages and ``step``; events go to ``emit`` in one list per call.

    Args:
        max_num_seqs: most sequences that hold or wait for blocks at once.
        replay_budget: most replayed tokens in one step, so that a replay neither holds up the others for long nor takes
            more memory than was set aside for a step.
        prefix: cache on ``pool`` of prompts received before, never of what the decoder wrote; None keeps nothing.
        metrics: told of steps, refusals and preemptions; None counts nothing.
    """

    def __init__(
        self,
        runner: ModelRunner,
        pool: BlockPool,
        max_num_seqs: int,
        replay_budget: int,
        emit: Callable[[list[DecodeEvent]], None],
        prefix: PrefixCache | None = None,
        metrics: DecodeMetrics | None = None,
    ) -> None:
        self._runner = runner
        self.metrics = metrics
        self._pool = pool
        self._prefix = prefix or PrefixCache(pool, enabled=False)
        self._max_num_seqs = max_num_seqs
        self._replay_budget = replay_budget
        self._emit = emit
        self._sequences: dict[str, DecodeSequence] = {}  # in order of arrival: oldest first
        self._replayed_last = False
        self._unpublished: dict[str, DecodeSequence] = {}  # received, and not yet shared as a whole
        self._may_publish = _MAX_PUBLISHED

    def load(self) -> EngineLoad:
        """``waiting`` counts sequences whose KV or blocks are not there yet."""
        running = sum(s.state is DecodeState.RUNNING for s in self._sequences.values())
        waiting = len(self._sequences) - running
        return EngineLoad(
            self._prefix.num_used,
            self._pool.num_blocks,
            running,
            waiting,
            blocks_cached=self._prefix.num_cached,
            prefix_tokens_looked_up=self._prefix.tokens_looked_up,
            prefix_tokens_found=self._prefix.tokens_found,
            blocks_reserved=sum(len(s.blocks) for s in self._sequences.values() if s.state is DecodeState.RECEIVING),
            blocks_leaked=self._prefix.num_leaked,
        )

    def check(self) -> None:
        """Raises AssertionError when a block is lost or owned twice."""
        self._prefix.check_owners(s.id for s in self._sequences.values() if s.blocks)

    def handle(self, message: Reserve | Start | Yielded | Release) -> None:
        events: list[DecodeEvent] = []
        match message:
            case Reserve(sequence):
                events.append(self._reserve(sequence))
            case Start(id, first):
                if started := self._sequences.get(id):
                    self._start(started, first)
            case Yielded(id):
                if (yielding := self._sequences.get(id)) and yielding.state is DecodeState.YIELDING:
                    self._free(yielding)
                    yielding.state = DecodeState.PREEMPTED
            case Release(id):
                if released := self._sequences.pop(id, None):
                    self._free(released)
        if events:
            self._emit(events)

    def step(self) -> bool:
        """Computes one token of every running sequence, or one replay. False when nothing runs."""
        events: list[DecodeEvent] = []
        self._may_publish = _MAX_PUBLISHED
        self._publish()
        ready, starved = self._with_room()
        if starved:
            self._preempt_youngest(events)
        else:  # what is free may go to those that lost theirs
            self._resume_preempted(events)
        ready = [s for s in ready if s.state is DecodeState.RUNNING]
        replays = [s for s in ready if len(s.pending()) > 1]
        decodes = [s for s in ready if len(s.pending()) == 1]
        # Replays and normal steps take turns while there are both.
        if replays and (not decodes or not self._replayed_last):
            self._replayed_last = True
            chosen = self._within_budget(replays)
        else:
            self._replayed_last = False
            chosen = decodes
        if chosen:
            events.extend(self._compute(chosen))
        if events:
            self._emit(events)
        return bool(chosen)

    def _reserve(self, sequence: DecodeSequence) -> DecodeEvent:
        if len(self._sequences) >= self._max_num_seqs:
            return self._refuse(sequence, "sequences", f"{len(self._sequences)} sequences, the most this worker takes")
        if any(s.state in (DecodeState.PREEMPTED, DecodeState.YIELDING) for s in self._sequences.values()):
            return self._refuse(sequence, "preempted", "preempted sequences come first")
        reserved = self._acquire(sequence)
        if reserved is None:
            wanted = self._pool.blocks_for(sequence.num_tokens + 1)
            free, spare = self._prefix.num_available, self._num_growing()
            return self._refuse(sequence, "blocks", f"{wanted} KV blocks wanted, {free} free, {spare} of them to spare")
        self._sequences[sequence.id] = sequence
        return reserved

    def _refuse(self, sequence: DecodeSequence, kind: str, reason: str) -> Refused:
        if self.metrics is not None:
            self.metrics.refused(kind)
        return Refused(sequence.id, reason)

    def _acquire(self, sequence: DecodeSequence) -> Reserved | None:
        """Blocks for prompt + emitted + 1 tokens, those first that hold the start of the prompt."""
        wanted = self._pool.blocks_for(sequence.num_tokens + 1)
        if sequence.prompt_blocks is None:
            sequence.prompt_blocks = self._prefix.blocks_of(sequence.prompt, sequence.cache_namespace)
        grant = self._prefix.acquire(sequence.id, sequence.prompt_blocks, wanted, spare=self._num_growing())
        if grant is None:
            return None
        sequence.blocks = grant.blocks
        sequence.computed = 0
        sequence.state = DecodeState.RECEIVING
        return Reserved(sequence.id, grant.blocks, grant.cached_tokens)

    def _num_growing(self) -> int:
        """Sequences that run, or will as soon as their KV is there."""
        return sum(s.state in (DecodeState.RUNNING, DecodeState.RECEIVING) for s in self._sequences.values())

    def _start(self, sequence: DecodeSequence, first: int | None) -> None:
        if first is not None and not sequence.emitted:
            sequence.emitted.append(first)
        # A start may cross a preemption on its way here; the KV is then fetched again.
        if sequence.state is DecodeState.RECEIVING:
            sequence.computed = len(sequence.prompt)
            sequence.state = DecodeState.RUNNING
            self._unpublished[sequence.id] = sequence
            self._publish()

    def _publish(self) -> None:
        """Shares received prompts, oldest first, as far as blocks may be shared before the next step."""
        while self._unpublished and self._may_publish:
            sequence = next(iter(self._unpublished.values()))
            self._may_publish -= self._prefix.publish(sequence.id, len(sequence.prompt), self._may_publish)
            if self._may_publish:
                del self._unpublished[sequence.id]

    def _resume_preempted(self, events: list[DecodeEvent]) -> None:
        """Gives free blocks to preempted sequences, oldest first; none overtakes another."""
        for sequence in self._sequences.values():
            if sequence.state is not DecodeState.PREEMPTED:
                continue
            reserved = self._acquire(sequence)
            if reserved is None:
                return
            events.append(reserved)

    def _with_room(self) -> tuple[list[DecodeSequence], bool]:
        """Running sequences that have blocks for their pending tokens, oldest first; and whether others lack them."""
        ready: list[DecodeSequence] = []
        starved = False
        for sequence in self._sequences.values():
            if sequence.state is not DecodeState.RUNNING or sequence.failed:
                continue
            lacking = self._pool.blocks_for(sequence.num_tokens) - len(sequence.blocks)
            if lacking > 0:
                blocks = self._prefix.extend(sequence.id, lacking)
                if blocks is None:
                    starved = True
                    continue
                sequence.blocks += blocks
            ready.append(sequence)
        return ready, starved

    def _preempt_youngest(self, events: list[DecodeEvent]) -> None:
        """One at a time: while a sequence is giving its blocks back, nobody else has to."""
        if any(s.state is DecodeState.YIELDING for s in self._sequences.values()):
            return
        victims = (DecodeState.RUNNING, DecodeState.RECEIVING)
        youngest = next(s for s in reversed(self._sequences.values()) if s.state in victims)
        youngest.state = DecodeState.YIELDING
        if self.metrics is not None:
            self.metrics.preempted()
        events.append(Preempted(youngest.id))

    def _within_budget(self, replays: Sequence[DecodeSequence]) -> list[DecodeSequence]:
        chosen: list[DecodeSequence] = []
        budget = self._replay_budget
        for sequence in replays:
            budget -= min(len(sequence.pending()), self._replay_budget)
            if budget < 0:
                break
            chosen.append(sequence)
        return chosen

    def _compute(self, sequences: list[DecodeSequence]) -> list[DecodeEvent]:
        started = time.monotonic_ns()
        try:
            if len(sequences[0].pending()) > self._replay_budget:
                self._replay_part(sequences[0])
                self._count_step(started, 1, 0, self._replay_budget)
                return []
            replayed = sum(len(s.pending()) - 1 for s in sequences)
            works = [Work(s.pending(), s.computed, s.blocks, wants_logits=True) for s in sequences]
            choices = [Choice(s.sampling, s.sample_index, s.processor, s.emitted) for s in sequences]
            sampled, refused = self._runner.next_tokens(works, choices)
        except Exception as error:
            log.exception("decode step failed")
            self._runner.clean_up(error)
            if self.metrics is not None:
                self.metrics.step_failed()
            for sequence in sequences:
                sequence.failed = True  # not scheduled again; its Release is on the way
            return [SequenceFailed(s.id, error) for s in sequences]
        events: list[DecodeEvent] = []
        for row, (sequence, token) in enumerate(zip(sequences, sampled, strict=True)):
            if row in refused:
                sequence.failed = True
                events.append(SequenceFailed(sequence.id, refused[row]))
                continue
            sequence.computed = sequence.num_tokens
            index = len(sequence.emitted)
            emitted, finish = sequence.stop.judge(token.token_id, index)
            if emitted:
                sequence.emitted.append(token.token_id)
            if finish is not None:
                # Nothing touches the blocks any more; they are free before the router hears of it.
                self._free(sequence)
                del self._sequences[sequence.id]
            events.append(TokenSampled(sequence.id, index, token if emitted else None, finish, started))
        self._count_step(started, len(sequences), len(sequences), replayed)
        return events

    def _count_step(self, started_ns: int, sequences: int, tokens: int, replayed: int) -> None:
        if self.metrics is not None:
            self.metrics.step((time.monotonic_ns() - started_ns) / 1e9, sequences, tokens, replayed)

    def _replay_part(self, sequence: DecodeSequence) -> None:
        """The first tokens of a replay that is longer than the budget and therefore alone in its step."""
        part = sequence.pending()[: self._replay_budget]
        self._runner.run([Work(part, sequence.computed, sequence.blocks, wants_logits=False)])
        # No token is read from the device, which would wait for it; the blocks may be freed before the next step.
        self._runner.synchronize()
        sequence.computed += len(part)

    def _free(self, sequence: DecodeSequence) -> None:
        self._unpublished.pop(sequence.id, None)
        self._prefix.release(sequence.id)
        sequence.blocks = []
