"""Our engine as it runs in a worker, without sockets: the same engines, KV blocks, sampling and events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from overfill.engine.build import load_half, size_pools
from overfill.engine.decode import DecodeEngine
from overfill.engine.prefill import PrefillEngine
from overfill.engine.protocol import EngineOptions
from overfill.engine.runner import ModelRunner
from overfill.engine.sequence import (
    ChangeAdapter,
    DecodeSequence,
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
from overfill.kv.spec import KvCacheDtype
from overfill.lab.bench.engine.bounds import ModelCost
from overfill.making.tiny import random_products
from overfill.model.adapter import AdapterRecord, LoraAdapter
from overfill.model.manifest import Half, Pair
from overfill.request.params import SamplingParams

_GREEDY = SamplingParams(temperature=0, ignore_eos=True)
_BLOCK_SIZE = 16
_QUEUE = 1 << 20


def load(pair: Pair, half: Half, options: EngineOptions, tokens: int, *, engines: int = 1) -> Stage:
    """Loads a half with a KV cache for ``options.max_num_seqs`` sequences of ``tokens`` tokens in each of ``engines``.

    Raises:
        NotEnoughMemory: The cache does not fit.
    """
    loaded = load_half(pair, half, replace(options, block_size=_BLOCK_SIZE))
    memory = engines * options.max_num_seqs * (tokens // _BLOCK_SIZE + 2) * loaded.requirement.block_bytes
    options = replace(loaded.options, kv_memory=memory, max_model_len=tokens + _BLOCK_SIZE)
    return size_pools([replace(loaded, options=options)])[0]


def load_decoders(
    pair: Pair, options: EngineOptions, tokens: int, kv_cache_dtype: KvCacheDtype, adapters: int
) -> list[BenchDecoder]:
    """Loads what decodes, for ``options.max_num_seqs`` sequences of ``tokens`` tokens.

    Args:
        kv_cache_dtype: KV cache of the decoder.
        adapters: Number of random adapters, with products for all projections.

    Returns:
        The full model, the decoder, and the decoder with an adapter for each sequence, in turn. The second is left out
        for an identity pair with ``kv_cache_dtype`` "auto", because it would equal the first; the third, without
        adapters.
    """
    same = pair.identity and kv_cache_dtype == "auto"
    found = [BenchDecoder("full", load(pair, "full", options, tokens))]
    if adapters or not same:
        options = replace(options, kv_cache_dtype=kv_cache_dtype, max_adapters=adapters)
        stage = load(pair, "decoder", options, tokens, engines=2 if adapters and not same else 1)
        if not same:
            found.append(BenchDecoder("decoder", stage))
        if adapters:
            found.append(BenchDecoder("adapters", stage, adapters))
    return found


class BenchEngine:
    """One half as a benchmark measures it.

    Args:
        adapters: Number of slots whose adapters the sequences use.
    """

    def __init__(self, name: str, stage: Stage, adapters: int = 0) -> None:
        assert isinstance(stage.runner, ModelRunner)
        self.name, self._stage, self._runner, self._adapters = name, stage, stage.runner, adapters
        self._arrived: list[Any] = []

    def cost(self, batch: int) -> ModelCost:
        """Bytes and operations of the model, with the adapters of ``batch`` sequences."""
        model, slots = self._runner.model, self._stage.adapters
        adapters = 0 if slots is None else min(batch, self._adapters) * slots.slot_bytes
        return ModelCost.of(model.config, model.bytes_read + adapters, self._runner.cache.token_bytes)

    @property
    def formats(self) -> dict[str, str]:
        """Type of the model's weights, such as "bfloat16" or "int8", and element type of the KV cache."""
        model = self._runner.model
        weights = str(model.dtype) if model.quantize == "none" else model.quantize
        formats = {"weights": weights, "kv_cache": str(self._runner.cache.k.dtype)}
        return {name: of.removeprefix("torch.") for name, of in formats.items()}

    def _events(self) -> list[Any]:
        """Returns the engine's events since the last call. Raises the error of a sequence that failed."""
        events = self._arrived[:]
        self._arrived.clear()
        for event in events:
            if isinstance(event, SequenceFailed):
                raise event.error
        return events


