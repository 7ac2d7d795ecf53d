"""Adapters on vLLM: slots, and the private folders through which vLLM reads their weights.

vLLM loads an adapter from a folder in PEFT's format, in each rank. It never reads a user's folder, which may change or
vanish meanwhile: ``AdapterSlots.stage`` writes the weights that were checked to a folder that only this user can enter.
It is removed when vLLM has read it; what a killed process leaves, the next one removes.

- **No queue.** vLLM lets a request wait while others use ``max_loras`` adapters. So that is the number of slots.
- **Rows without an adapter.** On CPUs, vLLM adds the last adapter's product to those rows of a mixed batch that have no
  adapter. So there ``max_loras`` is one more, and the last adapter stays zero.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import save_file  # noqa: TID251 - only vLLM, in this user's processes, reads the files
from vllm.config.lora import MaxLoRARanks

from overfill.engine.choice import why_no_adapters
from overfill.engine.protocol import EngineOptions
from overfill.engine.vllm.internals import LoRARequest, VllmCore
from overfill.errors import InternalError, InvalidRequest
from overfill.model.adapter import PEFT_CONFIG, WEIGHTS, LoraAdapter, Projection, peft_content
from overfill.model.config import ModelConfig
from overfill.model.lora import check_fits
from overfill.process.held_folder import temporary_folder

_RANKS: tuple[int, ...] = get_args(MaxLoRARanks)
"""Ranks that vLLM has buffers for."""


def lora_arguments(config: ModelConfig, options: EngineOptions) -> dict[str, Any]:
    """vLLM's arguments for ``options.max_adapters`` slots of the decoder with ``config``.

    Raises:
        InvalidRequest: vLLM has no adapters of ``options.max_adapter_rank``, or none for the format of the weights.
    """
    if reason := why_no_adapters(config, lambda: options.compute_device.type == "cpu"):
        raise InvalidRequest("adapters", f"{reason}: leave it out, or choose a decoder with plain weights")
    rank = next((rank for rank in _RANKS if rank >= options.max_adapter_rank), None)
    if rank is None:
        raise InvalidRequest(
            "max_adapter_rank", f"{options.max_adapter_rank} is more than {_RANKS[-1]}, vLLM's maximum"
        )
    max_loras = options.max_adapters + _num_spare(options)
    return {
        "enable_lora": True,
        "max_loras": max_loras,
        "max_cpu_loras": max_loras,
        "max_lora_rank": rank,
        "lora_target_modules": list(get_args(Projection)),  # vLLM would also take embeddings and the output layer
    }


def _num_spare(options: EngineOptions) -> int:
    return int(options.compute_device.type == "cpu")


class VllmAdapters:
    """The slots of a loaded decoder; an ``AdapterSlots``."""

    def __init__(self, vllm: VllmCore, config: ModelConfig, options: EngineOptions) -> None:
        self._config = config
        self.num_slots = options.max_adapters
        self.max_rank = options.max_adapter_rank
        # vLLM also keeps each adapter in host memory, on CPUs beside its buffers.
        buffers, spare = vllm.adapter_buffers(), _num_spare(options)
        self.slot_bytes = buffers // self.num_slots + spare * buffers // (self.num_slots + spare)
        self._vllm = vllm
        self._exits = ExitStack()
        self._folder = self._exits.enter_context(temporary_folder("adapters"))
        self._requests: dict[int, LoRARequest] = {}  # of the slots that have an adapter

    def stage(self, slot: int, adapter: LoraAdapter) -> None:
        """As ``AdapterSlots.stage``."""
        check_fits(adapter, self._config, self.max_rank)
        tensors, config = peft_content(adapter.products)
        folder = self._path(slot)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            save_file(tensors, folder / WEIGHTS)
            (folder / PEFT_CONFIG).write_text(config)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def change(self, slot: int, adapter: LoraAdapter | None) -> None:
        """Loads what was staged into a slot, or empties the slot. Called on the engine's thread.

        Raises:
            InternalError: vLLM does not take the adapter; the slot is empty.
        """
        if self._requests.pop(slot, None) is not None:
            self._vllm.remove_adapter(slot + 1)
        if adapter is None:
            return
        # vLLM tells adapters apart by the number, and requests' adapters by the name.
        request = LoRARequest(f"{slot}-{adapter.record.digest}", slot + 1, str(self._path(slot)))
        try:
            refusal = self._vllm.add_adapter(request)
        finally:
            shutil.rmtree(self._path(slot), ignore_errors=True)
        if refusal:
            raise InternalError(f"vLLM does not take the adapter {adapter.record.name}: {refusal}")
        self._requests[slot] = request

    def request(self, slot: int) -> LoRARequest | None:
        """Returns what a request for the slot's adapter carries; None for an empty slot."""
        return self._requests.get(slot)

    def close(self) -> None:
        """Removes what was staged."""
        self._exits.close()

    def _path(self, slot: int) -> Path:
        return self._folder / str(slot)
