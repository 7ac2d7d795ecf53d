"""Loads the half of a pair, or both halves, into the engine that a worker was told to use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from overfill.engine.choice import FIRST_GPU, choose_engine
from overfill.engine.colocated import ColocatedEngine, ColocatedEvent
from overfill.engine.decode import DecodeEngine
from overfill.engine.parts import EngineParts
from overfill.engine.prefill import PrefillEngine
from overfill.engine.protocol import REPLAY_BUDGET, EngineCore, EngineOptions, LoadedEngine, ServedHalf
from overfill.engine.sequence import DecodeEvent, PrefillEvent
from overfill.engine.turns import Turns
from overfill.kv.blocks import BlockPool
from overfill.kv.prefix import PrefixCache
from overfill.kv.spec import DEFAULT_BLOCK_SIZE
from overfill.model.manifest import EngineName, Half, Pair
from overfill.settings.values import EngineChoice
from overfill.telemetry.metrics import DecodeMetrics, EngineMetrics, PrefillMetrics

if TYPE_CHECKING:
    from overfill.engine.build import LoadedHalf


def load_engine(choice: EngineChoice, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
    """Loads ``half`` into the chosen engine. Blocks for as long as that takes.

    Raises:
        InvalidRequest: an option does not fit the engine or the model; ``field`` names it.
        NotEnoughMemory: the device cannot hold weights, steps and KV cache.
        InvalidPair, UnsupportedModel: the engine cannot run the half.
        MissingExtra: the engine is not installed.
    """
    on_first_gpu = str(options.device) in FIRST_GPU
    engine = choose_engine(choice, pair, half, lambda: on_first_gpu, has_args=bool(options.engine_args))
    if engine == "vllm":
        # The only import of this package: nothing else needs vLLM, which most installations lack.
        from overfill.engine.vllm.load import load_vllm

        return load_vllm(pair, half, options)
    (parts,) = _load_halves(engine, pair, [(half, options)])
    stage = _Stage(half, parts, parts.prefix_cache(options.prefix_cache), options)
    return LoadedEngine(stage.served, stage.new_core)


def load_colocated(
    pair: Pair,
    full: EngineOptions,
    decoder: EngineOptions,
    memory_fraction: float | None = None,
    engine: EngineName = "overfill",
) -> LoadedColocated:
    """Loads both halves into one process. Divides the memory that is left between their KV caches.

    Args:
        full, decoder: options of the two halves. Those of the device, its memory and the sequences' length are equal.
        memory_fraction: as in ``size_pools``; None means its default.
        engine: OverFill's or the mock.

    Raises:
        ValueError: an option differs that must be equal.
        InvalidRequest, NotEnoughMemory, InvalidPair, UnsupportedModel: as in ``load_engine``.
    """
    for name in ("device", "dtype", "kv_memory", "gpu_share", "max_model_len", "threads"):
        if getattr(full, name) != getattr(decoder, name):
            raise ValueError(f"{name} differs: {getattr(full, name)} and {getattr(decoder, name)}")
    stages: list[tuple[Half, EngineOptions]] = [("full", full), ("decoder", decoder)]
    parts = _load_halves(engine, pair, stages, memory_fraction)
    return LoadedColocated(
        *(
            _Stage(half, of_half, of_half.prefix_cache(options.prefix_cache), options)
            for (half, options), of_half in zip(stages, parts, strict=True)
        )
    )


@dataclass(frozen=True, slots=True)
class _Stage:
    """A loaded half with its KV cache, for which any number of engines can be made one after the other."""

    half: Half
    parts: EngineParts
    prefix: PrefixCache
    options: EngineOptions

    @property
    def served(self) -> ServedHalf:
        return served_half(self.parts, self.half, self.prefix)

    def new_core(self, emit: Callable[[list[Any]], None], metrics: EngineMetrics) -> EngineCore:
        if self.half == "full":
            assert isinstance(metrics, PrefillMetrics)
            return self.new_prefill(emit, metrics)
        assert isinstance(metrics, DecodeMetrics)
        return self.new_decode(emit, metrics)

    def new_prefill(
        self, emit: Callable[[list[PrefillEvent]], None], metrics: PrefillMetrics | None = None
    ) -> PrefillEngine:
        parts, options = self.parts, self.options
        return PrefillEngine(
            *(parts.runner, parts.pool, options.max_num_batched_tokens, options.max_num_seqs),
            *(emit, self.prefix, metrics),
        )

    def new_decode(
        self, emit: Callable[[list[DecodeEvent]], None], metrics: DecodeMetrics | None = None
    ) -> DecodeEngine:
        parts = self.parts
        return parts.decode_engine(
            parts.runner, parts.pool, self.options.max_num_seqs, REPLAY_BUDGET, emit, self.prefix, metrics
        )

    def with_empty_pool(self) -> _Stage:
        self.parts.runner.synchronize()
        pool = self.parts.pool
        parts = replace(self.parts, pool=BlockPool(pool.num_blocks, pool.block_size))
        return replace(self, parts=parts, prefix=parts.prefix_cache(self.options.prefix_cache))


@dataclass(frozen=True, slots=True)
class LoadedColocated:
    """Both halves of a pair, loaded into one process. Prefix caches outlive the engines that ``new_core`` makes."""

    _full: _Stage
    _decoder: _Stage

    @property
    def full(self) -> ServedHalf:
        return self._full.served

    @property
    def decoder(self) -> ServedHalf:
        return self._decoder.served

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of prompt and answer together, in either half."""
        return min(self._full.parts.max_model_len, self._decoder.parts.max_model_len)

    def new_core(
        self,
        emit_prefill: Callable[[list[PrefillEvent]], None],
        emit_decode: Callable[[Sequence[ColocatedEvent]], None],
        prefill_metrics: PrefillMetrics | None = None,
        decode_metrics: DecodeMetrics | None = None,
        ttft_objective: float | None = None,
        itl_objective: float | None = None,
    ) -> ColocatedEngine:
        """Makes the engines; only one core may be in use at a time. ``Turns`` defines the objectives."""
        return ColocatedEngine(
            lambda emit: self._full.new_prefill(emit, prefill_metrics),
            self._decoder.new_decode(emit_decode, decode_metrics),
            self._full.parts.runner,
            self._decoder.parts.runner,
            self._full.parts.pair.layer_map,
            Turns(self._full.options.max_num_batched_tokens, ttft_objective, itl_objective),
            emit_prefill,
            emit_decode,
        )

    def with_empty_pools(self) -> LoadedColocated:
        """The same halves with new block pools and empty prefix caches, after an interrupt in the bookkeeping."""
        return LoadedColocated(self._full.with_empty_pool(), self._decoder.with_empty_pool())