class BenchDecoder(BenchEngine):
    """Decodes on made-up KV: no prompt is computed, because the speed does not depend on values."""

    def __init__(self, name: str, stage: Stage, adapters: int = 0) -> None:
        super().__init__(name, stage, adapters)
        self._engine = DecodeEngine(
            self._runner, stage.pool, _QUEUE, stage.options.max_num_batched_tokens, self._arrived.extend
        )
        self._ids: list[str] = []
        cache = self._runner.cache
        for tensor in (cache.k, cache.v, cache.k_scales, cache.v_scales):
            if tensor is not None:
                tensor.random_(2)  # Pages that were never written would all be one page of zeros, read from a cache.
        for slot in range(adapters):
            assert stage.adapters is not None
            rank = stage.adapters.max_rank
            products = random_products(self._runner.model.config, slot, rank)
            adapter = LoraAdapter(AdapterRecord(f"random-{slot}", "", "", rank), products)
            stage.adapters.stage(slot, adapter)
            self._engine.handle(ChangeAdapter(slot, adapter))
        self._events()

    def begin(self, batch: int, prompt_tokens: int, steps: int) -> None:
        """Starts ``batch`` sequences after a prompt of ``prompt_tokens`` tokens, with room for ``steps`` more each."""
        limit = StopRule.of(_GREEDY, (), steps + 2)
        for index in range(batch):
            sequence = DecodeSequence(f"{self.name}-{index}", [0] * prompt_tokens, [], _GREEDY, limit)
            sequence.adapter = index % self._adapters if self._adapters else None
            self._engine.handle(Reserve(sequence))
            (event,) = self._events()
            if not isinstance(event, Reserved):
                raise InternalError(f"the engine reserved no KV blocks: {event}")
            self._ids.append(sequence.id)
            self._engine.handle(Start(sequence.id, 0))

    def steps(self, count: int) -> list[float]:
        """Decodes ``count`` tokens of every sequence, greedily. Returns the seconds of each step."""
        times = []
        for _ in range(count):
            remaining, start = len(self._ids), time.perf_counter()
            while remaining > 0:
                self._engine.step()
                for event in self._events():
                    if not isinstance(event, StepSampled) or event.finishes:
                        raise InternalError(f"unexpected event in a decode run: {event}")
                    remaining -= len(event.ids)
            times.append(time.perf_counter() - start)
        return times

    def end(self) -> None:
        """Frees the sequences."""
        for id in self._ids:
            self._engine.handle(Release(id))
        self._ids = []
        self._events()


class BenchPrefiller(BenchEngine):
    """Computes prompts with the full model."""

    def __init__(self, stage: Stage) -> None:
        super().__init__("full", stage)
        self._engine = PrefillEngine(
            self._runner, stage.pool, stage.options.max_num_batched_tokens, _QUEUE, self._arrived.extend
        )

    def prefill(self, lengths: Sequence[int]) -> float:
        """Seconds from submitting prompts of these lengths, all at once, to the first token of each."""
        random, vocab_size = torch.Generator().manual_seed(0), self._stage.pair.full_config.vocab_size
        prompts = [torch.randint(vocab_size, (length,), generator=random).tolist() for length in lengths]
        start = time.perf_counter()
        for id, prompt in enumerate(prompts):
            self._engine.handle(Submit(PrefillSequence(str(id), prompt, _GREEDY)))
        remaining = len(prompts)
        while remaining:
            if not self._engine.step():
                raise InternalError("the prompts do not fit into the KV cache")
            remaining -= sum(isinstance(event, PromptComputed) for event in self._events())
        seconds = time.perf_counter() - start
        for id in range(len(prompts)):
            self._engine.handle(Release(str(id)))
        return seconds
