"""Makes a half of a pair for the mock engine, which takes everything but the weights from the pair."""

from __future__ import annotations

from dataclasses import replace

from overfill.api.tokenizer import Tokenizer
from overfill.engine.device import NotEnoughMemory
from overfill.engine.mock.adapters import MockAdapterSlots
from overfill.engine.mock.decode import MockDecodeEngine
from overfill.engine.mock.options import MockOptions
from overfill.engine.mock.runner import MockRunner
from overfill.engine.mock.script import Script
from overfill.engine.mock.store import MockKvStore
from overfill.engine.protocol import EngineOptions
from overfill.engine.stage import Stage, new_prefix_cache
from overfill.kv.blocks import BlockPool
from overfill.kv.handshake import MOCK_READER
from overfill.kv.spec import DEFAULT_BLOCK_SIZE
from overfill.model.manifest import Half, Pair
from overfill.request.grammar import Grammars
from overfill.v1 import common_pb2

_TOKENS = 524_288
"""Tokens that the KV cache holds by default."""


def load_mock(pair: Pair, half: Half, options: EngineOptions) -> Stage:
    """Makes a half without weights. It has as many blocks for ``kv_memory`` as a model would have.

    Raises:
        InvalidRequest: an option does not fit the engine or the model; ``field`` names it.
        NotEnoughMemory: the KV cache cannot hold the longest sequence.
        InvalidPair: the tokenizer is damaged.
    """
    mock = MockOptions.of(options.engine_args)
    returns_kv = half == "decoder" and options.prefix_cache and pair.returns_kv()
    # No model reads this KV, no cache mixes it with a model's, and no answer of a model continues here.
    pair = replace(pair, reader=MOCK_READER)
    config = pair.config(half)
    dtype = options.dtype or "float32"
    spec, block_size = config.kv_spec(dtype), options.block_size or DEFAULT_BLOCK_SIZE
    kv_memory = options.kv_memory or _TOKENS * spec.token_bytes
    num_blocks = kv_memory // (spec.token_bytes * block_size)
    longest = config.longest(options.max_model_len)
    if options.max_model_len is None:
        longest = min(longest, num_blocks * block_size)
    if num_blocks * block_size < max(2, longest):
        raise NotEnoughMemory(
            f"a KV cache of {kv_memory} bytes holds {num_blocks * block_size} tokens, fewer than "
            f"--max-model-len {max(2, longest)}; give at least --kv-memory {max(2, longest) * spec.token_bytes}"
        )
    tokenizer = Tokenizer.load(pair.full_path, mock.tool_call_parser)
    script = Script(tokenizer, mock)
    eos_ids = pair.full_config.eos_token_ids
    adapters = None
    if half == "decoder" and options.max_adapters:
        adapters = MockAdapterSlots(tokenizer, options.max_adapters, options.max_adapter_rank)
    return Stage(
        half,
        pair,
        dtype,
        MockRunner(half, MockKvStore(spec, num_blocks, block_size), mock, adapters),
        new_prefix_cache(pair, dtype, BlockPool(num_blocks, block_size), options.prefix_cache),
        options,
        longest,
        Grammars(pair.full_path / "tokenizer.json", config.vocab_size, eos_ids, options.grammars),
        "mock",
        script.player,
        (common_pb2.KV_CODEC_RAW,),
        MockDecodeEngine,
        adapters,
        returns_kv,
    )
