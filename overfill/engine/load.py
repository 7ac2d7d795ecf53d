"""Loads a half of a pair into the engine that a worker was told to use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from overfill.engine.build import EngineParts, build_engine_parts
from overfill.engine.choice import choose_engine
from overfill.engine.decode import DecodeEngine
from overfill.engine.prefill import PrefillEngine
from overfill.engine.protocol import REPLAY_BUDGET, EngineCore, EngineOptions, LoadedEngine, ServedHalf
from overfill.kv.prefix import PrefixCache
from overfill.kv.spec import DEFAULT_BLOCK_SIZE
from overfill.model.manifest import Half, Pair
from overfill.settings.values import EngineChoice
from overfill.telemetry.metrics import DecodeMetrics, EngineMetrics, PrefillMetrics
from overfill.version import __version__


def load_engine(choice: EngineChoice, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
    """Loads ``half`` into the chosen engine. Blocks for as long as that takes.

    Raises:
        InvalidRequest: an option does not fit the engine or the model; ``field`` names it.
        NotEnoughMemory: the device cannot hold weights, steps and KV cache.
        InvalidPair, UnsupportedModel: the engine cannot run the half.
        MissingExtra: the engine is not installed.
    """
    on_cuda = options.device.type == "cuda"
    if choose_engine(choice, pair, half, lambda: on_cuda, has_args=bool(options.engine_args)) == "vllm":
        # The only import of this package: nothing else needs vLLM, which most installations lack.
        from overfill.engine.vllm.load import load_vllm

        return load_vllm(pair, half, options)
    parts = build_engine_parts(
        pair,
        half,
        dtype=options.dtype,
        device=options.device,
        block_size=options.block_size or DEFAULT_BLOCK_SIZE,
        kv_memory=options.kv_memory,
        max_model_len=options.max_model_len,
        warm_tokens=options.max_num_batched_tokens if half == "full" else max(options.max_num_seqs, REPLAY_BUDGET),
        max_num_seqs=options.max_num_seqs,
        kv_cache_dtype=options.kv_cache_dtype,
    )
    prefix = parts.prefix_cache(options.prefix_cache)
    new_core = partial(_new_core, half, parts, prefix, options)
    return LoadedEngine(served_half(parts, half, prefix), new_core)


def served_half(parts: EngineParts, half: Half, prefix: PrefixCache) -> ServedHalf:
    """What a servicer knows of a half that OverFill's engine runs."""
    return ServedHalf(
        engine_version=f"overfill {__version__}",
        half=half,
        pair=parts.pair,
        config=parts.config,
        kv=parts.kv,
        max_model_len=parts.max_model_len,
        device=parts.runner.device,
        store=parts.runner.cache,
        grammars=parts.grammars,
        blocks_of=prefix.blocks_of,
        prefix_keys=prefix.journal if half == "full" else None,
        kv_cache_dtype=parts.kv_cache_dtype,
    )


def _new_core(
    half: Half,
    parts: EngineParts,
    prefix: PrefixCache,
    options: EngineOptions,
    emit: Callable[[list[Any]], None],
    metrics: EngineMetrics,
) -> EngineCore:
    if half == "full":
        assert isinstance(metrics, PrefillMetrics)
        return PrefillEngine(
            parts.runner, parts.pool, options.max_num_batched_tokens, options.max_num_seqs, emit, prefix, metrics
        )
    assert isinstance(metrics, DecodeMetrics)
    return DecodeEngine(parts.runner, parts.pool, options.max_num_seqs, REPLAY_BUDGET, emit, prefix, metrics)
