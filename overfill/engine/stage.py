"""A loaded half of a pair with its KV cache, for which OverFill's schedulers are made. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from overfill.engine.decode import DecodeEngine
from overfill.engine.prefill import PrefillEngine
from overfill.engine.protocol import REPLAY_BUDGET, AdapterSlots, EngineCore, EngineOptions, NewProcessor, ServedHalf
from overfill.engine.sequence import DecodeEvent, PrefillEvent
from overfill.engine.work import Runner
from overfill.kv.blocks import BlockPool
from overfill.kv.prefix import PrefixCache
from overfill.kv.spec import DTypeName
from overfill.model.manifest import Half, Pair
from overfill.request.grammar import Grammars
from overfill.request.names import CODECS
from overfill.telemetry.metrics import DecodeMetrics, EngineMetrics, PrefillMetrics
from overfill.v1 import common_pb2


def new_prefix_cache(pair: Pair, dtype: DTypeName, pool: BlockPool, enabled: bool) -> PrefixCache:
    """Makes a prefix cache on ``pool`` that knows this model's cost of recomputing KV."""
    identity, attention_tokens = pair.kv_identity(dtype).cache_key, pair.full_config.attention_tokens
    return PrefixCache(pool, identity, enabled=enabled, attention_tokens=attention_tokens)


@dataclass(frozen=True, slots=True)
class Stage:
    """A half with a model, or with a mock that waits. Any number of engines can be made for it, one after the other.

    Attributes:
        dtype: of the KV that travels.
        prefix: prefix cache, which outlives the engines.
        max_model_len: maximum number of tokens of prompt and answer together.
        grammars, version, new_processor, codecs: as in ``ServedHalf``.
        decode_engine: the engine of a decoder.
        adapters: as in ``ServedHalf``.
        returns_kv: as in ``DecodeEngine``.
    """

    half: Half
    pair: Pair
    dtype: DTypeName
    runner: Runner
    prefix: PrefixCache
    options: EngineOptions
    max_model_len: int
    grammars: Grammars
    version: str
    new_processor: NewProcessor
    codecs: tuple[common_pb2.KvCodec, ...] = tuple(CODECS.values())
    decode_engine: type[DecodeEngine] = DecodeEngine
    adapters: AdapterSlots | None = None
    returns_kv: bool = False

    @property
    def pool(self) -> BlockPool:
        return self.prefix.pool

    @property
    def served(self) -> ServedHalf:
        """What a servicer knows of the half."""
        lends = self.returns_kv or (self.half == "full" and self.options.prefix_cache)
        return ServedHalf(
            engine_version=self.version,
            half=self.half,
            pair=self.pair,
            config=self.pair.config(self.half),
            kv=self.pair.full_config.kv_spec(self.dtype),
            max_model_len=self.max_model_len,
            device=self.runner.device,
            store=self.runner.cache,
            grammars=self.grammars,
            blocks_of=self.prefix.blocks_of,
            new_processor=self.new_processor,
            codecs=self.codecs,
            prefix_keys=self.prefix.journal if lends else None,
            kv_cache_dtype=self.options.kv_cache_dtype,
            scores_prompts=self.runner.max_scored > 0,
            adapters=self.adapters,
        )

    def new_core(self, emit: Callable[[list[Any]], None], metrics: EngineMetrics) -> EngineCore:
        if self.half == "full":
            assert isinstance(metrics, PrefillMetrics)
            return self.new_prefill(emit, metrics)
        assert isinstance(metrics, DecodeMetrics)
        return self.new_decode(emit, metrics)

    def new_prefill(
        self, emit: Callable[[list[PrefillEvent]], None], metrics: PrefillMetrics | None = None
    ) -> PrefillEngine:
        batched, seqs = self.options.max_num_batched_tokens, self.options.max_num_seqs
        return PrefillEngine(self.runner, self.pool, batched, seqs, emit, self.prefix, metrics)

    def new_decode(
        self, emit: Callable[[list[DecodeEvent]], None], metrics: DecodeMetrics | None = None
    ) -> DecodeEngine:
        seqs = self.options.max_num_seqs
        return self.decode_engine(
            self.runner, self.pool, seqs, REPLAY_BUDGET, emit, self.prefix, metrics, self.returns_kv
        )

    def with_empty_pool(self) -> Stage:
        self.runner.synchronize()
        pool = BlockPool(self.pool.num_blocks, self.pool.block_size)
        return replace(self, prefix=new_prefix_cache(self.pair, self.dtype, pool, self.options.prefix_cache))
