"""The decode engine on vLLM: reserves blocks, lets the receiver fill them, and decodes with vLLM's scheduler.

A sequence's request has the prompt, and the emitted tokens or a placeholder for the first one. The connector says
that the KV of the shared prompt comes from outside, so vLLM allocates its blocks and computes only what follows: the
answer, and with ``answer_start`` the prompt's tokens from there on, after which it samples the first token itself.

- **Refusal.** vLLM queues what does not fit. This engine counts free blocks first. The engine refuses sequences that
  vLLM still queues after the step.
- **Preemption** is vLLM's, of the youngest running sequence. It frees the blocks at once, since no stream uses them.
  When it allocates anew, it asks for the shared prompt's KV again, and the engine emits another ``Reserved``.
- **Whose KV.** Blocks with tokens that the decoder computes are never shared (``hashes``). A step that would compute a
  token of the shared prompt fails its sequence and is counted.
- **Returned answers.** A decoder that is the reader computes the KV of its answer as the full model would. Such an
  engine publishes the full blocks of an answer when it ends, so that the next turn finds them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from overfill.engine.sequence import (
    AdapterChanged,
    ChangeAdapter,
    DecodeEvent,
    DecodeSequence,
    DecodeState,
    Lend,
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
from overfill.engine.vllm.adapters import VllmAdapters
from overfill.engine.vllm.engine import VllmEngine
from overfill.engine.vllm.hashes import block_hasher, hashes_of
from overfill.engine.vllm.internals import VllmCore
from overfill.engine.vllm.ranks.steps import RankStep
from overfill.engine.work import Sampled, always_plain
from overfill.errors import InternalError
from overfill.kv.journal import KeyJournal
from overfill.kv.keys import is_raw
from overfill.model.adapter import LoraAdapter
from overfill.telemetry.engine_load import EngineLoad
from overfill.telemetry.metrics import DecodeMetrics

log = logging.getLogger(__name__)

_PLACEHOLDER = 0
"""Token that stands for the first one until the full model has sampled it."""


@dataclass(slots=True)
class _Plan:
    """One step.

    Attributes:
        num_tokens: tokens of each request in the step.
        replaying: requests whose last known token is in a later step, so that this one samples nothing.
        preempted: whether vLLM has preempted a sequence for it.
    """

    num_tokens: Mapping[str, int] = field(default_factory=dict)
    replaying: set[str] = field(default_factory=set)
    preempted: bool = False


class VllmDecodeEngine(VllmEngine):
    """Core of a decode worker on vLLM: ``handle`` takes messages, ``step`` computes.

    Args:
        max_num_seqs: maximum number of sequences that hold or wait for blocks.
        emit: takes lists of events; a step calls it before vLLM computes, and after.
        journal: as in ``VllmEngine``.
        adapters: slots of adapters; None without any.
        returns_kv: whether the decoder is the reader (``Pair.returns_kv``).
    """

    _metrics: DecodeMetrics

    def __init__(
        self,
        vllm: VllmCore,
        max_num_seqs: int,
        emit: Callable[[list[DecodeEvent]], None],
        metrics: DecodeMetrics,
        journal: KeyJournal,
        adapters: VllmAdapters | None = None,
        returns_kv: bool = False,
    ) -> None:
        self._returns_kv = returns_kv
        self._adapters = adapters
        self._max_num_seqs = max_num_seqs
        self._emit = emit
        self._metrics = metrics
        self._sequences: dict[str, DecodeSequence] = {}  # in order of arrival, oldest first
        self._receiving: dict[str, DecodeSequence] = {}  # those among them whose prompt's KV is not complete
        self._asked: dict[str, DecodeSequence] = {}  # those among these that vLLM has given no blocks yet
        self._preempted: set[str] = set()  # running ones without blocks
        self._spoilt: dict[str, Exception] = {}  # sequences of whose prompt the decoder has computed a part
        self._early: list[DecodeEvent] = []  # events of the step that need not wait for its end
        self._plan = _Plan()
        self._changed = False  # a message has come since the last step
        super().__init__(vllm, journal)

    def load(self) -> EngineLoad:
        """A snapshot of the load; ``waiting`` counts sequences without blocks or without complete prompt KV."""
        self._recount()
        running = len(self._sequences) - len(self._receiving) - len(self._preempted)
        return EngineLoad(
            self._num_used,
            self._vllm.num_blocks,
            running,
            len(self._sequences) - running,
            blocks_cached=min(self._cached, self._vllm.num_free),
            prefix_tokens_looked_up=self.tokens_looked_up,
            prefix_tokens_found=self.tokens_found,
            blocks_reserved=sum(len(s.blocks) for s in self._receiving.values()),
            blocks_leaked=self._leaked,
        )

    def close(self) -> None:
        super().close()
        if self._adapters is not None:
            self._adapters.close()

    def handle(self, message: Reserve | Share | Start | Yielded | Lend | Release | ChangeAdapter) -> None:
        self._changed = True
        match message:
            case Reserve(sequence):
                if refused := self._reserve(sequence):
                    self._emit([refused])
            case Share(id, followers):
                if refused_followers := self._share(id, followers):
                    self._emit(refused_followers)
            case Start(id, first):
                if (started := self._sequences.get(id)) and (failed := self._start(started, first)):
                    self._emit([failed])
            case Lend():
                self._lend(message)
            case Release(id):
                if not self._end_loan(id):
                    self._end(id)
            case ChangeAdapter(slot, adapter):
                self._emit([AdapterChanged(slot, self._change_adapter(slot, adapter))])
            case Yielded():
                pass  # vLLM preempts running sequences only, which no stream writes

    def step(self) -> bool:
        """Computes one token of every running sequence, or replays. Returns False when nothing runs."""
        if not self._changed and len(self._receiving) == len(self._sequences):
            return False
        self._changed = False
        self._plan = _Plan()
        started = time.monotonic_ns()
        outputs, executed = self._step()
        events: list[DecodeEvent] = []
        step = StepSampled(started)
        for output in outputs:
            sequence, taken = self._sequences.get(output.request_id), output.new_token_ids
            if sequence is not None and taken and (failed := self._take(sequence, taken[0], step)):
                events.append(failed)
        if step.ids:
            events.append(step)
        for id in list(self._asked):  # too few blocks, or running sequences and replays filled the step
            self._end(id)
            events.append(self._refuse(id, "blocks", "vLLM's scheduler has no room for the sequence now"))
        if executed:
            self._count_step(started)
        if events:
            self._emit(events)
        # A step that only preempts leaves blocks for the next one.
        return executed or self._plan.preempted

    def _live(self) -> list[str]:
        return list(self._sequences)

    def _planned(self) -> Iterable[str]:
        return self._plan.num_tokens

    def _reserve(self, sequence: DecodeSequence) -> Refused | None:
        adapter = None
        if sequence.adapter is not None:
            adapter = None if self._adapters is None else self._adapters.request(sequence.adapter)
            if adapter is None:
                return self._refuse(sequence.id, "adapter", f"slot {sequence.adapter} has no adapter")
        if len(self._sequences) >= self._max_num_seqs:
            reason = f"{len(self._sequences)} sequences, this worker's maximum"
            return self._refuse(sequence.id, "sequences", reason)
        if self._preempted:
            return self._refuse(sequence.id, "preempted", "preempted sequences resume first")
        request = self._vllm.new_request(
            sequence.id,
            sequence.prompt + (sequence.emitted or [_PLACEHOLDER] * self._awaits_first(sequence)),
            # One more where answers are returned: this engine then ends each, once it has checked the last token.
            max(1, sequence.stop.max_tokens - max(self._awaits_first(sequence), len(sequence.emitted)))
            + self._returns_kv,
            block_hasher(sequence.prompt_blocks, self._num_shared(sequence), self._vllm.block_size),
            always_plain(sequence),
            self._row(sequence),
            adapter,
        )
        needed = self._blocks_for(sequence.num_tokens + 1)
        kept, free = self._num_growing(), self._vllm.num_free
        if needed - self._vllm.num_shared(request) > free - kept:
            reason = f"{needed} KV blocks needed; {free} free, {kept} of them kept for running sequences"
            return self._refuse(sequence.id, "blocks", reason)
        sequence.state = DecodeState.RECEIVING
        self._sequences[sequence.id] = self._receiving[sequence.id] = self._asked[sequence.id] = sequence
        self._vllm.add(request)
        return None

    def _share(self, id: str, followers: Sequence[str]) -> list[DecodeEvent]:
        """Caches a complete prompt. Followers give their blocks back and ask for new ones, the cached ones first."""
        if self._has_blocks(id):
            self._vllm.publish(id, self._receiving[id].num_shared)
        refused: list[DecodeEvent] = []
        for follower in filter(self._has_blocks, followers):
            sequence = self._receiving[follower]
            self._end(follower)
            if refusal := self._reserve(sequence):
                refused.append(refusal)
        return refused

    def _has_blocks(self, id: str) -> bool:
        """Whether the sequence receives its prompt's KV into blocks."""
        return id in self._receiving and id not in self._asked

    @staticmethod
    def _awaits_first(sequence: DecodeSequence) -> bool:
        """Whether the full model samples the answer's first token, and has not yet."""
        return sequence.answer_start is None and not sequence.emitted

    def _num_shared(self, sequence: DecodeSequence) -> int:
        """Leading blocks that others may share.

        The last token of a prompt that the full model computes whole is in none, so that its KV always arrives.
        """
        return (sequence.num_shared - (sequence.answer_start is None)) // self._vllm.block_size

    def _change_adapter(self, slot: int, adapter: LoraAdapter | None) -> Exception | None:
        """Changes a slot's adapter. Returns why it does not."""
        if self._adapters is None:
            return InternalError("this engine has no slots for adapters")
        if users := sum(sequence.adapter == slot for sequence in self._sequences.values()):
            return InternalError(f"{users} sequences use the adapter in slot {slot}")
        try:
            self._adapters.change(slot, adapter)
        except Exception as error:
            log.exception("an adapter was not changed")
            return error
        return None

    def _refuse(self, id: str, kind: str, reason: str) -> Refused:
        self._metrics.refused(kind)
        return Refused(id, reason)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._vllm.block_size)

    def _num_growing(self) -> int:
        """Blocks kept for others: one per sequence to grow into, and what a waiting one needs beyond its prompt."""
        return sum(
            1 if s.state is DecodeState.RUNNING else max(1, 1 + self._blocks_for(s.num_tokens + 1) - len(s.blocks))
            for s in self._sequences.values()
        )

    def _num_kept(self) -> int:
        return self._num_growing()

    def _awaits_blocks(self) -> bool:
        return bool(self._preempted)

    def _start(self, sequence: DecodeSequence, first: int | None) -> SequenceFailed | None:
        if sequence.state is not DecodeState.RECEIVING or sequence.id in self._asked:
            return None
        if self._awaits_first(sequence):
            if first is None:
                self._end(sequence.id)
                return SequenceFailed(sequence.id, InternalError("the prompt's KV came without a first token"))
            sequence.emitted.append(first)
            self._vllm.replace_token(sequence.id, len(sequence.prompt), first)
        sequence.computed = sequence.num_shared
        sequence.state = DecodeState.RUNNING
        del self._receiving[sequence.id]
        self._vllm.received(sequence.id, sequence.num_shared)
        return None

    def _end(self, id: str) -> None:
        """Ends a sequence in any state; its blocks are free on return."""
        if id in self._sequences:
            self._vllm.abort(id)
            del self._sequences[id]
            self._receiving.pop(id, None)
            self._asked.pop(id, None)
            self._preempted.discard(id)
            self._spoilt.pop(id, None)

    # What vLLM asks while it plans a step

    def tokens_to_load(self, request_id: str, held: int) -> int:
        # After a preemption too: what is missing of the shared prompt is never the decoder's to compute.
        sequence = self._sequences[request_id]
        sequence.computed = held
        # A new request of which nothing is missing would run before its Start. So vLLM waits for one token, and
        # `received` says that this one is not computed. One that was preempted may run at once.
        return max(sequence.num_shared - held, int(request_id in self._asked))

    def allocated(self, request_id: str) -> None:
        sequence = self._sequences[request_id]
        sequence.blocks = self._vllm.blocks(request_id)
        sequence.state = DecodeState.RECEIVING
        self._receiving[request_id] = sequence
        self._asked.pop(request_id, None)
        self._preempted.discard(request_id)
        self.tokens_looked_up += sequence.num_shared
        self.tokens_found += sequence.computed
        self._early.append(Reserved(request_id, sequence.blocks, sequence.computed))

    def scheduled(self, num_tokens: Mapping[str, int], preempted: Collection[str]) -> None:
        super().scheduled(num_tokens, preempted)
        self._preempted -= num_tokens.keys()  # vLLM still had all of their KV
        self._plan = plan = _Plan(num_tokens, preempted=bool(preempted))
        for id in preempted:
            self._metrics.preempted()
            self._preempted.add(id)
        for (id, count), start in zip(num_tokens.items(), self._vllm.num_computed(num_tokens), strict=True):
            sequence = self._sequences[id]
            if start < sequence.num_shared:
                wrong = min(count, sequence.num_shared - start)
                self._metrics.prompt_tokens_computed(wrong)
                log.error("the decoder computes %d tokens of a prompt, which are the full model's", wrong)
                self._spoilt[id] = InternalError(f"the decoder computed {wrong} tokens of the prompt")
            if start + count < sequence.num_tokens:
                plan.replaying.add(id)
        early, self._early = self._early, []
        if early:
            self._emit(early)

    def step_of_ranks(self) -> RankStep:
        return RankStep(unsampled=frozenset(self._plan.replaying))

    def ending(self, request_id: str) -> bool:
        # No later sequence can find the blocks of an answer, so they must not take the place of cached prompts.
        sequence = self._sequences[request_id]
        begin = self._num_shared(sequence)
        self._vllm.forget(self._vllm.blocks(request_id)[begin:])
        if sequence.prompt_blocks is not None and self._returns(sequence):
            known = len(sequence.prompt_blocks.tokens) * self._vllm.block_size
            whole = sequence.prompt_blocks.copy()
            whole.append(self._vllm.computed_tokens(request_id, known))
            self._vllm.publish_answer(request_id, begin, hashes_of(whole))
        return False

    def _returns(self, sequence: DecodeSequence) -> bool:
        """Whether the blocks of a sequence that ends hold what the reader would compute of its tokens.

        An adapter changes the KV, and so does a lossy codec of the prompt's. Where vLLM ends a sequence itself, because
        its context is full, its last token has not been checked.
        """
        return (
            self._returns_kv
            and sequence.adapter is None
            and is_raw(sequence.cache_namespace)
            and sequence.state is DecodeState.RUNNING
            and sequence.id not in self._preempted
            and not sequence.failed
            and self._vllm.aborted(sequence.id)
        )

    def _sampled(self, id: str) -> Sampled | None:
        return None if id in self._plan.replaying else self._sequences[id]

    # What a step has brought

    def _take(self, sequence: DecodeSequence, token: int, step: StepSampled) -> SequenceFailed | None:
        """Takes the token that vLLM has put behind a sequence, unless it is void."""
        id = sequence.id
        if error := self._spoilt.get(id) or self._sampler.error(id, token):
            sequence.failed = True
            if self._vllm.known(id):
                self._vllm.discard(self._vllm.blocks(id))  # their KV may be the cause
            self._end(id)
            return SequenceFailed(id, error)
        if details := self._sampler.details.get(id):
            step.details[id] = details
        if step.take(sequence, token):
            self._end(id)
        return None

    def _count_step(self, started_ns: int) -> None:
        sequences, computed = self.step_shape
        sampled = sequences - len(self._plan.replaying)
        self._metrics.step((time.monotonic_ns() - started_ns) / 1e9, sequences, sampled, computed - sampled)
