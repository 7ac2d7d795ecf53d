"""Says why vLLM does not load a model, by facts: memory, types of errors, what its backends support.

vLLM's errors about these have no type of their own, and its words change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from vllm.v1.worker.utils import select_common_block_size

from overfill.engine.device import NotEnoughMemory
from overfill.engine.protocol import EngineOptions
from overfill.errors import InvalidRequest, OverfillError, UnsupportedModel
from overfill.kv.spec import KvSpec
from overfill.model.manifest import Half
from overfill.process.limits import available_memory


class Refusals:
    """Explains what goes wrong while vLLM loads ``half`` from ``folder``; made before it begins.

    Args:
        spec: geometry of the half's KV.
    """

    def __init__(self, folder: Path, half: Half, options: EngineOptions, spec: KvSpec) -> None:
        self._half = half
        self._folder = folder
        self._block_size = options.block_size
        self._engine_args = options.engine_args
        self._ranks = options.tensor_parallel_size
        self._token_bytes = spec.token_bytes // min(self._ranks, spec.num_kv_heads)
        self._max_adapters, self._max_adapter_rank = options.max_adapters, options.max_adapter_rank
        self._longest = options.max_model_len or 1
        self.look_at_memory(options.compute_device)

    def look_at_memory(self, device: torch.device) -> None:
        """Notes how much memory is free before the loading, in this process or in a rank."""
        self._device = device
        self._free, self._total = _memory(device)

    def check_cache(self, config: Any) -> None:
        """Raises NotEnoughMemory if the KV cache that ``config`` asks for cannot hold the longest sequence."""
        kv_memory, block = config.cache_config.kv_cache_memory_bytes, config.cache_config.block_size
        needed = -(-self._longest // block) * block * self._token_bytes
        if kv_memory is not None and kv_memory < needed:
            each = " in each rank" if self._ranks > 1 else ""
            raise NotEnoughMemory(
                f"the KV of {self._longest} tokens of the {self._half} model takes {needed} bytes{each}, in blocks of "
                f"{block} tokens; the KV cache has {kv_memory}; give another --kv-memory or --max-model-len"
            )

    def check_adapters(self, slot_bytes: int) -> None:
        """Raises NotEnoughMemory if the adapters' slots, of ``slot_bytes`` each, do not fit beside each other."""
        needed = self._max_adapters * slot_bytes // self._ranks
        if needed > self._free:
            raise NotEnoughMemory(
                f"{self._max_adapters} adapters of rank {self._max_adapter_rank} need {needed >> 20} MiB, more than "
                f"the {self._free >> 20} MiB that are free; give a smaller --max-adapters or --max-adapter-rank"
            )

    def explain(self, error: Exception, config: Any = None) -> OverfillError:
        """vLLM's refusal with a sentence of ours before it.

        Args:
            config: vLLM's settings, once vLLM has accepted them.
        """
        if isinstance(error, OverfillError):
            return error
        reason = reason_of(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or (config and self._free < self._needed(config)):
            free, _ = _memory(self._device)
            return NotEnoughMemory(
                f"vLLM has too little memory for the {self._half} model: {reason}; {self._free >> 20} MiB were free "
                f"before, {free >> 20} MiB are now; give another --kv-memory"
            )
        if config and self._block_size is not None and not _block_size_fits(config):
            return InvalidRequest(
                "block_size", f"{self._block_size} does not fit vLLM and the {self._half} model: {reason}"
            )
        with_args = f" (with --engine-args {json.dumps(self._engine_args)})" if self._engine_args else ""
        return UnsupportedModel(f"vLLM cannot load the {self._half} model in {self._folder}: {reason}{with_args}")

    def _needed(self, config: Any) -> int:
        """Bytes that the weights and the KV cache take in this process."""
        weights = sum(file.stat().st_size for file in self._folder.glob("*.safetensors")) // self._ranks
        kv = config.cache_config.kv_cache_memory_bytes or self._longest * self._token_bytes
        if self._device.type == "cpu":
            return int(weights + kv)
        return max(weights + kv, int(config.cache_config.gpu_memory_utilization * self._total))


def reason_of(error: Exception) -> str:
    """vLLM's words on one line. Of an error of its settings, without the list of all settings."""
    if isinstance(error, ValidationError):
        return "; ".join(
            ": ".join([*map(str, one["loc"]), one["msg"].removeprefix("Value error, ")]) for one in error.errors()
        )
    return " ".join(str(error).split()) or type(error).__name__


def _memory(device: torch.device) -> tuple[int, int]:
    """Free bytes, and all bytes of a GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return available_memory(), 0


def _block_size_fits(config: Any) -> bool:
    """Whether the attention backends of the layers that vLLM has made have the block size."""
    layers = config.compilation_config.static_forward_context.values()
    try:
        select_common_block_size(config.cache_config.block_size, [layer.get_attn_backend() for layer in layers])
    except ValueError:
        return False
    return True
