"""Drives an engine core in the test's thread, in place of its servicer, sender and receiver.

An engine may emit the answer to a message inside ``handle`` or in a later step; the drivers accept both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sampled_reference import Request, SampledReference
from sequence_events import by_sequence

from overfill.engine.protocol import LoadedEngine
from overfill.engine.sequence import (
    AwaitingImport,
    ChunkComputed,
    DecodeSequence,
    FinishReason,
    Imported,
    KvWritten,
    Lend,
    Lent,
    Preempted,
    PrefillEvent,
    PrefillHere,
    PrefillScheduled,
    PrefillSequence,
    Processor,
    PromptComputed,
    Refused,
    Release,
    Reserve,
    Reserved,
    SequenceEvent,
    SequenceFailed,
    Start,
    StopRule,
    Submit,
    TokenSampled,
    Yielded,
)
from overfill.kv.chunks import Chunk, TransferSpec, digest, is_damaged, new_chunk
from overfill.kv.ranges import KvRange
from overfill.kv.store import DeviceEvent, LayerTargets
from overfill.model.steps import SampledToken
from overfill.telemetry.engine_load import EngineLoad
from overfill.telemetry.metrics import DecodeMetrics, EngineMetrics, PrefillMetrics

_MAX_STEPS = 2000
_ANSWER_STEPS = 20
"""Steps within which an engine answers a message."""
_KV_DELAY = 2
"""Steps for which the KV of a sequence that has lost its blocks is on its way. The engine must not compute it then."""


class _Driver:
    """What both drivers share.

    Attributes:
        namespace: cache namespace of the sequences that are submitted from now on.
        kv_tolerance: as ``EngineConformance.kv_tolerance``.
        dead: True after a step has raised, which ends a worker; the core must not be used any more.
        loans: what the engine has lent and not got back, by the loan's id.
    """

    def __init__(self, loaded: LoadedEngine, reference: SampledReference, metrics: EngineMetrics) -> None:
        self.served = loaded.served
        self.reference = reference
        self.metrics = metrics
        self.namespace = ""
        self.kv_tolerance = 0.0
        self.dead = False
        self.loans: dict[str, Lent] = {}
        self._faults: list[Exception] = []
        self._num_steps = 0
        self.core = loaded.new_core(self._emit, metrics)
        self.block_size = self.served.store.block_size
        self._ids = (f"{number:032x}" for number in itertools.count())  # as of transfers

    @property
    def load(self) -> EngineLoad:
        return self.core.load()

    def step(self) -> bool:
        """Computes a step. Raises what the driver found wrong with its events."""
        self._num_steps += 1
        try:
            computed = self.core.step()
        except BaseException:
            self.dead = True
            raise
        self.raise_fault()
        return computed

    def raise_fault(self) -> None:
        """Raises the first thing that was wrong with an event."""
        faults, self._faults = self._faults, []
        for fault in faults:
            raise fault

    def until(self, condition: Callable[[], object]) -> None:
        """Steps until ``condition`` holds."""
        for _ in range(_ANSWER_STEPS):
            if condition():
                return
            self.step()
        assert condition(), f"not within {_ANSWER_STEPS} steps"

    def lend(self, tokens: tuple[int, ...], *, to_peer: bool = False) -> Lent:
        """Asks for the cached blocks with the start of ``tokens``."""
        id = next(self._ids)
        self.core.handle(Lend(id, self.served.blocks_of(tokens, self.namespace), to_peer))
        self.until(lambda: id in self.loans)
        return self.loans[id]

    def end_loan(self, loan: Lent) -> None:
        self.core.handle(Release(self.loans.pop(loan.id).id))

    def lent_kv(self, loan: Lent) -> torch.Tensor:
        """Reads what was lent. [2, layers, tokens, kv_heads, head_dim]"""
        layers = range(self.served.kv.num_layers)
        return torch.cat([self._read(loan.blocks, layer, 0, loan.tokens, loan.event) for layer in layers], 1)

    def assert_empty(self) -> None:
        """Checks that no sequence and no block is left."""
        load = self.load
        assert (load.blocks_used, load.running, load.waiting, load.queued_tokens) == (0, 0, 0, 0)
        assert (load.blocks_reserved, load.blocks_leaked) == (0, 0)
        self.core.check()

    def _emit(self, events: list[Any]) -> None:
        for event in by_sequence(events):
            try:
                if isinstance(event, Lent):
                    self.loans[event.id] = event
                else:
                    self._take(event)
            except Exception as fault:  # raised inside a step, it would look like the engine's own error
                self._faults.append(fault)

    def _take(self, event: Any) -> None:
        raise NotImplementedError

    def _processor(self, request: Request) -> Processor | None:
        return self.served.new_processor(request.sampling, request.prompt, self.served.grammars, self.reference.eos_ids)

    def _transfer(self, layers: tuple[int, ...], start: int, end: int) -> TransferSpec:
        return TransferSpec(bytes(16), 0, self.served.kv, layers, (start, end))

    def _read(self, blocks: list[int], layer: int, start: int, end: int, event: DeviceEvent | None) -> torch.Tensor:
        """Reads a layer's KV of a sequence's positions, as the sender does. [2, 1, end - start, kv_heads, head_dim]"""
        heads = self.served.kv.num_kv_heads
        spec = self._transfer((layer,), start, end)
        kv_range = KvRange(layer, layer + 1, start, end, 0, heads)
        chunk: Chunk = new_chunk(spec, kv_range, memoryview(bytearray(spec.raw_bytes(kv_range))))
        self.served.store.read(blocks, [chunk], {layer: event})
        assert not is_damaged(chunk)
        return torch.from_numpy(np.frombuffer(chunk.payload, np.float32).copy()).view(2, 1, end - start, heads, -1)

    def _write(
        self, blocks: list[int], kv: torch.Tensor, start: int, end: int, layer_map: Sequence[int], *, damaged: bool
    ) -> tuple[int, int]:
        """Writes a prompt's ``kv`` to its positions, as the receiver does; returns the chunks written, and all.

        A chunk is one layer, up to or from a position in the middle of a block.
        """
        layers = tuple(sorted(set(layer_map)))
        spec = self._transfer(layers, start, end)
        targets = {layer: [i for i, source in enumerate(layer_map) if source == layer] for layer in layers}
        middle = min(end, start + self.block_size + 3)
        chunks = []
        for layer, (begin, stop) in itertools.product(layers, ((start, middle), (middle, end))):
            if begin == stop:
                continue
            payload = memoryview(kv[:, layer : layer + 1, begin:stop].contiguous().numpy().tobytes())
            chunk = new_chunk(spec, KvRange(layer, layer + 1, begin, stop, 0, spec.kv.num_kv_heads), payload)
            chunk.checksum = digest(chunk.header, payload) ^ damaged
            chunks.append(chunk)
        return self.served.store.write(blocks, LayerTargets(targets), chunks), len(chunks)

    def _end_loans(self) -> None:
        for loan in list(self.loans.values()):
            self.end_loan(loan)


@dataclass(eq=False)
class Decoding:
    """A sequence in a decode engine, as its servicer sees it.

    Attributes:
        hold: True while the prompt's KV does not arrive.
        awaits_kv: True from ``Reserved`` until the driver has written the KV and sent ``Start``.
        kv_due: number of the step after which the KV may arrive.
        tokens: the answer after ``request.emitted``; the full model's first token is among them.
    """

    request: Request
    sequence: DecodeSequence
    first: SampledToken | None
    hold: bool = False
    awaits_kv: bool = False
    kv_due: int = 0
    must_yield: bool = False
    released: bool = False
    reserved: list[Reserved] = field(default_factory=list)
    refused: Refused | None = None
    tokens: list[SampledToken] = field(default_factory=list)
    finish: FinishReason | None = None
    error: Exception | None = None
    ended_engine: bool = False

    @property
    def id(self) -> str:
        return self.sequence.id

    @property
    def held_tokens(self) -> int:
        return self.reserved[-1].held_tokens


class DecodeDriver(_Driver):
    """Servicer and receiver of a decode engine. The reference's full model computes first tokens and KV."""

    def __init__(self, loaded: LoadedEngine, reference: SampledReference) -> None:
        super().__init__(loaded, reference, DecodeMetrics())
        self.sequences: dict[str, Decoding] = {}

    def new_sequence(self, request: Request, **own: Any) -> DecodeSequence:
        """Makes the sequence of a request; ``own`` are further fields of it."""
        prompt, sampling = list(request.prompt), request.sampling
        sequence = DecodeSequence(
            id=next(self._ids),
            prompt=prompt,
            emitted=list(request.emitted),
            sampling=sampling,
            stop=StopRule.of(sampling, self.reference.eos_ids, self.served.max_model_len - len(prompt)),
            sample_index=request.sample_index,
            processor=self._processor(request),
            cache_namespace=self.namespace,
            **own,
        )
        sequence.prompt_blocks = self.served.blocks_of(prompt[: sequence.num_shared], self.namespace)
        return sequence

    def submit(self, request: Request, *, hold: bool = False) -> Decoding:
        """Sends ``Reserve``."""
        sequence = self.new_sequence(request)
        first = None if request.emitted else self.reference.first(request)
        decoding = self.sequences[sequence.id] = Decoding(request, sequence, first, hold)
        self.core.handle(Reserve(sequence))
        return decoding

    def reserve(self, request: Request) -> Decoding:
        """Submits ``request`` and waits for ``Reserved``. The KV does not arrive before ``proceed``."""
        decoding = self.submit(request, hold=True)
        self.until(lambda: decoding.reserved or decoding.refused)
        assert decoding.refused is None, decoding.refused
        return decoding

    def refused(self, request: Request) -> str:
        """Submits ``request``, which the engine must refuse, and returns the reason."""
        decoding = self.submit(request)
        self.until(lambda: decoding.reserved or decoding.refused)
        assert decoding.refused is not None, "reserved"
        decoding.released = True
        return decoding.refused.reason

    def proceed(self, decoding: Decoding) -> None:
        """Lets the KV arrive, now or when the sequence has blocks."""
        decoding.hold = False
        self._answer_events()

    def begin(self, *requests: Request) -> list[Decoding]:
        """Reserves for all ``requests``, and lets their KV arrive."""
        decodings = [self.reserve(request) for request in requests]
        for decoding in decodings:
            self.proceed(decoding)
        return decodings

    def answer(self, *requests: Request) -> list[Decoding]:
        """Decodes all ``requests`` in one batch."""
        decodings = self.begin(*requests)
        self.run()
        return decodings

    def run(self) -> None:
        """Steps until nothing is left to compute; yields and writes KV again when the engine asks for it."""
        for _ in range(_MAX_STEPS):
            acted = self._answer_events()
            if not self.step() and not acted and not self._answer_events():
                return
        raise AssertionError(f"the engine is not idle after {_MAX_STEPS} steps")

    def run_until(self, condition: Callable[[], object]) -> None:
        """As ``run``, but returns once ``condition`` holds, which it must."""
        for _ in range(_MAX_STEPS):
            if condition():
                return
            self._answer_events()
            self.step()
        raise AssertionError(f"not within {_MAX_STEPS} steps")

    def release(self, decoding: Decoding) -> None:
        decoding.released = True
        self.core.handle(Release(decoding.id))

    def release_all(self) -> None:
        self._end_loans()
        for decoding in self.sequences.values():
            if not decoding.released:
                self.release(decoding)
        self.sequences.clear()

    def write(self, decoding: Decoding, kv: torch.Tensor, *, damaged: bool = False) -> int:
        """Writes a prompt's ``kv`` behind the held tokens, as the receiver does; returns the chunks written."""
        end = len(decoding.request.prompt)
        layer_map = self.served.pair.layer_map
        written, count = self._write(
            decoding.reserved[-1].blocks, kv, decoding.held_tokens, end, layer_map, damaged=damaged
        )
        assert damaged or written == count
        return written

    def start(self, decoding: Decoding) -> None:
        """Sends ``Start``, unless the first token ends the answer; then it sends ``Release``."""
        first, decoding.awaits_kv = decoding.first, False
        if first is not None and not decoding.tokens:
            emitted, decoding.finish = decoding.sequence.stop.judge(first.token_id, 0)
            if emitted:
                decoding.tokens.append(first)
            if decoding.finish is not None:
                self.release(decoding)
                return
        self.core.handle(Start(decoding.id, None if first is None else first.token_id))

    def _answer_events(self) -> bool:
        """Does what a servicer does after the engine's events. Returns False if there is nothing to do or to await."""
        acted = False
        for decoding in list(self.sequences.values()):
            if decoding.released:
                continue
            if decoding.must_yield:
                decoding.must_yield, acted = False, True
                self.core.handle(Yielded(decoding.id))
            if decoding.awaits_kv and not decoding.hold:
                acted = True
                if self._num_steps >= decoding.kv_due:
                    self._provide_kv(decoding)
            if decoding.finish is not None and not decoding.released:
                acted = True
                self.release(decoding)
        return acted

    def _provide_kv(self, decoding: Decoding) -> None:
        """Gives a sequence its prompt's KV and starts it."""
        self.write(decoding, self.reference.kv(decoding.request.prompt))
        self.start(decoding)

    def _take(self, event: SequenceEvent) -> None:
        decoding = self.sequences.get(event.id)
        if decoding is None or decoding.released:
            return
        match event:
            case Reserved():
                if decoding.reserved:
                    decoding.kv_due = self._num_steps + _KV_DELAY
                decoding.reserved.append(event)
                decoding.awaits_kv = True
            case Refused():
                decoding.refused = event
            case Preempted():
                decoding.awaits_kv = False
                decoding.must_yield = True
            case TokenSampled(index=index, token=token, finish=finish):
                assert not decoding.awaits_kv, "computed without its prompt's KV"
                assert not decoding.must_yield, "computed while it yields its blocks"
                assert decoding.finish is decoding.error is None, "computed after its end"
                assert index == len(decoding.request.emitted) + len(decoding.tokens)
                assert token is not None or finish is FinishReason.STOP
                decoding.tokens += [token] if token is not None else []
                decoding.finish = finish
            case SequenceFailed(error=error, ends_engine=ends):
                decoding.error, decoding.ended_engine = error, ends


