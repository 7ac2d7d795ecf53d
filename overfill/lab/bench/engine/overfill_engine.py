"""Our engine as it runs in a worker, without sockets: the same engines, KV blocks, sampling and events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from overfill.engine.build import load_half, size_pools
from overfill.engine.decode import DecodeEngine
from overfill.engine.prefill import PrefillEngine
from overfill.engine.protocol import EngineOptions
from overfill.engine.runner import ModelRunner
from overfill.engine.sequence import (
    ChangeAdapter,
    DecodeEvent,
    DecodeSequence,
    PrefillEvent,
    PrefillSequence,
    PromptComputed,
    Release,
    Reserve,
    Reserved,
    SequenceFailed,
    Start,
    StepSampled,
    StopRule,
    Submit,
)
from overfill.engine.stage import Stage
from overfill.errors import InternalError
from overfill.kv.cache import copy_sequence
from overfill.kv.spec import DTypeName, KvCacheDtype, Quantization
from overfill.lab.bench.engine.bounds import ModelCost
from overfill.making.tiny import random_products
from overfill.model.adapter import AdapterRecord, LoraAdapter
from overfill.model.manifest import Half, Pair
from overfill.request.params import SamplingParams

_GREEDY = SamplingParams(temperature=0, ignore_eos=True)
_BLOCK_SIZE = 16
_STEP_TOKENS = 2048
_ADAPTER_RANK = 16


def load_engines(
    pair: Pair,
    *,
    dtype: DTypeName | None,
    device: torch.device,
    quantize: Quantization | None = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    batch: int,
    tokens: int,
    adapters: int = 0,
) -> list[OverfillEngine]:
    """Loads the full model and the decoder, each with a KV cache of its own.

    Args:
        quantize: Weights of the decoder. None means the pair's recipe.
        kv_cache_dtype: KV cache of the decoder.
        batch, tokens: Most sequences at once, and most tokens (prompt and answer) of one.
        adapters: Number of random adapters, with products for all projections.

    Returns:
        An engine that decodes with the full model, one that decodes with the decoder, and one that decodes with the
        decoder and an adapter for each sequence, in turn. The second is left out for an identity pair with
        ``kv_cache_dtype`` "auto", because it would equal the first; the third, without adapters.

    Raises:
        NotEnoughMemory: The caches do not fit.
    """
    if quantize is not None:
        pair = replace(pair, quantize=quantize)
    same = pair.identity and kv_cache_dtype == "auto"

    def load(half: Half) -> Stage:
        of_decoder = half == "decoder"
        options = EngineOptions(
            device,
            dtype,
            _BLOCK_SIZE,
            max_num_seqs=batch,
            max_num_batched_tokens=_STEP_TOKENS,
            kv_cache_dtype=kv_cache_dtype if of_decoder else "auto",
            max_adapters=adapters if of_decoder else 0,
            max_adapter_rank=_ADAPTER_RANK,
        )
        loaded = load_half(pair, half, options)
        engines = 2 if of_decoder and adapters and not same else 1  # that use its cache
        # One sequence more, from which prompts are copied.
        blocks = engines * (batch + 1) * (tokens // _BLOCK_SIZE + 2)
        memory = blocks * loaded.requirement.block_bytes
        options = replace(options, kv_memory=memory, max_model_len=tokens + _BLOCK_SIZE)
        return size_pools([replace(loaded, options=options)])[0]

    full = load("full")
    engines = [OverfillEngine("full", full, full)]
    if adapters or not same:
        decoder = load("decoder")
        if not same:
            engines.append(OverfillEngine("decoder", full, decoder))
        if adapters:
            engines.append(OverfillEngine("adapters", full, decoder, adapters))
    return engines


class OverfillEngine:
    """Prefills with ``full`` and decodes with ``parts``, which belong to the full model or to the decoder.

    In a decode run all sequences have the same prompt. The engine prefills it once and copies its KV to blocks of each
    sequence.

    Args:
        adapters: number of slots of ``parts`` that get a random adapter.
    """

    def __init__(self, name: str, full: Stage, parts: Stage, adapters: int = 0) -> None:
        self.name = name
        assert isinstance(full.runner, ModelRunner)
        assert isinstance(parts.runner, ModelRunner)
        self._full = full
        self._parts = parts
        self._full_runner, self._runner = full.runner, parts.runner
        self._prefill_events: list[PrefillEvent] = []
        self._events: list[DecodeEvent] = []
        self._prefill = PrefillEngine(full.runner, full.pool, _STEP_TOKENS, 1 << 20, self._prefill_events.extend)
        self._decode = DecodeEngine(parts.runner, parts.pool, 1 << 20, _STEP_TOKENS, self._events.extend)
        self._ids: list[str] = []
        self._adapters = adapters
        for slot in range(adapters):
            assert parts.adapters is not None
            products = random_products(self._runner.model.config, slot, _ADAPTER_RANK)
            adapter = LoraAdapter(AdapterRecord(f"random-{slot}", "", "", _ADAPTER_RANK), products)
            parts.adapters.stage(slot, adapter)
            self._decode.handle(ChangeAdapter(slot, adapter))
        self._pop_events()

    def cost(self, batch: int) -> ModelCost:
        """Bytes and operations of the model that decodes, with the adapters of ``batch`` sequences."""
        model, slots = self._runner.model, self._parts.adapters
        adapters = 0 if slots is None else min(batch, self._adapters) * slots.slot_bytes
        return ModelCost.of(model.config, model.bytes_read + adapters, self._runner.cache.token_bytes)

    @property
    def weights(self) -> str:
        """Weight type of the model that decodes, such as "bfloat16" or "int8"."""
        model = self._runner.model
        return str(model.dtype).removeprefix("torch.") if model.quantize == "none" else model.quantize

    @property
    def kv_cache(self) -> str:
        """Element type of the KV cache that decode reads."""
        return str(self._runner.cache.k.dtype).removeprefix("torch.")

    def begin(self, batch: int, prompt_tokens: int, steps: int) -> None:
        """Starts ``batch`` sequences after a prompt of ``prompt_tokens`` tokens, with room for ``steps`` more each."""
        prompt = random_prompt(self._full.pair.full_config.vocab_size, prompt_tokens, 0)
        source = PrefillSequence("prompt", prompt, _GREEDY)
        first = self._prefill_all([source])["prompt"]
        pair = self._parts.pair
        layers = range(pair.full_config.num_layers) if self._parts is self._full else pair.layer_map
        limit = StopRule.of(_GREEDY, (), steps + 2)
        try:
            for index in range(batch):
                sequence = DecodeSequence(f"{self.name}-{index}", list(prompt), [], _GREEDY, limit)
                sequence.adapter = index % self._adapters if self._adapters else None
                self._decode.handle(Reserve(sequence))
                (event,) = self._pop_events()
                if not isinstance(event, Reserved):
                    raise InternalError(f"the engine reserved no KV blocks: {event}")
                self._ids.append(sequence.id)
                copy_sequence(
                    self._full_runner.cache,
                    source.blocks,
                    self._runner.cache,
                    event.blocks,
                    layers,
                    prompt_tokens,
                )
                self._decode.handle(Start(sequence.id, first))
        finally:
            self._prefill.handle(Release("prompt"))

    def steps(self, count: int) -> list[float]:
        """Decodes ``count`` tokens of every sequence, greedily. Returns the seconds of each step."""
        return [self._step() for _ in range(count)]

    def end(self) -> None:
        """Frees the sequences."""
        for id in self._ids:
            self._decode.handle(Release(id))
        self._ids = []
        self._events.clear()

    def prefill(self, lengths: Sequence[int]) -> float:
        """Seconds from submitting prompts of these lengths, all at once, to the first token of each."""
        sequences = [
            PrefillSequence(str(i), random_prompt(self._full.pair.full_config.vocab_size, length, i), _GREEDY)
            for i, length in enumerate(lengths)
        ]
        start = time.perf_counter()
        self._prefill_all(sequences)
        elapsed = time.perf_counter() - start
        for sequence in sequences:
            self._prefill.handle(Release(sequence.id))
        return elapsed

    def _prefill_all(self, sequences: Sequence[PrefillSequence]) -> dict[str, int]:
        """Prefills ``sequences``. Returns their first tokens by sequence id; their KV stays in their blocks."""
        for sequence in sequences:
            self._prefill.handle(Submit(sequence))
        firsts: dict[str, int] = {}
        while len(firsts) < len(sequences):
            if not self._prefill.step():
                raise InternalError("the prompts do not fit into the KV cache")
            for event in self._prefill_events:
                if isinstance(event, SequenceFailed):
                    raise event.error
                if isinstance(event, PromptComputed) and event.first is not None:
                    firsts[event.id] = event.first.token_id
            self._prefill_events.clear()
        return firsts

    def _step(self) -> float:
        """Runs the engine until every sequence has one more token. Returns the seconds."""
        remaining = len(self._ids)
        start = time.perf_counter()
        while remaining > 0:
            self._decode.step()
            for event in self._pop_events():
                if isinstance(event, SequenceFailed):
                    raise event.error
                if not isinstance(event, StepSampled) or event.finishes:
                    raise InternalError(f"unexpected event in a decode run: {event}")
                remaining -= len(event.ids)
        return time.perf_counter() - start

    def _pop_events(self) -> list[DecodeEvent]:
        events = self._events[:]
        self._events.clear()
        return events


def random_prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    """Random token ids. Speed does not depend on which ids they are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()
