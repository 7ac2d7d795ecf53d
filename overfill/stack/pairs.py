"""The pairs of a stack: finds their folders, and checks that they fit each other and their workers' engines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from overfill.engine.choice import FIRST_GPU, check_ranks, choose_engine
from overfill.engine.mock.options import MockOptions
from overfill.engine.vllm_args import check_vllm_args, installed_arguments
from overfill.model.manifest import Half, Pair, check_family
from overfill.model.pair_files import load_whole
from overfill.pair.store import resolve_pair
from overfill.settings.config import ColocatedConfig, DecodeConfig
from overfill.settings.tiers import TierSpec
from overfill.settings.values import EngineChoice
from overfill.stack.spec import StackSpec, kind_of
from overfill.telemetry.progress import Report


def resolve_tiers(tiers: Sequence[TierSpec], report: Report) -> tuple[TierSpec, ...]:
    """Returns the tiers with their pairs' folders, as ``resolve_pairs``."""
    resolved = tuple(tier.model_copy(update={"pair": str(resolve_pair(tier.pair, report))}) for tier in tiers)
    _check_family({tier.name: tier.pair for tier in resolved})
    return resolved


def resolve_pairs(spec: StackSpec, report: Report) -> StackSpec:
    """Returns ``spec`` with the folders of its pairs; prepares named pairs that are missing.

    Raises:
        InvalidPair: a pair cannot be prepared, or two pairs of one revision have different full models or tokenizers.
    """
    resolved = spec.with_pairs(lambda pair: str(resolve_pair(pair, report)))
    for pairs in resolved.pairs_by_revision.values():
        _check_family(pairs)
    return resolved


def _check_family(pairs: Mapping[str, str]) -> None:
    """Raises InvalidPair if tiers have different full models or tokenizers. ``pairs`` has the folder of each."""
    if len(pairs) > 1:
        check_family({tier: Pair.load(Path(pair)) for tier, pair in pairs.items()})


def tier_pair(tier: TierSpec) -> Pair:
    """Loads the pair in the tier's folder, with the format of weights that the tier's settings give."""
    pair = Pair.load(Path(tier.pair))
    return pair if tier.quantize is None else pair.with_quantize(tier.quantize)


def check_engines(spec: StackSpec) -> None:
    """Raises the errors of ``choose_engine`` for both stages and every tier, such as UnsupportedModel for FP8 weights.

    On a joined cluster, workers run on machines that may have other devices and packages: there each worker chooses.
    Whether ranks can share a model depends on no machine.
    """
    for name in spec.pools:
        worker = spec.worker_config(name)
        for stage in kind_of(name).stages:
            half: Half = "full" if stage == "prefill" else "decoder"
            engine: EngineChoice = "overfill" if isinstance(worker, ColocatedConfig) else worker.engine
            pair = load_whole(Path(worker.pair), [half])
            if isinstance(worker, DecodeConfig) and worker.quantize is not None:
                pair = pair.with_quantize(worker.quantize)
            check_ranks(pair, half, worker.tensor_parallel_size)
            if not spec.joins_cluster:
                on_first_gpu = partial(_on_first_gpu, worker.device)
                args, ranks = bool(worker.engine_args), worker.tensor_parallel_size
                choose_engine(engine, pair, half, on_first_gpu, has_args=args, ranks=ranks)
            elif engine != "auto":
                pair.check_engine(half, engine)


def check_engine_args(spec: StackSpec) -> None:
    """Raises InvalidRequest for arguments that a worker's engine does not have, before the worker would.

    On a joined cluster the workers check, because its machines may have other files, and another release of vLLM.
    """
    for name in () if spec.joins_cluster else spec.pools:
        worker = spec.worker_config(name)
        engine_args = json.loads(worker.engine_args or "{}")
        if worker.engine == "mock":
            MockOptions.of(engine_args)
        elif engine_args:
            check_vllm_args(engine_args, installed_arguments())


def _on_first_gpu(device: str) -> bool:
    from overfill.engine.device import resolve_device  # imports torch, which takes seconds

    return str(resolve_device(device)) in FIRST_GPU
