"""Prefill scheduling: chunked prefill with the full model under a token budget. No sockets, no text.

- **Blocks.** Prompts get blocks in order of arrival, each all of its blocks at once. Tokens whose KV is in the prefix
  cache are not computed again.
- **Budget.** The oldest prompt gets the tokens it needs, or half of the budget if it needs more than all of it. The
  rest goes to the other prompts, those with the fewest remaining tokens first. What they leave goes to the oldest.
- **Fairness.** A short prompt waits for shorter ones only, never for a long prompt as a whole. The oldest prompt
  finishes, or advances by at least half of the budget, in every step.
- **Scores.** A prompt whose tokens are all scored needs the logits of each, so that it takes nothing from the prefix
  cache and puts nothing into it. A step scores a limited number of tokens, which bounds its memory.
- **Sharing.** A prompt that has not started waits while another one computes or imports its next block. It then starts
  behind that block, which it takes from the prefix cache.
- **Importing.** A prompt whose servicer may import KV is not computed from ``AwaitingImport`` until ``Imported``. The
  servicer owns its unpublished blocks meanwhile, and the engine replaces none of them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from overfill.engine.device import on_cpu, record_event
from overfill.engine.layers import LayerReports
from overfill.engine.loans import Loans
from overfill.engine.sequence import (
    AwaitingImport,
    ChunkComputed,
    Imported,
    LayerStarted,
    Lend,
    PrefillEvent,
    PrefillScheduled,
    PrefillSequence,
    PromptComputed,
    Release,
    SequenceFailed,
    Submit,
)
from overfill.engine.token_cost import TokenCost
from overfill.engine.work import Runner, Scoring, Work, new_scoring, score_error
from overfill.errors import InvalidRequest
from overfill.kv.blocks import BlockPool
from overfill.kv.prefix import PrefixCache
from overfill.model.steps import LayerHooks
from overfill.telemetry.engine_load import EngineLoad
from overfill.telemetry.metrics import PrefillMetrics

log = logging.getLogger(__name__)


class _Abandoned(Exception):
    """Raised between two layers when all requests of the step are cancelled."""


class PrefillEngine:
    """Single-threaded core of a prefill worker: ``handle`` takes messages, ``step`` computes.

    A step calls ``emit`` several times, with lists of events.

    Args:
        max_num_batched_tokens: maximum number of prompt tokens in one step.
        max_num_seqs: maximum number of prompts that hold blocks.
        prefix: prefix cache on ``pool``. None means that a released prompt's KV is dropped.
        metrics: counters of steps; None disables them.

    Attributes:
        new_loans: returns loans that were asked for since its last call; called between two layers of a step.
        tokens_computed: prompt tokens of all steps so far.
        step_shape: prompts and tokens in the latest step.
    """

    delay = 0.0

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        emit: Callable[[list[PrefillEvent]], None],
        prefix: PrefixCache | None = None,
        metrics: PrefillMetrics | None = None,
    ) -> None:
        self._runner = runner
        self._metrics = metrics
        self._pool = pool
        self._prefix = prefix or PrefixCache(pool, enabled=False)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._emit = emit
        self._loans = Loans(self._prefix, runner.device)
        self.new_loans: Callable[[], Sequence[Lend]] = tuple
        self._token_cost = TokenCost()
        self._step_ended = True  # not only launched
        self.tokens_computed = 0
        self.step_shape = (0, 0)
        self._events: list[PrefillEvent] = []  # not yet emitted
        self._waiting: deque[PrefillSequence] = deque()
        self._awaits_blocks = False  # the first waiting one
        self._running: dict[str, PrefillSequence] = {}  # in order of arrival
        self._importing: set[str] = set()  # those running ones whose servicer may write their blocks
        self._awaiting_release: dict[str, PrefillSequence] = {}  # computed and leased to the decode worker, or failed

    def load(self) -> EngineLoad:
        """A snapshot of the load; ``running`` counts prompts that hold blocks until their ``Release``."""
        uncomputed = sum(s.remaining for s in (*self._waiting, *self._running.values()))
        return EngineLoad(
            blocks_used=self._prefix.num_used,
            blocks_total=self._pool.num_blocks,
            running=self._num_admitted,
            waiting=len(self._waiting),
            queued_tokens=uncomputed,
            blocks_cached=self._prefix.num_cached,
            prefix_tokens_looked_up=self._prefix.tokens_looked_up,
            prefix_tokens_found=self._prefix.tokens_found,
            blocks_reserved=sum(self._pool.blocks_for(s.remaining) for s in self._running.values()),
            blocks_leaked=self._prefix.num_leaked,
            token_seconds=self._token_cost.seconds,
        )

    @property
    def _num_admitted(self) -> int:
        return len(self._running) + len(self._awaiting_release)

    def check(self) -> None:
        """Raises AssertionError when a block is lost or owned twice."""
        holders = (*self._running.values(), *self._awaiting_release.values())
        self._prefix.check_owners([*(s.id for s in holders if s.blocks), *self._loans.ids])

    def close(self) -> None:
        """Nothing is held but memory."""

    def handle(self, message: Submit | Imported | Lend | Release) -> None:
        match message:
            case Submit(sequence):
                sequence.submitted = time.monotonic()
                self._waiting.append(sequence)
            case Imported(id, tokens):
                self._end_import(id, tokens)
            case Lend():
                self._emit([self._loans.lend(message, awaited=self._awaits_blocks)])
            case Release(id):
                if not self._loans.end(id):
                    self._release(id)

    def queue(self) -> Iterator[PrefillSequence]:
        """The prompts that are to be computed and do not await an import, oldest first."""
        prompts = (*self._running.values(), *self._waiting)
        return (s for s in prompts if not s.cancelled and s.id not in self._importing)

    def step(self, max_tokens: int | None = None) -> bool:
        """Computes one chunk of one or more prompts. Returns False when there is nothing to compute.

        Args:
            max_tokens: maximum number of prompt tokens in this step, where it is below ``max_num_batched_tokens``.
        """
        budget = self._max_num_batched_tokens
        scheduled = self._schedule(budget if max_tokens is None else min(budget, max_tokens))
        self._emit_events()
        if not scheduled:
            return False
        tokens = sum(count for _, count in scheduled)
        self.step_shape = (len(scheduled), tokens)
        started = time.monotonic()
        try:
            self._compute(scheduled)
            self.tokens_computed += tokens
            self._token_cost.add(tokens, time.monotonic() - started, ended=self._step_ended)
            if self._metrics is not None:
                self._metrics.step(time.monotonic() - started, len(scheduled), tokens)
        except _Abandoned:
            self._runner.synchronize()
            # Until their Release messages arrive, they must not be scheduled again.
            self._set_aside([s for s, _ in scheduled])
        except Exception as error:
            log.exception("prefill step failed")
            self._runner.clean_up(error)
            if self._metrics is not None:
                self._metrics.step_failed()
            self._set_aside([s for s, _ in scheduled])
            for sequence, _ in scheduled:
                self._prefix.forget(sequence.id)
            self._events += [SequenceFailed(sequence.id, error) for sequence, _ in scheduled]
        self._emit_events()
        return True

    def _emit_events(self) -> None:
        if self._events:
            self._emit(self._events)
            self._events = []

    def _schedule(self, budget: int) -> list[tuple[PrefillSequence, int]]:
        """Chooses the prompts of the next step, and the number of tokens of each."""
        self._admit()
        candidates = self._to_compute()
        if not candidates:
            return []
        oldest, *others = candidates
        others.sort(key=lambda s: s.remaining)  # stable: among equals, the older one first
        share = budget if not others or oldest.remaining <= budget else max(1, budget // 2)
        counts = dict.fromkeys((s.id for s in candidates), 0)
        scored = self._runner.max_scored  # tokens that the step may still score
        if oldest.scores_all and oldest.remaining > scored and any(s.scores_all for s in others):
            share = min(share, max(1, scored // 2))  # so that others' scores do not wait for all of its

        def take(sequence: PrefillSequence, most: int) -> None:
            nonlocal budget, scored
            count = min(most, sequence.remaining - counts[sequence.id])
            if sequence.scores_all:
                count = min(count, scored)
                scored -= count
            counts[sequence.id] += count
            budget -= count

        take(oldest, share)
        for sequence in others:
            take(sequence, budget)
        take(oldest, budget)
        scheduled = [(s, counts[s.id]) for s in (oldest, *others) if counts[s.id]]
        for sequence, _ in scheduled:
            if not _started(sequence):
                self._start(sequence)
        return scheduled

    def _to_compute(self) -> list[PrefillSequence]:
        """Prompts that may be computed now, oldest first.

        Leaves out a prompt that awaits an import, and one that has not started and whose next block another prompt is
        computing or importing. A prompt that may import blocks starts to await them here.
        """
        running = [s for s in self._running.values() if not s.cancelled]
        begun = (s.id for s in running if _started(s) or s.id in self._importing)
        coming = {self._prefix.next_unpublished_key(id) for id in begun}
        candidates = []
        for sequence in running:
            if sequence.id in self._importing:
                continue
            if not _started(sequence):
                if (allocation := self._prefix.extend_cached_prefix(sequence.id)) is not None:
                    sequence.blocks = allocation.blocks
                    sequence.computed = sequence.cached_tokens = allocation.cached_tokens
                block = self._prefix.next_unpublished_key(sequence.id)
                shareable = block is not None and self._prefix.may_share(sequence.id)
                if shareable and block in coming:
                    continue
                coming.add(block)
                if shareable and sequence.imports:
                    self._await_import(sequence)
                    continue
            candidates.append(sequence)
        return candidates

    def _await_import(self, sequence: PrefillSequence) -> None:
        sequence.imports = False  # once per prompt
        self._importing.add(sequence.id)
        # Earlier steps may still touch the blocks on the device, and the servicer's writes do not wait for them.
        self._runner.synchronize()
        self._events.append(AwaitingImport(sequence.id, sequence.blocks, sequence.cached_tokens))

    def _end_import(self, id: str, tokens: int) -> None:
        """Publishes what was imported. A prompt that was released meanwhile is ignored."""
        if id in self._importing:
            self._importing.remove(id)
            self._prefix.publish(id, tokens)
            sequence = self._running[id]
            sequence.computed = sequence.cached_tokens = tokens

    def _start(self, sequence: PrefillSequence) -> None:
        # Earlier steps, which compute the cached part, may still be running on the device.
        cached = sequence.cached_tokens
        event = record_event(self._runner.device) if cached else None
        self._events.append(PrefillScheduled(sequence.id, sequence.blocks, cached, event, time.monotonic_ns()))

    def _admit(self) -> None:
        """Gives blocks to waiting prompts in order of arrival, without overtaking."""
        self._awaits_blocks = False
        while self._waiting and self._num_admitted < self._max_num_seqs:
            sequence = self._waiting[0]
            if sequence.cancelled:  # its Release will arrive
                break
            needed = self._pool.blocks_for(len(sequence.prompt))
            if sequence.prompt_blocks is None or sequence.scores_all:
                shared = () if sequence.scores_all else sequence.prompt
                sequence.prompt_blocks = self._prefix.blocks_of(shared, sequence.cache_namespace)
            allocation = self._prefix.acquire(sequence.id, sequence.prompt_blocks, needed)
            if allocation is None:
                self._awaits_blocks = True
                break
            self._waiting.popleft()
            sequence.blocks, sequence.computed = allocation.blocks, allocation.cached_tokens
            sequence.cached_tokens = allocation.cached_tokens
            self._running[sequence.id] = sequence

    def _compute(self, scheduled: list[tuple[PrefillSequence, int]]) -> None:
        ends = [sequence.computed + count for sequence, count in scheduled]
        finishing = [s for (s, _), end in zip(scheduled, ends, strict=True) if end == len(s.prompt)]
        sampling = [s for s in finishing if s.sample_first_token]
        works = [
            Work(s.prompt[s.computed : end], s.computed, s.blocks, s in sampling, _scoring(s, end))
            for (s, _), end in zip(scheduled, ends, strict=True)
        ]
        parts = [(s.id, count, end) for (s, count), end in zip(scheduled, ends, strict=True)]
        reports = LayerReports(parts, self._runner.token_layer_bytes, self._runner.device)
        traced = [s for s, _ in scheduled if s.trace]

        def layer_start(layer: int) -> None:
            if all(s.cancelled for s, _ in scheduled):
                raise _Abandoned
            for message in self.new_loans():
                self.handle(message)
            if traced:
                now = time.monotonic_ns()
                self._events += [LayerStarted(sequence.id, layer, now) for sequence in traced]

        def kv_written(layer: int) -> None:
            if written := reports.written():
                self._events += written
                self._emit_events()

        sampled, failed = self._runner.next_tokens(works, sampling, LayerHooks(layer_start, kv_written))
        self._step_ended = bool(sampling) or on_cpu(self._runner.device)
        tokens = {s.id: token for s, token in zip(sampling, sampled, strict=True)}
        refused = {sampling[row].id: error for row, error in failed.items()}
        refused |= {s.id: error for s in finishing if (error := score_error(s)) is not None}
        now = time.monotonic_ns()
        self._events += reports.rest(reports.num_written)
        for (sequence, count), end in zip(scheduled, ends, strict=True):
            sequence.computed = end
            error = refused.get(sequence.id)
            if error is None:
                self._prefix.publish(sequence.id, end)
            elif not isinstance(error, InvalidRequest):  # its KV may be the cause
                self._prefix.forget(sequence.id)
            self._events.append(ChunkComputed(sequence.id, end - count, end))
        for sequence in finishing:
            del self._running[sequence.id]
            self._awaiting_release[sequence.id] = sequence
            if sequence.id in refused:
                self._events.append(SequenceFailed(sequence.id, refused[sequence.id]))
                continue
            self._events.append(PromptComputed(sequence.id, tokens.get(sequence.id), now, sequence.scores))

    def _set_aside(self, sequences: list[PrefillSequence]) -> None:
        """Stops scheduling ``sequences``; they keep their blocks until their Release arrives."""
        for sequence in sequences:
            if self._running.pop(sequence.id, None):
                self._awaiting_release[sequence.id] = sequence

    def _release(self, id: str) -> None:
        self._importing.discard(id)
        sequence = self._running.pop(id, None) or self._awaiting_release.pop(id, None)
        if sequence is not None:
            self._prefix.release(id)
            sequence.blocks = []
        else:
            self._waiting = deque(s for s in self._waiting if s.id != id)


def _started(sequence: PrefillSequence) -> bool:
    """True once a step has computed a token of the prompt."""
    return sequence.computed > sequence.cached_tokens


def _scoring(sequence: PrefillSequence, end: int) -> Scoring | None:
    """What a step that computes the prompt up to ``end`` scores: each token that follows one of the step's."""
    if sequence.follower is None:
        targets = sequence.prompt[sequence.computed + 1 : end + 1]
    else:
        targets = [sequence.follower] if end == len(sequence.prompt) else []
    return new_scoring(sequence, targets)
