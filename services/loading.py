"""Loads what a worker's settings name: the halves of a pair, into their engine."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from overfill.engine.choice import why_not_vllm
from overfill.engine.device import resolve_device, use_device
from overfill.engine.gpu_memory import loading_turn
from overfill.engine.load import LoadedColocated, load_colocated, load_engine
from overfill.engine.protocol import EngineOptions, LoadedEngine
from overfill.model.manifest import HALVES, EngineName, Half, Pair
from overfill.model.pair_files import check_digests, load_whole
from overfill.pair.store import resolve_pair
from overfill.process import startup
from overfill.settings.config import STEP_TOKENS, ColocatedConfig, DecodeConfig, PrefillConfig, WorkerConfig
from overfill.telemetry.progress import log_steps

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_Loaded = TypeVar("_Loaded")


async def load_half_of(config: WorkerConfig, half: Half) -> LoadedEngine:
    """Loads and warms the ``half`` of ``config.pair`` that a worker runs, in a thread, and checks its digest.

    The other half's digest is what ``pair.json`` states; its weights may be absent. Peers compare it.
    """
    options = engine_options(config, half)
    return await _in_thread(config, [half], options, lambda pair: load_engine(config.engine, pair, half, options))


async def load_both_halves_of(config: ColocatedConfig) -> LoadedColocated:
    """Loads and warms both halves of ``config.pair``, as ``load_half_of`` does."""
    full, decoder = engine_options(config, "full"), engine_options(config, "decoder")
    engine: EngineName = "mock" if config.engine == "mock" else "overfill"
    return await _in_thread(config, HALVES, full, lambda pair: load_colocated(pair, full, decoder, engine=engine))


def engine_options(config: WorkerConfig, half: Half) -> EngineOptions:
    """Returns what a worker's settings say about the engine of ``half``."""
    options = EngineOptions(
        device=device_of(config),
        dtype=config.dtype,
        block_size=config.block_size,
        kv_memory=config.kv_memory,
        gpu_share=config.gpu_share or 1.0,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        prefix_cache=config.prefix_cache,
        threads=config.threads,
        tensor_parallel_size=config.tensor_parallel_size,
        grammars=config.grammar_limits(),
        engine_args=json.loads(config.engine_args or "{}"),
    )
    if half == "full" and isinstance(config, PrefillConfig | ColocatedConfig):
        tokens = config.max_num_batched_tokens
        if file_of_turns(config) is not None:
            tokens = min(tokens, STEP_TOKENS)
        options = replace(options, max_num_batched_tokens=tokens)
    if half == "decoder" and isinstance(config, DecodeConfig):
        options = replace(options, kv_cache_dtype=config.kv_cache_dtype)
        if config.adapters is not None:
            options = replace(options, max_adapters=config.max_adapters, max_adapter_rank=config.max_adapter_rank)
    return options


def file_of_turns(config: WorkerConfig) -> Path | None:
    """Returns the file through which the worker takes turns at the cores; None if it takes none."""
    device = device_of(config)
    computes_on_cpu = device is not None and device.type == "cpu"
    return config.shared_cores if computes_on_cpu and config.engine != "vllm" else None


def device_of(config: WorkerConfig) -> torch.device | None:
    """Returns the device of a worker's engine; None for the mock engine, which needs no torch."""
    return None if config.engine == "mock" else resolve_device(config.device)


def torch_threads(config: WorkerConfig) -> int | None:
    """Returns the number of CPU threads of a worker's engine; None for the mock engine, which needs no torch."""
    return None if config.engine == "mock" else config.threads


def _load_pair(config: WorkerConfig, halves: Sequence[Half]) -> Pair:
    """Returns the worker's pair, and warns if ``auto`` does not choose vLLM on a GPU. Reads no weights."""
    with startup.once():
        folder = resolve_pair(config.pair, log_steps(logger))
    pair = replace(load_whole(folder, halves), revision=config.revision)
    if isinstance(config, DecodeConfig) and config.quantize is not None:
        pair = pair.with_quantize(config.quantize)
    if config.engine == "auto":
        device = resolve_device(config.device)
        if device.type == "cuda" and (warning := why_not_vllm(pair, *halves, device=str(device))):
            logger.warning("%s", warning)
    return pair


async def _in_thread(
    config: WorkerConfig, halves: Sequence[Half], options: EngineOptions, load: Callable[[Pair], _Loaded]
) -> _Loaded:
    """Loads ``halves`` of the worker's pair with ``load``, in a thread; another one checks their digests meanwhile."""
    if config.engine == "mock":
        halves = ()  # its pairs have no weights

    def run() -> _Loaded:
        use_device(options.device)
        pair = _load_pair(config, halves)
        with ThreadPoolExecutor(1, "digests") as reader:
            checked = reader.submit(check_digests, [pair], halves)
            try:
                with loading_turn(options):
                    return load(pair)
            finally:
                checked.result()  # that files are damaged explains why they do not load

    # The thread ends with the loading. If it lived on, OpenMP would count its idle team beside that of the engine's
    # thread as more threads than there are cores, and let threads sleep at each barrier: 10 ms per step on two cores.
    with ThreadPoolExecutor(1, "load") as loading:
        return await asyncio.get_running_loop().run_in_executor(loading, run)
