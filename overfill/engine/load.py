"""Loads the half of a pair, or both halves, into the engine that a worker was told to use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from overfill.engine.choice import FIRST_GPU, choose_engine
from overfill.engine.colocated import ColocatedEngine, ColocatedEvent
from overfill.engine.protocol import EngineOptions, LoadedEngine
from overfill.engine.sequence import PrefillEvent
from overfill.engine.stage import Stage
from overfill.engine.turns import Turns
from overfill.model.manifest import EngineName, Half, Pair
from overfill.settings.values import EngineChoice
from overfill.telemetry.metrics import DecodeMetrics, PrefillMetrics


def load_engine(choice: EngineChoice, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
    """Loads ``half`` into the chosen engine. Blocks for as long as that takes.

    Raises:
        InvalidRequest: an option does not fit the engine or the model; ``field`` names it.
        NotEnoughMemory: the device cannot hold weights, steps and KV cache.
        InvalidPair, UnsupportedModel: the engine cannot run the half.
        MissingExtra: the engine is not installed.
    """
    on_first_gpu = str(options.device) in FIRST_GPU
    args, ranks = bool(options.engine_args), options.tensor_parallel_size
    engine = choose_engine(choice, pair, half, lambda: on_first_gpu, has_args=args, ranks=ranks)
    if engine == "vllm":
        # The only import of this package: nothing else needs vLLM, which most installations lack.
        from overfill.engine.vllm.load import load_vllm

        return load_vllm(pair, half, options)
    (stage,) = _load(engine, pair, [(half, options)])
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
    return LoadedColocated(*_load(engine, pair, [("full", full), ("decoder", decoder)], memory_fraction))


@dataclass(frozen=True, slots=True)
class LoadedColocated:
    """Both halves of a pair, loaded into one process. Prefix caches outlive the engines that ``new_core`` makes."""

    full: Stage
    decoder: Stage

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of prompt and answer together, in either half."""
        return min(self.full.max_model_len, self.decoder.max_model_len)

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
            lambda emit: self.full.new_prefill(emit, prefill_metrics),
            self.decoder.new_decode(emit_decode, decode_metrics),
            self.full.runner,
            self.decoder.runner,
            self.full.pair.layer_map,
            Turns(self.full.options.max_num_batched_tokens, ttft_objective, itl_objective),
            emit_prefill,
            emit_decode,
        )

    def with_empty_pools(self) -> LoadedColocated:
        """The same halves with new block pools and empty prefix caches, after an interrupt in the bookkeeping."""
        return LoadedColocated(self.full.with_empty_pool(), self.decoder.with_empty_pool())


def _load(
    engine: EngineName, pair: Pair, halves: Sequence[tuple[Half, EngineOptions]], memory_fraction: float | None = None
) -> list[Stage]:
    if engine == "mock":
        # Each engine's modules are imported on use: the mock's process has no torch, and no other needs the mock.
        from overfill.engine.mock.load import load_mock

        return [load_mock(pair, half, options) for half, options in halves]
    from overfill.engine.build import MEMORY_FRACTION, load_half, size_pools

    return size_pools([load_half(pair, half, options) for half, options in halves], memory_fraction or MEMORY_FRACTION)
