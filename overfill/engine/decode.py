"""Decode scheduling: continuous batching of sequences whose prompt KV was received. No sockets, no text.

- **Steps.** Every step computes one token of every running sequence.
- **Replay.** A sequence that arrives with emitted tokens (migrated or preempted) first replays them through the
  decoder. A replay takes a step without decoding sequences, or several steps when it exceeds the replay budget. A
  replay of a few tokens is part of a decode step instead, where the runner computes that cheaply.
- **The prompt's end.** A sequence has the full model's KV up to ``answer_start``, and replays the rest of its prompt.
  These steps are short while answers wait. If the prompt is scored, they score it.
- **Preemption.** When blocks run out, the engine preempts the youngest sequence. It resumes the sequence, before it
  reserves blocks for a new one, when blocks are free again.
- **Returned answers.** A decoder that is the reader computes the KV of its answer as the full model would. Such an
  engine publishes full blocks of the answer in the prefix cache as they fill, so that the next turn finds them.
- **Admission.** The engine admits or resumes a sequence only if one free block remains for each other sequence to grow
  into. Otherwise that sequence would be preempted next, and its fetched KV and replayed tokens would be wasted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from overfill.engine.loans import Loans
from overfill.engine.sequence import (
    AdapterChanged,
    ChangeAdapter,
    DecodeEvent,
    DecodeSequence,
    DecodeState,
    Lend,
    Preempted,
    Refused,
    Release,
    Reserve,
    Reserved,
    SequenceFailed,
    Share,
    Start,
    StepSampled,
    Yielded,
)
from overfill.engine.work import Runner, Work, new_scoring, score_error
from overfill.errors import InternalError, InvalidRequest
from overfill.kv.blocks import BlockPool
from overfill.kv.keys import PromptBlocks, is_raw
from overfill.kv.prefix import PrefixCache
from overfill.telemetry.engine_load import EngineLoad
from overfill.telemetry.metrics import DecodeMetrics

log = logging.getLogger(__name__)

_MAX_PUBLISHED_BLOCKS = 256
"""Maximum number of blocks that the engine publishes in the prefix cache between two steps. Publishing a prompt of
128 k tokens at once takes 25 ms and delays every stream."""

_MAX_PROMPT_BESIDE_ANSWERS = 32
"""Maximum number of prompt tokens in a step while answers wait. Every request with an adapter has some, and the client
chooses how many are scored, so their steps must not delay every answer."""

_MAX_MIXED_REPLAY = 8
"""Maximum number of tokens of a replay that is part of a decode step. With 32 sequences at 1,000 tokens, a replay of 4
tokens costs less than half of what it costs in a step of its own, one of 8 tokens two thirds, and one of 16 as much."""


class DecodeEngine:
    """Single-threaded core of a decode worker: ``handle`` takes messages, ``step`` computes.

    Both call ``emit`` at most once, with a list of events.

    Args:
        max_num_seqs: maximum number of sequences that hold or wait for blocks.
        replay_budget: maximum number of replayed tokens in one step. It bounds the delay of the other sequences, and
            the step's memory.
        prefix: cache on ``pool`` of received prompts. None disables caching.
        metrics: counters of steps, refusals and preemptions; None disables them.
        returns_kv: whether the decoder is the reader (``Pair.returns_kv``). Otherwise the cache never gets KV that the
            decoder wrote.

    Attributes:
        replayed_last: True if the last step replayed known tokens.
        step_shape: sequences and tokens in the latest step.
    """

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        max_num_seqs: int,
        replay_budget: int,
        emit: Callable[[list[DecodeEvent]], None],
        prefix: PrefixCache | None = None,
        metrics: DecodeMetrics | None = None,
        returns_kv: bool = False,
    ) -> None:
        self._runner = runner
        self._returns_kv = returns_kv
        self.metrics = metrics
        self._pool = pool
        self._prefix = prefix or PrefixCache(pool, enabled=False)
        self._max_num_seqs = max_num_seqs
        self._replay_budget = replay_budget
        self._emit = emit
        self._loans = Loans(self._prefix, runner.device)
        self._sequences: dict[str, DecodeSequence] = {}  # in order of arrival, oldest first
        self.replayed_last = False
        self.step_shape = (0, 0)
        self._answers_wait = False  # for the step that replays
        self._unpublished: dict[str, DecodeSequence] = {}  # received, and not yet published completely
        self._publish_quota = _MAX_PUBLISHED_BLOCKS
        self._adapters: set[int] = set()  # slots that have one

    @property
    def delay(self) -> float:
        """0: the next step is always due."""
        return 0.0

    def load(self) -> EngineLoad:
        """A snapshot of the load; ``waiting`` counts sequences without blocks or without complete prompt KV."""
        running = self.num_running
        return EngineLoad(
            self._prefix.num_used,
            self._pool.num_blocks,
            running,
            len(self._sequences) - running,
            blocks_cached=self._prefix.num_cached,
            prefix_tokens_looked_up=self._prefix.tokens_looked_up,
            prefix_tokens_found=self._prefix.tokens_found,
            blocks_reserved=sum(len(s.blocks) for s in self._sequences.values() if s.state is DecodeState.RECEIVING),
            blocks_leaked=self._prefix.num_leaked,
        )

    @property
    def num_running(self) -> int:
        """Number of sequences that have their prompt's KV and their blocks."""
        return sum(s.state is DecodeState.RUNNING for s in self._sequences.values())

    def receiving(self, id: str) -> DecodeSequence | None:
        """The sequence ``id`` if it has blocks and waits for its prompt's KV; else None."""
        sequence = self._sequences.get(id)
        return sequence if sequence is not None and sequence.state is DecodeState.RECEIVING else None

    def check(self) -> None:
        """Raises AssertionError when a block is lost or owned twice."""
        self._prefix.check_owners([*(s.id for s in self._sequences.values() if s.blocks), *self._loans.ids])

    def close(self) -> None:
        """Nothing is held but memory."""

    def handle(self, message: Reserve | Share | Start | Yielded | Lend | Release | ChangeAdapter) -> None:
        events: list[DecodeEvent] = []
        match message:
            case Reserve(sequence):
                events.append(self._reserve(sequence))
            case Share(id, followers):
                events += self._share(id, followers)
            case Start(id, first):
                if started := self._sequences.get(id):
                    self._start(started, first)
            case Yielded(id):
                if (yielding := self._sequences.get(id)) and yielding.state is DecodeState.YIELDING:
                    self._free(yielding)
                    yielding.state = DecodeState.PREEMPTED
            case Lend():
                lent = self._loans.lend(message, awaited=self._any_preempted(), spare=self._num_growing())
                events.append(lent)
            case Release(id):
                if not self._loans.end(id) and (released := self._sequences.pop(id, None)):
                    self._free(released)
            case ChangeAdapter(slot, adapter):
                events.append(self._change_adapter(slot, filled=adapter is not None))
        if events:
            self._emit(events)

    def step(self) -> bool:
        """Computes one token of every running sequence, or replays. Returns False when nothing runs."""
        events: list[DecodeEvent] = []
        self._publish_quota = _MAX_PUBLISHED_BLOCKS
        self._publish()
        ready, starved = self._with_blocks()
        if starved:
            self._preempt_youngest(events)
        else:
            self._resume_preempted(events)
        ready = [s for s in ready if s.state is DecodeState.RUNNING]
        replays = [s for s in ready if s.num_pending > 1]
        decodes = [s for s in ready if s.num_pending == 1]
        self._answers_wait = bool(decodes)
        mixed = self._mixed_replays(replays) if decodes else []
        replays = [s for s in replays if s not in mixed]
        # While there are both, replays and normal steps alternate.
        if replays and (not decodes or not self.replayed_last):
            self.replayed_last = True
            chosen = self._within_budget(replays)
        else:
            self.replayed_last = False
            chosen = [*decodes, *mixed]
        if chosen:
            self.step_shape = (len(chosen), sum(min(s.num_pending, self._budget(s)) for s in chosen))
            events.extend(self._compute(chosen))
        if events:
            self._emit(events)
        return bool(chosen)

    def _change_adapter(self, slot: int, *, filled: bool) -> AdapterChanged:
        if users := sum(sequence.adapter == slot for sequence in self._sequences.values()):
            return AdapterChanged(slot, InternalError(f"{users} sequences use the adapter in slot {slot}"))
        (self._adapters.add if filled else self._adapters.discard)(slot)
        return AdapterChanged(slot)

    def _reserve(self, sequence: DecodeSequence) -> DecodeEvent:
        if sequence.adapter is not None and sequence.adapter not in self._adapters:
            return self._refuse(sequence, "adapter", f"slot {sequence.adapter} has no adapter")
        if len(self._sequences) >= self._max_num_seqs:
            return self._refuse(sequence, "sequences", f"{len(self._sequences)} sequences, this worker's maximum")
        if self._any_preempted():
            return self._refuse(sequence, "preempted", "preempted sequences resume first")
        reserved = self._acquire(sequence)
        if reserved is None:
            needed = self._pool.blocks_for(sequence.num_tokens + 1)
            free, kept = self._prefix.num_available, self._num_growing()
            reason = f"{needed} KV blocks needed; {free} free, {kept} of them kept for running sequences"
            return self._refuse(sequence, "blocks", reason)
        self._sequences[sequence.id] = sequence
        return reserved

    def _any_preempted(self) -> bool:
        return any(s.state in (DecodeState.PREEMPTED, DecodeState.YIELDING) for s in self._sequences.values())

    def _share(self, id: str, followers: Sequence[str]) -> Iterator[Reserved]:
        """Publishes a complete prompt at once, since others wait for it, and gives them its blocks."""
        leader = self._sequences.get(id)
        if leader is not None and leader.blocks:
            self._prefix.publish(id, leader.num_shared)
        for follower in filter(None, map(self.receiving, followers)):
            allocation = self._prefix.extend_cached_prefix(follower.id) or self._prefix.allocation(follower.id)
            follower.blocks = allocation.blocks
            yield Reserved(follower.id, allocation.blocks, allocation.cached_tokens)

    def _refuse(self, sequence: DecodeSequence, kind: str, reason: str) -> Refused:
        if self.metrics is not None:
            self.metrics.refused(kind)
        return Refused(sequence.id, reason)

    def _acquire(self, sequence: DecodeSequence) -> Reserved | None:
        """Acquires blocks for prompt + emitted + 1 tokens, first the cached blocks of the prompt's beginning.

        Returns None, and acquires nothing, when too few blocks are free.
        """
        needed = self._pool.blocks_for(sequence.num_tokens + 1)
        if sequence.prompt_blocks is None:
            shared = sequence.prompt[: sequence.num_shared]
            sequence.prompt_blocks = self._prefix.blocks_of(shared, sequence.cache_namespace)
        whole = sequence.needs_only_kv
        if whole:
            self._publish_what_begins_as(sequence.prompt_blocks)
        allocation = self._prefix.acquire(
            sequence.id, sequence.prompt_blocks, needed, spare=self._num_growing(), whole=whole
        )
        if allocation is None:
            return None
        sequence.blocks = allocation.blocks
        sequence.computed = 0
        if sequence.scores is not None:
            sequence.scores.Clear()
        sequence.state = DecodeState.RECEIVING
        return Reserved(sequence.id, allocation.blocks, allocation.cached_tokens)

    def _num_growing(self) -> int:
        """Number of sequences that run or will run once their KV is complete; each may need one more block."""
        return sum(s.state in (DecodeState.RUNNING, DecodeState.RECEIVING) for s in self._sequences.values())

    def _start(self, sequence: DecodeSequence, first: int | None) -> None:
        if first is not None and not sequence.emitted:
            sequence.emitted.append(first)
        # If the sequence was preempted before this message arrived, its KV is fetched again.
        if sequence.state is DecodeState.RECEIVING:
            sequence.computed = sequence.num_shared
            sequence.state = DecodeState.RUNNING
            self._unpublished[sequence.id] = sequence
            self._publish()

    def _publish(self) -> None:
        """Publishes received prompts in the prefix cache, oldest first, until the step's quota is used up."""
        while self._unpublished and self._publish_quota:
            sequence = next(iter(self._unpublished.values()))
            self._publish_quota -= self._prefix.publish(sequence.id, sequence.num_shared, self._publish_quota)
            if self._publish_quota:
                del self._unpublished[sequence.id]

    def _publish_what_begins_as(self, prompt: PromptBlocks) -> None:
        """Publishes the rest of the prompts that may be this one too, so that their KV is not received again."""
        first = prompt.cache_namespace, prompt.tokens[:1]
        for id, sequence in list(self._unpublished.items()):
            published = sequence.prompt_blocks
            if published is not None and (published.cache_namespace, published.tokens[:1]) == first:
                self._prefix.publish(id, sequence.num_shared)
                del self._unpublished[id]

    def _return_answer(self, sequence: DecodeSequence) -> None:
        """Publishes full blocks that the decoder has computed, if they are what the reader would compute.

        An adapter changes the KV, and so does a lossy codec of the prompt's. At the end of a sequence, what exceeds the
        quota between two steps is lost.
        """
        if not self._returns_kv or sequence.adapter is not None or not is_raw(sequence.cache_namespace):
            return
        known, size = self._prefix.num_publishable(sequence.id), self._pool.block_size
        count = min((sequence.computed - known) // size, self._publish_quota)
        if count > 0:
            self._append(sequence, known, sequence.tokens_from(known)[: count * size])
        self._publish_quota -= self._prefix.publish(sequence.id, sequence.computed, self._publish_quota)

    def _append(self, sequence: DecodeSequence, start: int, tokens: Sequence[int]) -> None:
        self._prefix.append(sequence.id, tokens)

    def _resume_preempted(self, events: list[DecodeEvent]) -> None:
        """Gives free blocks to preempted sequences, oldest first, without overtaking."""
        for sequence in self._sequences.values():
            if sequence.state is not DecodeState.PREEMPTED:
                continue
            reserved = self._acquire(sequence)
            if reserved is None:
                return
            events.append(reserved)

    def _with_blocks(self) -> tuple[list[DecodeSequence], bool]:
        """Extends the running sequences' blocks to their pending tokens.

        Returns:
            Sequences that have enough blocks, oldest first; and True if another one does not.
        """
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
                self._return_answer(sequence)  # the block before the new ones is full
            ready.append(sequence)
        return ready, starved

    def _preempt_youngest(self, events: list[DecodeEvent]) -> None:
        """Preempts the youngest sequence, unless another one is still giving its blocks back."""
        if any(s.state is DecodeState.YIELDING for s in self._sequences.values()):
            return
        victims = (DecodeState.RUNNING, DecodeState.RECEIVING)
        youngest = next(s for s in reversed(self._sequences.values()) if s.state in victims)
        youngest.state = DecodeState.YIELDING
        if self.metrics is not None:
            self.metrics.preempted()
        events.append(Preempted(youngest.id))

    def _mixed_replays(self, replays: Sequence[DecodeSequence]) -> list[DecodeSequence]:
        """Returns the replays that are part of this decode step, oldest first."""
        chosen: list[DecodeSequence] = []
        left = _MAX_PROMPT_BESIDE_ANSWERS
        for sequence in replays if self._runner.mixes_lengths else ():
            if sequence.scores is None and sequence.num_pending <= min(_MAX_MIXED_REPLAY, left):
                chosen.append(sequence)
                left -= sequence.num_pending
        return chosen

    def _within_budget(self, replays: Sequence[DecodeSequence]) -> list[DecodeSequence]:
        """The oldest replays that fit into one step; at least one, even if it exceeds the budget."""
        chosen: list[DecodeSequence] = []
        budget, used = self._replay_budget, 0
        for sequence in replays:
            budget = min(budget, self._budget(sequence))
            used += min(sequence.num_pending, budget)
            if chosen and used > budget:
                break
            chosen.append(sequence)
        return chosen

    def _budget(self, sequence: DecodeSequence) -> int:
        """Maximum number of tokens that a step replays with ``sequence`` in it."""
        budget = self._replay_budget
        if sequence.scores is not None:
            budget = min(budget, self._runner.max_scored)
        if self._answers_wait and sequence.computed < len(sequence.prompt):
            budget = min(budget, _MAX_PROMPT_BESIDE_ANSWERS)
        return budget

    def _compute(self, sequences: list[DecodeSequence]) -> list[DecodeEvent]:
        started = time.monotonic_ns()
        try:
            if sequences[0].num_pending > (budget := self._budget(sequences[0])):
                self._replay_part(sequences[0], budget)
                self._count_step(started, 1, 0, budget if sequences[0].emitted else 0)
                return []
            replayed = sum(s.num_pending - 1 for s in sequences if s.emitted)
            works = [
                Work(s.pending(), s.computed, s.blocks, True, new_scoring(s, s.pending()[1:]), s.adapter)
                for s in sequences
            ]
            sampled, failed = self._runner.next_tokens(works, sequences)
            scored = {row: error for row, s in enumerate(sequences) if (error := score_error(s)) is not None}
            refused = scored | failed
        except Exception as error:
            log.exception("decode step failed")
            self._runner.clean_up(error)
            if self.metrics is not None:
                self.metrics.step_failed()
            for sequence in sequences:
                self._fail(sequence, error)
            return [SequenceFailed(s.id, error) for s in sequences]
        events: list[DecodeEvent] = []
        step = StepSampled(started)
        for row, (sequence, token) in enumerate(zip(sequences, sampled, strict=True)):
            if row in refused:
                self._fail(sequence, refused[row])
                events.append(SequenceFailed(sequence.id, refused[row]))
                continue
            if token.logprob is not None:
                step.details[sequence.id] = token
            if sequence.scores is not None:
                step.scores[sequence.id], sequence.scores = sequence.scores, None
            if step.take(sequence, token.token_id):
                # No kernel touches the blocks any more. They are free before the router learns of the end.
                self._free(sequence)
                del self._sequences[sequence.id]
        if step.ids:
            events.append(step)
        self._count_step(started, len(sequences), len(sequences), replayed)
        return events

    def _count_step(self, started_ns: int, sequences: int, tokens: int, replayed: int) -> None:
        if self.metrics is not None:
            self.metrics.step((time.monotonic_ns() - started_ns) / 1e9, sequences, tokens, replayed)

    def _replay_part(self, sequence: DecodeSequence, budget: int) -> None:
        """Replays the first tokens of a replay that exceeds the budget. It is the step's only sequence."""
        part, scoring = sequence.pending()[:budget], new_scoring(sequence, sequence.pending()[1 : budget + 1])
        work = Work(part, sequence.computed, sequence.blocks, False, scoring, sequence.adapter)
        self._runner.next_tokens([work], [])
        # Sampling would wait for the device, but this step samples nothing. Its blocks may be freed before the next.
        self._runner.synchronize()
        sequence.computed += len(part)

    def _fail(self, sequence: DecodeSequence, error: Exception) -> None:
        sequence.failed = True  # until its Release arrives, it must not be scheduled again
        self._unpublished.pop(sequence.id, None)
        if not isinstance(error, InvalidRequest):  # its KV may be the cause
            self._prefix.forget(sequence.id)

    def _free(self, sequence: DecodeSequence) -> None:
        self._unpublished.pop(sequence.id, None)
        if sequence.blocks and not sequence.failed:
            self._return_answer(sequence)
        self._prefix.release(sequence.id)
        sequence.blocks = []