class LocalDecodeDriver(DecodeDriver):
    """As ``DecodeDriver``; the worker's own prefill stage computes first tokens and KV."""

    def __init__(self, loaded: LoadedEngine, reference: SampledReference) -> None:
        super().__init__(loaded, reference)
        self._prompts: dict[str, Decoding] = {}  # by the prompt's id

    def _provide_kv(self, decoding: Decoding) -> None:
        if decoding in self._prompts.values():
            return
        request = decoding.request
        prompt = PrefillSequence(
            next(self._ids),
            list(request.prompt),
            request.sampling,
            sample_index=request.sample_index,
            sample_first_token=not decoding.sequence.emitted,
            processor=self._processor(request),
            cache_namespace=self.namespace,
        )
        self._prompts[prompt.id] = decoding
        self.core.handle(PrefillHere(prompt, decoding.id, decoding.held_tokens))

    def release(self, decoding: Decoding) -> None:
        self._drop_prompt(decoding)
        super().release(decoding)

    def _drop_prompt(self, decoding: Decoding) -> None:
        for id in [id for id, owner in self._prompts.items() if owner is decoding]:
            del self._prompts[id]
            self.core.handle(Release(id))

    def _answer_events(self) -> bool:
        for decoding in self.sequences.values():
            if decoding.must_yield:
                self._drop_prompt(decoding)
        return super()._answer_events()

    def _take(self, event: SequenceEvent | PrefillScheduled | PromptComputed) -> None:
        match event:
            case PromptComputed(id=id, first=first):
                decoding = self._prompts.pop(id)
                if first is not None and decoding.first is not None:
                    assert first.token_id == decoding.first.token_id
                self.start(decoding)
            case PrefillScheduled():
                pass
            case SequenceFailed(id=id) if id in self._prompts:
                raise AssertionError("a prompt failed") from event.error
            case _:
                super()._take(event)


