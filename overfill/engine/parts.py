"""A loaded half of a pair, from which OverFill's schedulers are made. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from overfill.engine.decode import DecodeEngine
from overfill.engine.protocol import NewProcessor
from overfill.engine.work import Runner
from overfill.kv.blocks import BlockPool
from overfill.kv.prefix import PrefixCache
from overfill.kv.spec import KvCacheDtype, KvSpec
from overfill.model.config import ModelConfig
from overfill.model.manifest import Pair
from overfill.request.grammar import Grammars
from overfill.request.names import CODECS
from overfill.v1 import common_pb2


@dataclass(frozen=True, slots=True)
class EngineParts:
    """A half of a pair that OverFill's schedulers run: with a model, or with a mock that waits.

    Attributes:
        kv: geometry of the **full** model's KV in this stack's dtype, which is the KV that travels.
        max_model_len: maximum number of tokens of prompt and answer together.
        grammars: compiler of the grammars that requests ask for.
        kv_cache_dtype: format in which this half stores KV.
        version, new_processor, codecs: as in ``ServedHalf``.
        decode_engine: the engine of a decoder.
    """

    runner: Runner
    pool: BlockPool
    config: ModelConfig
    kv: KvSpec
    pair: Pair
    max_model_len: int
    grammars: Grammars
    kv_cache_dtype: KvCacheDtype
    version: str
    new_processor: NewProcessor
    codecs: tuple[common_pb2.KvCodec, ...] = tuple(CODECS.values())
    decode_engine: type[DecodeEngine] = DecodeEngine

    def prefix_cache(self, enabled: bool) -> PrefixCache:
        """A prefix cache on ``pool`` that knows this model's cost of recomputing KV."""
        return PrefixCache(
            self.pool,
            self.pair.kv_identity(self.kv.dtype).cache_key,
            enabled=enabled,
            attention_tokens=self.pair.full_config.attention_tokens,
        )
