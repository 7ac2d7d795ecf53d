"""How many workers of each kind ``overfill up`` starts, and why, if the user has not said it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from overfill.engine.choice import FIRST_GPU, vllm_installed
from overfill.model.manifest import Half, Pair
from overfill.process.gpus import gpu_count
from overfill.settings.config import ColocatedConfig, DecodeConfig, PrefillConfig, read_checked
from overfill.settings.reader import BadSettings

_GUIDE = "docs/how-to/latency-or-throughput.md"

_OF_STAGES = ("engine", "tensor_parallel_size")
"""Settings for which ``up`` has an option for each stage too."""


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """Numbers of workers.

    Attributes:
        colocated: workers with both stages.
        prefill, decode: workers with one stage. Tiers have their own numbers of decode workers.
        why: what ``up`` says about a choice of its own; empty if the user chose.
    """

    colocated: int
    prefill: int
    decode: int
    why: str = ""


def count_workers(
    colocated: int | None,
    prefill: int | None,
    decode: int | None,
    tiers: bool,
    options: Mapping[str, Any],
    pair: Path | None = None,
) -> WorkerCounts:
    """Returns how many workers to start; None means that the user has not given a number.

    Without any number, one machine with at most one GPU gets one worker with both stages, because two processes would
    share its cores or its GPU. Options and settings that are for one stage keep the stages apart, and so does vLLM, if
    it can run the pair.

    Args:
        tiers: the user names tiers.
        options: the other options of ``overfill up`` by parameter; None for those that are not given.
        pair: the pair's folder; None while the pair is not prepared, and vLLM then counts as able to run it.

    Raises:
        InvalidPair: the folder holds no pair.
        BadSettings: a stage would have no worker, or an option conflicts with --colocated.
    """
    if colocated:
        _check_colocated(options)
        _check_stages(prefill or 0, decode or 0, tiers, options)
        return WorkerCounts(colocated, prefill or 0, decode or 0)
    if 0 in (prefill, decode):
        stage = "prefill" if prefill == 0 else "decode"
        raise BadSettings(
            f"--{stage} 0 leaves no worker that can {stage}: give at least 1, or --colocated for workers with both "
            "stages"
        )
    if tiers or any(number is not None for number in (colocated, prefill, decode)):
        return WorkerCounts(0, prefill or 1, decode or 1)
    unable = _half_only_for_overfill(options, pair)
    if apart := next(_reasons_for_two(options, vllm=not unable), ""):
        return WorkerCounts(
            0, 1, 1, f"one prefill and one decode worker, because {apart} ({_GUIDE}); for both stages in one worker, "
            "give --colocated"
        )  # fmt: skip
    which = "which is fastest on one machine"
    if unable:
        which = f"on OverFill's own engine, because vLLM cannot run the pair's {unable}"
    return WorkerCounts(
        1, 0, 0, f"one worker with both stages, {which} ({_GUIDE}); for a worker per stage, give --prefill 1 --decode 1"
    )


def _check_colocated(options: Mapping[str, Any]) -> None:
    for name in ("max_prefill", "max_decode"):
        if options.get(name) is not None:
            raise BadSettings(
                f"--colocated conflicts with {_flag(name)}: a stack of workers with both stages has a fixed number of "
                "workers; remove one of them, or give --prefill and --decode in place of --colocated"
            )


def _check_stages(prefill: int, decode: int, tiers: bool, options: Mapping[str, Any]) -> None:
    for (stage, workers), setting in product((("prefill", prefill), ("decode", decode or tiers)), _OF_STAGES):
        name = f"{stage}_{setting}"
        if options.get(name) is not None and not workers:
            raise BadSettings(
                f"{_flag(name)} is for {stage} workers, and the stack has none: workers with both stages run on "
                f"OverFill's own engine; remove {_flag(name)}, or add --{stage} 1"
            )


def _reasons_for_two(options: Mapping[str, Any], *, vllm: bool) -> Iterator[str]:
    """Yields why each stage should have a worker of its own, after "because". ``vllm``: auto may choose vLLM."""
    if options.get("engine") == "mock":
        yield "--engine mock is given"
    of_stages = [f"{stage}_{setting}" for setting in _OF_STAGES for stage in ("prefill", "decode")]
    for name in ("ray_address", "max_prefill", "max_decode", *of_stages, "engine_args"):
        if options.get(name) is not None:
            yield f"{_flag(name)} is given"
    path: Path | None = options.get("config")
    file = None if path is None else read_checked(path)
    for kind in (PrefillConfig, DecodeConfig):
        for key in () if file is None else file.sections.get(kind.section, {}):
            yield f"{path} sets {kind.section}.{key}"
        for variable in kind.variables():
            if os.environ.get(variable):
                yield f"{variable} is set"

    if (size := _setting(options, "tensor_parallel_size")) not in ("auto", "1"):
        yield f"--tensor-parallel-size is {size}"
    if _setting(options, "engine") == "vllm" or (vllm and _auto_takes_vllm(options)):
        yield "vLLM runs each stage in a process of its own"
    if (gpus := _gpus(options)) > 1:
        yield f"this machine has {gpus} GPUs"


def _half_only_for_overfill(options: Mapping[str, Any], folder: Path | None) -> str:
    """Returns the half of the pair that keeps the engine auto from vLLM; empty if none does.

    If OverFill's own engine cannot run both halves, vLLM has to run the other one.
    """
    if folder is None or not _auto_takes_vllm(options):
        return ""
    pair = Pair.load(folder)
    if (quantize := _setting(options, "quantize")) != "auto":
        pair = pair.with_quantize("int8" if quantize == "int8" else "none")
    halves: dict[Half, str] = {"full": "full model", "decoder": "decoder"}
    if not all("overfill" in pair.engines(half) for half in halves):
        return ""
    return next((name for half, name in halves.items() if "vllm" not in pair.engines(half)), "")


def _auto_takes_vllm(options: Mapping[str, Any]) -> bool:
    """True if the engine is auto, which is vLLM here for a half that vLLM can run."""
    on_first_gpu = _setting(options, "device") in ("auto", *FIRST_GPU) and _gpus(options) > 0
    return _setting(options, "engine") == "auto" and on_first_gpu and vllm_installed()


def _setting(options: Mapping[str, Any], name: str) -> str:
    """Returns a setting that a worker with both stages would have; "auto" if nothing sets it."""
    path: Path | None = options.get("config")
    found = options.get(name) or os.environ.get(ColocatedConfig.variable(name))
    file = None if found or path is None else read_checked(path)
    return str(found or ({} if file is None else ColocatedConfig.file_values(file)).get(name, ("", "auto"))[1])


def _gpus(options: Mapping[str, Any]) -> int:
    device = _setting(options, "device")
    return gpu_count() if device in ("auto", "cuda") else 0 if device == "cpu" else 1


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