def served_half(parts: EngineParts, half: Half, prefix: PrefixCache) -> ServedHalf:
    """What a servicer knows of a half that OverFill's engine runs."""
    return ServedHalf(
        engine_version=parts.version,
        half=half,
        pair=parts.pair,
        config=parts.config,
        kv=parts.kv,
        max_model_len=parts.max_model_len,
        device=parts.runner.device,
        store=parts.runner.cache,
        grammars=parts.grammars,
        blocks_of=prefix.blocks_of,
        new_processor=parts.new_processor,
        codecs=parts.codecs,
        prefix_keys=prefix.journal if half == "full" else None,
        kv_cache_dtype=parts.kv_cache_dtype,
    )


def _load_halves(
    engine: EngineName,
    pair: Pair,
    halves: Sequence[tuple[Half, EngineOptions]],
    memory_fraction: float | None = None,
) -> list[EngineParts]:
    if engine == "mock":
        # Each engine's modules are imported on use: the mock's process has no torch, and no other needs the mock.
        from overfill.engine.mock.load import load_mock

        return [load_mock(pair, half, options) for half, options in halves]
    from overfill.engine.build import MEMORY_FRACTION, size_pools

    options = halves[0][1]
    return size_pools(
        [_load_half(pair, half, of_half) for half, of_half in halves],
        options.kv_memory,
        options.max_model_len,
        memory_fraction or MEMORY_FRACTION,
        options.gpu_share,
        options.grammars,
    )


def _load_half(pair: Pair, half: Half, options: EngineOptions) -> LoadedHalf:
    from overfill.engine.build import load_half

    assert options.device is not None, "only the mock engine has no device"
    return load_half(
        pair,
        half,
        dtype=options.dtype,
        device=options.device,
        block_size=options.block_size or DEFAULT_BLOCK_SIZE,
        max_model_len=options.max_model_len,
        warm_tokens=options.max_num_batched_tokens if half == "full" else max(options.max_num_seqs, REPLAY_BUDGET),
        max_num_seqs=options.max_num_seqs,
        kv_cache_dtype=options.kv_cache_dtype,
    )
