"""The prefill engine on vLLM: vLLM's chunked prefill, with the KV reported layer by layer while a step runs.

- **Blocks.** vLLM gives a prompt blocks chunk by chunk, and would preempt a prompt whose next block is missing, while a
  stream reads the others. So this engine queues prompts itself: it hands vLLM a prompt when all of its blocks are free
  beside those that running prompts still need.
- **Imports.** vLLM waits for the KV of a prompt that is imported as it waits for what a connector loads. From
  ``AwaitingImport`` to ``Imported`` the prompt has blocks that no step touches. Prompts that need one of them wait.
- **End.** A request ends with its first token. Its blocks stay until ``Release``, for the streams that read them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from overfill.engine.device import record_event
from overfill.engine.layers import LayerReports
from overfill.engine.sequence import (
    AwaitingImport,
    ChunkComputed,
    Imported,
    KvWritten,
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
from overfill.engine.vllm.engine import VllmEngine
from overfill.engine.vllm.hashes import block_hasher, hashes_of
from overfill.engine.vllm.internals import Request, VllmCore
from overfill.engine.vllm.ranks.steps import RankChunk, RankStep
from overfill.engine.work import Sampled, always_plain
from overfill.kv.journal import KeyJournal
from overfill.model.steps import SampledToken
from overfill.telemetry.engine_load import EngineLoad
from overfill.telemetry.metrics import PrefillMetrics

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Chunk:
    """A prompt's part of the step: after it, positions ``start..end`` hold KV that they did not hold before.

    ``blocks`` are new, from the prompt's block ``first_block`` on.
    """

    sequence: PrefillSequence
    start: int
    end: int
    first_block: int
    blocks: list[int]


class VllmPrefillEngine(VllmEngine):
    """Core of a prefill worker on vLLM: ``handle`` takes messages, ``step`` computes.

    Args:
        max_num_seqs: maximum number of prompts that hold blocks.
        num_layers: layers of the model.
        token_layer_bytes: bytes of one token's keys and values in one layer.
        journal: as in ``VllmEngine``.
        emit: takes lists of events; a step calls it several times.

    Attributes:
        new_loans: returns the loans that have been asked for since the step began; set by the engine's thread.
    """

    _metrics: PrefillMetrics

    def __init__(
        self,
        vllm: VllmCore,
        device: torch.device,
        max_num_seqs: int,
        num_layers: int,
        token_layer_bytes: int,
        journal: KeyJournal,
        emit: Callable[[list[PrefillEvent]], None],
        metrics: PrefillMetrics,
    ) -> None:
        self._device = device
        self._max_num_seqs = max_num_seqs
        self._num_layers = num_layers
        self._token_layer_bytes = token_layer_bytes
        self._emit = emit
        self._metrics = metrics
        self.new_loans: Callable[[], Sequence[Lend]] = tuple
        self._waiting: deque[PrefillSequence] = deque()
        self._running: dict[str, PrefillSequence] = {}  # in order of arrival
        self._awaiting_release: dict[str, PrefillSequence] = {}  # computed and leased to the decode worker, or failed
        self._importing: dict[str, frozenset[bytes]] = {}  # running ones, and hashes of the blocks that others write
        self._imported: dict[str, int] = {}  # running ones that have not started: tokens that an import has brought
        self._token_cost = TokenCost()
        self._chunks: list[_Chunk] = []
        self._reports = LayerReports([], token_layer_bytes, device)
        self._events: list[PrefillEvent] = []  # not yet emitted
        self._silent = False  # vLLM has left out calls for layers
        self._next: Request | None = None  # of the first waiting prompt, once it has been made
        super().__init__(vllm, journal)

    def load(self) -> EngineLoad:
        """A snapshot of the load; ``running`` counts prompts that hold blocks until their ``Release``.

        A prompt uses all of its blocks from its admission on, although vLLM gives them to it chunk by chunk.
        """
        self._recount()
        total = self._vllm.num_blocks
        used = min(total, self._num_used + self._num_promised())
        running = [len(s.prompt) - s.computed for s in self._running.values()]
        return EngineLoad(
            used,
            total,
            len(self._running) + len(self._awaiting_release),
            len(self._waiting),
            queued_tokens=sum(running) + sum(len(s.prompt) for s in self._waiting),
            blocks_cached=min(self._cached, total - used),
            prefix_tokens_looked_up=self.tokens_looked_up,
            prefix_tokens_found=self.tokens_found,
            blocks_reserved=sum(-(-tokens // self._vllm.block_size) for tokens in running),
            blocks_leaked=self._leaked,
            token_seconds=self._token_cost.seconds,
        )

    def handle(self, message: Submit | Imported | Lend | Release) -> None:
        match message:
            case Submit(sequence):
                self._waiting.append(sequence)
            case Imported(id, tokens):
                self._take_import(id, tokens)
            case Lend():
                self._lend(message)
            case Release(id):
                self._release(id)

    def step(self) -> bool:
        """Computes one chunk of one or more prompts. Returns False when there is nothing to compute."""
        self._admit()
        if not self._running:
            return False
        started = time.monotonic()
        self._chunks = []
        self._reports = LayerReports([], self._token_layer_bytes, self._device)
        outputs, executed = self._step()
        now = time.monotonic_ns()
        self._unwritten = ()
        events, self._events = self._events, []
        events += self._unreported()
        for chunk in self._chunks:
            chunk.sequence.computed = chunk.end
            events.append(ChunkComputed(chunk.sequence.id, chunk.start, chunk.end))
        for output in outputs:
            if (sequence := self._running.get(output.request_id)) and output.new_token_ids:
                events.append(self._finish(sequence, output.new_token_ids[0], now))
        if executed:
            seconds = time.monotonic() - started
            self._metrics.step(seconds, *self.step_shape)
            self._token_cost.add(self.step_shape[1], seconds, ended=True)
        if events:
            self._emit(events)
        return executed

    def _live(self) -> list[str]:
        return [*self._running, *self._awaiting_release]

    def _planned(self) -> Iterable[str]:
        return (chunk.sequence.id for chunk in self._chunks)

    def _admit(self) -> None:
        """Hands waiting prompts to vLLM in order of arrival, without overtaking, while all of their blocks are free."""
        while self._waiting and len(self._running) + len(self._awaiting_release) < self._max_num_seqs:
            sequence = self._waiting[0]
            if sequence.cancelled:  # its Release will arrive
                break
            request = self._next
            if request is None or request.request_id != sequence.id:
                size = self._vllm.block_size
                hasher = block_hasher(sequence.prompt_blocks, len(sequence.prompt) // size, size)
                plain = always_plain(sequence) or not sequence.sample_first_token
                request = self._vllm.new_request(sequence.id, sequence.prompt, 1, hasher, plain, self._row(sequence))
                self._next = request
            needed = self._blocks_for(sequence) - self._vllm.num_shared(request)
            if needed > self._vllm.num_free - self._num_promised():
                break
            self._next = None
            self._waiting.popleft()
            self._running[sequence.id] = sequence
            self._vllm.add(request)

    def _blocks_for(self, sequence: PrefillSequence) -> int:
        return -(-len(sequence.prompt) // self._vllm.block_size)

    def _num_promised(self) -> int:
        """Blocks that running prompts will need and do not have yet."""
        return sum(self._blocks_for(s) - len(s.blocks) for s in self._running.values())

    def _num_kept(self) -> int:
        return self._num_promised()

    def _awaits_blocks(self) -> bool:
        return bool(self._waiting) and self._next is not None

    def _take_import(self, id: str, tokens: int) -> None:
        """Lets vLLM publish the blocks below ``tokens`` and compute the rest."""
        if self._importing.pop(id, None) is None:
            return
        sequence = self._running[id]
        self._imported[id] = tokens - sequence.cached_tokens
        sequence.computed = sequence.cached_tokens = tokens
        if tokens:
            self._vllm.received(id, tokens)
        else:
            sequence.blocks = []
            self._vllm.received_nothing(id)

    def _release(self, id: str) -> None:
        if self._end_loan(id):
            return
        self._importing.pop(id, None)
        self._imported.pop(id, None)
        sequence = self._running.pop(id, None) or self._awaiting_release.pop(id, None)
        if sequence is None:
            self._waiting = deque(s for s in self._waiting if s.id != id)
            return
        self._vllm.abort(id)
        if self._vllm.known(id):
            self._vllm.sent(id)
        sequence.blocks = []

    # What vLLM asks and tells while it plans and takes a step

    def tokens_to_load(self, request_id: str, held: int) -> int | None:
        sequence = self._running[request_id]
        missing = self._missing(sequence, held)
        if missing and any(missing[0] in imported for imported in self._importing.values()):
            return None
        if not missing or not sequence.imports:
            return 0
        sequence.computed = sequence.cached_tokens = held
        return len(missing) * self._vllm.block_size

    def allocated(self, request_id: str) -> None:
        sequence = self._running[request_id]
        sequence.imports = False
        sequence.blocks = self._vllm.blocks(request_id)
        self._importing[request_id] = frozenset(self._missing(sequence, sequence.cached_tokens))
        self._events.append(AwaitingImport(request_id, sequence.blocks, sequence.cached_tokens))

    def _missing(self, sequence: PrefillSequence, held: int) -> list[bytes]:
        """Hashes of the full blocks behind the first ``held`` tokens; at least one token is left to compute."""
        size = self._vllm.block_size
        return hashes_of(sequence.prompt_blocks)[held // size : (len(sequence.prompt) - 1) // size]

    def scheduled(self, num_tokens: Mapping[str, int], preempted: Collection[str]) -> None:
        if preempted or not num_tokens.keys() <= self._running.keys():
            # Before anything is computed: a stream may be reading the blocks that a prompt has lost.
            raise AssertionError("vLLM preempted a prompt, or computes one that has no lease")
        super().scheduled(num_tokens, preempted)
        events, self._events = self._events, []
        now = time.monotonic_ns()
        starts = dict(zip(num_tokens, self._vllm.num_computed(num_tokens), strict=True))
        blocks = {id: self._vllm.blocks(id) for id in num_tokens}
        size = self._vllm.block_size
        # vLLM lets a prompt share blocks that another one computes in this very step.
        self._unwritten = unwritten = {b for id in num_tokens for b in blocks[id][starts[id] // size :]}
        for id, count in num_tokens.items():
            sequence, start = self._running[id], starts[id]
            first_chunk, ready = sequence.computed == sequence.cached_tokens, start
            if first_chunk:
                sequence.blocks = []  # vLLM may have replaced those of an import
            first_block = len(sequence.blocks)
            new = blocks[id][first_block:]
            sequence.blocks += new  # the lease has this list
            if first_chunk:
                ready = next((n for n in range(start // size) if sequence.blocks[n] in unwritten), start // size) * size
                sequence.computed = sequence.cached_tokens = start
                self.tokens_looked_up += len(sequence.prompt)
                self.tokens_found += start - self._imported.pop(id, 0)
                event = record_event(self._device) if ready else None
                events.append(PrefillScheduled(id, sequence.blocks, ready, event, now))
            self._chunks.append(_Chunk(sequence, ready if first_chunk else start, start + count, first_block, new))
        parts = [(c.sequence.id, c.end - c.start, c.end) for c in self._chunks]
        self._reports = LayerReports(parts, self._token_layer_bytes, self._device)
        if events:
            self._emit(events)

    def layer_started(self, layer: int) -> None:
        for message in self.new_loans():
            self._lend(message)
        if traced := [chunk.sequence for chunk in self._chunks if chunk.sequence.trace]:
            now = time.monotonic_ns()
            self._events += [LayerStarted(sequence.id, layer, now) for sequence in traced]

    def layer_written(self) -> None:
        if written := self._reports.written():
            events, self._events = self._events, []
            self._emit(events + written)

    def step_of_ranks(self) -> RankStep:
        return RankStep(
            [RankChunk(c.sequence.id, c.end - c.start, c.end, c.first_block, c.blocks) for c in self._chunks],
            unsampled=frozenset(c.sequence.id for c in self._chunks if c.end < len(c.sequence.prompt)),
        )

    def ending(self, request_id: str) -> bool:
        return True  # until its Release: streams read the blocks

    def _sampled(self, id: str) -> Sampled | None:
        finishing = (c.sequence for c in self._chunks if c.end == len(c.sequence.prompt))
        return next((s for s in finishing if s.id == id), None)

    def _unreported(self) -> list[KvWritten]:
        """Layers that are not reported yet. Their KV is there, since the step is over, even if vLLM did not call."""
        silent = self._chunks and self._reports.num_written < self._num_layers
        if silent and not self._silent and self._vllm.num_ranks == 1:  # ranks mark layers ready themselves
            log.warning("vLLM computes without calling for each layer, so KV leaves only after each step")
            self._silent = True
        return self._reports.rest(self._num_layers)

    def _finish(self, sequence: PrefillSequence, token: int, now: int) -> PrefillEvent:
        id = sequence.id
        del self._running[id]
        self._awaiting_release[id] = sequence
        if error := self._sampler.error(id, token):
            self._vllm.discard(sequence.blocks)  # their KV may be the cause
            return SequenceFailed(id, error)
        first = self._sampler.details.get(id) or SampledToken(token)
        return PromptComputed(id, first if sequence.sample_first_token else None, now)
