"""Prefill scheduling: prompts through the full model in chunks, under a token budget. No sockets, no text.

Policy: blocks are given in order of arrival, a prompt's all at once; the part of it that the prefix cache has is not
computed again. Of a step's token budget the oldest prompt takes what it needs, or half when it needs more than all; the
rest goes to the others, those with the fewest tokens left first, and what they leave to the oldest. So a long prompt
never keeps a short one waiting for more than the steps that shorter ones take, and whatever arrives, the oldest
advances by half a budget with every step. A prompt that has not begun waits while another computes what it would begin
with, and then goes on behind that.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from overfill.engine.runner import Choice, ModelRunner, Work
from overfill.engine.sequence import (
    ChunkComputed,
    EngineLoad,
    KvWritten,
    LayerStarted,
    PrefillEvent,
    PrefillScheduled,
    PrefillSequence,
    PromptComputed,
    Release,
    SequenceFailed,
    Submit,
)
from overfill.kv.blocks import BlockPool
from overfill.kv.prefix import PrefixCache
from overfill.kv.tensors import record_event
from overfill.telemetry.metrics import PrefillMetrics

log = logging.getLogger(__name__)

_WORTH_TELLING = 1 << 20
"""Bytes of a prompt's KV that are told of before its step ends. Whoever sends them pays for each message, whatever its
size, and on a CPU takes that time from the step, which goes on meanwhile."""


class _Abandoned(Exception):
    """Raised between two layers when nobody wants the step's result any more."""