@dataclass(eq=False)
class Prefilling:
    """A prompt in a prefill engine, as its servicer and sender see it.

    Attributes:
        kv: what the sender has read. [2, layers, tokens, kv_heads, head_dim]
        read: per layer, the number of tokens that have been read.
        chunks: the ranges of positions that have passed the last layer.
    """

    request: Request
    sequence: PrefillSequence
    kv: torch.Tensor
    read: list[int]
    awaiting: AwaitingImport | None = None
    scheduled: PrefillScheduled | None = None
    chunks: list[tuple[int, int]] = field(default_factory=list)
    computed: PromptComputed | None = None
    error: Exception | None = None
    ended_engine: bool = False
    released: bool = False

    @property
    def id(self) -> str:
        return self.sequence.id

    @property
    def cached_tokens(self) -> int:
        assert self.scheduled is not None
        return self.scheduled.cached_tokens


class PrefillDriver(_Driver):
    """Servicer and sender of a prefill engine. It reads each layer's KV inside the event that announces it.

    Attributes:
        on_kv: called after the KV of an event has been read.
    """

    def __init__(self, loaded: LoadedEngine, reference: SampledReference) -> None:
        super().__init__(loaded, reference, PrefillMetrics())
        self.prompts: dict[str, Prefilling] = {}
        self.on_kv: Callable[[Prefilling], object] = lambda prefilling: None

    def submit(self, request: Request, *, sample_first_token: bool = True, imports: bool = False) -> Prefilling:
        prompt = list(request.prompt)
        sequence = PrefillSequence(
            id=next(self._ids),
            prompt=prompt,
            sampling=request.sampling,
            sample_index=request.sample_index,
            sample_first_token=sample_first_token,
            processor=self._processor(request),
            cache_namespace=self.namespace,
            prompt_blocks=self.served.blocks_of(prompt, self.namespace),
            imports=imports,
        )
        kv = self.served.kv
        shape = (2, kv.num_layers, len(prompt), kv.num_kv_heads, kv.head_dim)
        prefilling = Prefilling(request, sequence, torch.full(shape, torch.nan), [0] * kv.num_layers)
        self.prompts[sequence.id] = prefilling
        self.core.handle(Submit(sequence))
        return prefilling

    def run(self) -> None:
        """Steps until nothing is left to compute."""
        for _ in range(_MAX_STEPS):
            if not self.step():
                return
        raise AssertionError(f"the engine is not idle after {_MAX_STEPS} steps")

    def import_kv(self, prefilling: Prefilling, kv: torch.Tensor, tokens: int) -> None:
        """Writes ``kv`` of the prompt's first ``tokens`` tokens to its blocks, and sends ``Imported``."""
        self.until(lambda: prefilling.awaiting)
        assert prefilling.awaiting is not None
        blocks, start = prefilling.awaiting.blocks, prefilling.awaiting.cached_tokens
        written, count = self._write(blocks, kv, start, tokens, range(self.served.kv.num_layers), damaged=False)
        assert written == count
        self.core.handle(Imported(prefilling.id, tokens))

    def compute(self, *requests: Request) -> list[Prefilling]:
        """Computes all ``requests``, submitted together, and keeps their KV."""
        prompts = [self.submit(request) for request in requests]
        self.run()
        return prompts

    def cancel(self, prefilling: Prefilling) -> None:
        prefilling.sequence.cancelled = prefilling.released = True
        self.core.handle(Release(prefilling.id))

    def release_all(self) -> None:
        self._end_loans()
        for prefilling in self.prompts.values():
            if not prefilling.released:
                self.cancel(prefilling)
        self.prompts.clear()
        self.on_kv = lambda prefilling: None

    def read(self, prefilling: Prefilling, layer: int, end: int, event: DeviceEvent | None) -> None:
        """Reads ``layer``'s KV of the positions below ``end`` that have not been read, as the sender does."""
        start = prefilling.read[layer]
        if start >= end:
            return
        assert prefilling.scheduled is not None
        found = self._read(prefilling.scheduled.blocks, layer, start, end, event)
        prefilling.kv[:, layer : layer + 1, start:end] = found
        prefilling.read[layer] = end

    def _take(self, event: PrefillEvent) -> None:
        prefilling = self.prompts.get(event.id)
        if prefilling is None or prefilling.released:
            return
        length = len(prefilling.request.prompt)
        match event:
            case AwaitingImport(cached_tokens=cached):
                assert prefilling.awaiting is prefilling.scheduled is None
                assert cached + self.block_size < length, "nothing is left to import"
                prefilling.awaiting = event
            case PrefillScheduled(cached_tokens=cached, event=ready):
                assert prefilling.scheduled is None, "scheduled twice"
                prefilling.scheduled = event
                for layer in range(len(prefilling.read)):
                    self.read(prefilling, layer, cached, ready)
            case KvWritten(layers=layers, token_end=end, event=ready):
                for layer in layers:
                    self.read(prefilling, layer, end, ready)
                self.on_kv(prefilling)
            case ChunkComputed(token_start=start, token_end=end):
                assert start == (prefilling.chunks[-1][1] if prefilling.chunks else prefilling.cached_tokens)
                prefilling.chunks.append((start, end))
            case PromptComputed():
                assert prefilling.computed is prefilling.error is None, "computed after its end"
                assert prefilling.read == [length] * len(prefilling.read), "KV was not announced"
                assert prefilling.chunks[-1][1] == length
                prefilling.computed = event
            case SequenceFailed(error=error, ends_engine=ends):
                prefilling.error, prefilling.ended_engine = error, ends