class PrefillEngine:
    """Single-threaded core: ``handle`` messages and ``step``; events go to ``emit`` from inside a step, in lists.

    Args:
        token_budget: most prompt tokens in one step.
        max_num_seqs: most prompts that hold blocks at once.
        prefix: cache on ``pool``; None keeps nothing of a prompt that has been released.
        metrics: told of steps; None counts nothing.
    """

    def __init__(
        self,
        runner: ModelRunner,
        pool: BlockPool,
        token_budget: int,
        max_num_seqs: int,
        emit: Callable[[list[PrefillEvent]], None],
        prefix: PrefixCache | None = None,
        metrics: PrefillMetrics | None = None,
    ) -> None:
        self._runner = runner
        self._metrics = metrics
        self._pool = pool
        self._prefix = prefix or PrefixCache(pool, enabled=False)
        self._token_budget = token_budget
        self._max_num_seqs = max_num_seqs
        self._emit = emit
        self._events: list[PrefillEvent] = []  # not yet emitted
        self._waiting: deque[PrefillSequence] = deque()
        self._running: dict[str, PrefillSequence] = {}  # in order of arrival
        self._holding: dict[str, PrefillSequence] = {}  # computed; KV leased to the decode worker

    def load(self) -> EngineLoad:
        """``running`` counts prompts that hold blocks: being computed, or computed and handed over."""
        uncomputed = sum(len(s.prompt) - s.computed for s in (*self._waiting, *self._running.values()))
        return EngineLoad(
            self._prefix.num_used,
            self._pool.num_blocks,
            self._num_admitted,
            len(self._waiting),
            uncomputed,
            self._prefix.num_cached,
            self._prefix.tokens_looked_up,
            self._prefix.tokens_found,
            sum(self._pool.blocks_for(_left(s)) for s in self._running.values()),
            self._prefix.num_leaked,
        )

    @property
    def _num_admitted(self) -> int:
        return len(self._running) + len(self._holding)

    def check(self) -> None:
        """Raises AssertionError when a block is lost or owned twice."""
        holders = (*self._running.values(), *self._holding.values())
        self._prefix.check_owners(s.id for s in holders if s.blocks)

    def handle(self, message: Submit | Release) -> None:
        match message:
            case Submit(sequence):
                self._waiting.append(sequence)
            case Release(id):
                self._release(id)

    def step(self) -> bool:
        """Computes one chunk of one or more prompts. False when there is nothing to do."""
        scheduled = self._schedule()
        if not scheduled:
            return False
        self._tell()
        started = time.monotonic()
        try:
            self._compute(scheduled)
            if self._metrics is not None:
                tokens = sum(count for _, count in scheduled)
                self._metrics.step(time.monotonic() - started, len(scheduled), tokens)
        except _Abandoned:
            self._runner.synchronize()
            # Their Release messages are on the way; until then they must not be scheduled again.
            self._set_aside([s for s, _ in scheduled])
        except Exception as error:
            log.exception("prefill step failed")
            self._runner.clean_up(error)
            if self._metrics is not None:
                self._metrics.step_failed()
            self._set_aside([s for s, _ in scheduled])
            self._events += [SequenceFailed(sequence.id, error) for sequence, _ in scheduled]
        self._tell()
        return True

    def _tell(self) -> None:
        if self._events:
            self._emit(self._events)
            self._events = []

    def _schedule(self) -> list[tuple[PrefillSequence, int]]:
        """Prompts of the next step, and how many tokens of each."""
        self._admit()
        wanting = self._wanting()
        if not wanting:
            return []
        oldest, *others = wanting
        others.sort(key=_left)  # stable: of equal ones the older first
        left = self._token_budget
        share = left if not others or _left(oldest) <= left else max(1, left // 2)
        counts = {oldest.id: min(share, _left(oldest))}
        left -= counts[oldest.id]
        for sequence in others:
            counts[sequence.id] = min(left, _left(sequence))
            left -= counts[sequence.id]
        counts[oldest.id] += min(left, _left(oldest) - counts[oldest.id])
        scheduled = [(s, counts[s.id]) for s in (oldest, *others) if counts[s.id]]
        for sequence, _ in scheduled:
            if not _begun(sequence):
                self._begin(sequence)
        return scheduled

    def _wanting(self) -> list[PrefillSequence]:
        """Prompts to be computed now, the oldest first; not those that can have their next block from one of them."""
        running = [s for s in self._running.values() if not s.cancelled]
        computing = {self._prefix.next_unpublished_key(s.id) for s in running if _begun(s)}
        wanting = []
        for sequence in running:
            if not _begun(sequence):
                if (grant := self._prefix.extend_cached_prefix(sequence.id)) is not None:
                    sequence.blocks = grant.blocks
                    sequence.computed = sequence.cached_tokens = grant.cached_tokens
                block = self._prefix.next_unpublished_key(sequence.id)
                if block is not None and block in computing and self._prefix.may_share(sequence.id):
                    continue
                computing.add(block)
            wanting.append(sequence)
        return wanting

    def _begin(self, sequence: PrefillSequence) -> None:
        # Steps that computed the cached part may still be running on the device.
        cached = sequence.cached_tokens
        event = record_event(self._runner.device) if cached else None
        self._events.append(PrefillScheduled(sequence.id, sequence.blocks, cached, event, time.monotonic_ns()))

    def _admit(self) -> None:
        """Gives blocks to waiting prompts in order of arrival; none overtakes another."""
        while self._waiting and self._num_admitted < self._max_num_seqs:
            sequence = self._waiting[0]
            if sequence.cancelled:  # its Release is on the way
                break
            wanted = self._pool.blocks_for(len(sequence.prompt))
            if sequence.prompt_blocks is None:
                sequence.prompt_blocks = self._prefix.blocks_of(sequence.prompt, sequence.cache_namespace)
            grant = self._prefix.acquire(sequence.id, sequence.prompt_blocks, wanted)
            if grant is None:
                break
            self._waiting.popleft()
            sequence.blocks, sequence.computed = grant.blocks, grant.cached_tokens
            sequence.cached_tokens = grant.cached_tokens
            self._running[sequence.id] = sequence

    def _compute(self, scheduled: list[tuple[PrefillSequence, int]]) -> None:
        ends = [sequence.computed + count for sequence, count in scheduled]
        finishing = [s for (s, _), end in zip(scheduled, ends, strict=True) if end == len(s.prompt)]
        sampling = [s for s in finishing if s.sample_first_token]
        works = [
            Work(s.prompt[s.computed : end], s.computed, s.blocks, wants_logits=s in sampling)
            for (s, _), end in zip(scheduled, ends, strict=True)
        ]
        untold: dict[str, list[PrefillEvent]] = {s.id: [] for s, _ in scheduled}

        def layer_start(layer: int) -> None:
            if all(s.cancelled for s, _ in scheduled):
                raise _Abandoned
            now = time.monotonic_ns()
            self._events += [LayerStarted(sequence.id, layer, now) for sequence, _ in scheduled]

        def kv_written(layer: int) -> None:
            event, worth_telling = record_event(self._runner.device), False
            for (sequence, count), end in zip(scheduled, ends, strict=True):
                written = untold[sequence.id]
                written.append(KvWritten(sequence.id, layer, end, event))
                if len(written) * count * self._runner.token_layer_bytes >= _WORTH_TELLING:
                    self._events += written
                    written.clear()
                    worth_telling = True
            if worth_telling:
                self._tell()

        choices = [Choice(s.sampling, s.sample_index, s.processor) for s in sampling]
        sampled, failed = self._runner.next_tokens(works, choices, layer_start, kv_written)
        tokens = {s.id: token for s, token in zip(sampling, sampled, strict=True)}
        refused = {sampling[row].id: error for row, error in failed.items()}
        now = time.monotonic_ns()
        for (sequence, count), end in zip(scheduled, ends, strict=True):
            self._events += untold[sequence.id]
            sequence.computed = end
            if sequence.id not in refused:  # its lease ends at once; what led to the failure is not kept
                self._prefix.publish(sequence.id, end)
            self._events.append(ChunkComputed(sequence.id, end - count, end))
        for sequence in finishing:
            del self._running[sequence.id]
            self._holding[sequence.id] = sequence
            if sequence.id in refused:
                self._events.append(SequenceFailed(sequence.id, refused[sequence.id]))
                continue
            self._events.append(PromptComputed(sequence.id, tokens.get(sequence.id), now))

    def _set_aside(self, sequences: list[PrefillSequence]) -> None:
        for sequence in sequences:
            if self._running.pop(sequence.id, None):
                self._holding[sequence.id] = sequence

    def _release(self, id: str) -> None:
        sequence = self._running.pop(id, None) or self._holding.pop(id, None)
        if sequence is not None:
            self._prefix.release(id)
            sequence.blocks = []
        else:
            self._waiting = deque(s for s in self._waiting if s.id != id)


def _begun(sequence: PrefillSequence) -> bool:
    return sequence.computed > sequence.cached_tokens


def _left(sequence: PrefillSequence) -> int:
    """Tokens of the prompt that are not computed."""
    return len(sequence.prompt) - sequence.computed
