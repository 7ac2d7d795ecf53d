"""From a pair folder to a warm model with its KV cache: what every engine is made of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from overfill.engine.runner import ModelRunner, Work
from overfill.errors import InvalidRequest, OverfillError
from overfill.kv.blocks import BlockPool
from overfill.kv.cache import TORCH_DTYPES, KvCache
from overfill.kv.handshake import KvIdentity
from overfill.kv.spec import DTypeName, KvSpec
from overfill.model.config import ModelConfig
from overfill.model.transformer import Transformer
from overfill.pair.manifest import Pair
from overfill.rpc.constants import WIRE_VERSION
from overfill.v1 import common_pb2

log = logging.getLogger(__name__)

MIB = 2**20
_DEFAULT_CPU_KV_BYTES = 1024 * MIB
_CUDA_FRACTION = 0.9  # of device memory, for weights, activations and KV together
_CPU_WARM_TOKENS = 128  # a CPU takes what memory it needs; there the warm-up only touches weights and kernels

Half = Literal["full", "decoder"]


class NotEnoughMemory(OverfillError):
    """The KV cache does not fit the device, or the longest request does not fit the KV cache."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """A loaded half of a pair.

    Attributes:
        kv: geometry of the **full** model's KV in this stack's dtype; what travels.
        max_model_len: most tokens of prompt and answer together.
    """

    runner: ModelRunner
    pool: BlockPool
    config: ModelConfig
    kv: KvSpec
    pair: Pair
    max_model_len: int

    def model_identity(self, half: Half) -> common_pb2.ModelIdentity:
        return common_pb2.ModelIdentity(
            name=self.pair.name,
            full_digest=self.pair.full_digest,
            decoder_digest=self.pair.decoder_digest if half == "decoder" else "",
            tokenizer_digest=self.pair.tokenizer_digest,
        )

    def kv_identity(self) -> KvIdentity:
        return KvIdentity(WIRE_VERSION, self.pair.full_digest, self.pair.tokenizer_digest, self.kv)


def resolve_device(device: str) -> torch.device:
    """``auto`` means the first CUDA device if there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidRequest("device", f"{device} was asked for, but torch sees no CUDA device; use cpu or auto")
    return torch.device(device)


def build_engine_parts(
    pair: Pair,
    half: Half,
    *,
    dtype: DTypeName,
    device: torch.device,
    block_size: int,
    kv_memory: int | None,
    max_model_len: int | None,
    warm_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> EngineParts:
    """Loads one half, sizes its KV cache after a profiling step, and warms it up.

    Args:
        kv_memory: bytes for the KV cache; None takes what the device leaves (CUDA) or 1 GiB at most (CPU).
        max_model_len: None takes the model's context, or what the KV cache holds if that is less.
        warm_tokens: size of the largest step; its activations are measured.

    Raises:
        NotEnoughMemory: naming both numbers and what to change.
        InvalidPair: the checkpoint is damaged or not supported.
    """
    folder = pair.full_path if half == "full" else pair.decoder_path
    config = ModelConfig.load(folder)
    longest = config.max_positions if max_model_len is None else max_model_len
    if longest > config.max_positions:
        raise InvalidRequest("max_model_len", f"{longest} is more than the model's context of {config.max_positions}")
    model = Transformer.load(folder, TORCH_DTYPES[dtype], device, max_positions=longest, progress=progress)
    spec = config.kv_spec(dtype)
    available = _profile(model, spec, device, block_size, min(warm_tokens, longest))
    wanted = available if kv_memory is None else kv_memory
    if wanted > available:
        raise NotEnoughMemory(
            f"--kv-memory {wanted // MIB}MiB is more than what weights and activations leave: {available // MIB}MiB"
        )
    elif kv_memory is None and device.type == "cpu":
        wanted = min(wanted, _DEFAULT_CPU_KV_BYTES)  # the machine has other uses for its memory
    block_bytes = spec.token_bytes * block_size
    num_blocks = wanted // block_bytes
    capacity = num_blocks * block_size
    if max_model_len is None:
        longest = min(longest, capacity)
    if num_blocks < 1 or capacity < longest or longest < 2:
        least = -(-longest // block_size) * block_bytes // MIB + 1
        raise NotEnoughMemory(
            f"a KV cache of {wanted // MIB}MiB holds {capacity} tokens, fewer than --max-model-len {longest}; "
            f"give at least --kv-memory {least}MiB, or a smaller --max-model-len"
        )
    runner = ModelRunner(model, KvCache(spec, num_blocks, block_size, device))
    log.info("%s: %d KV blocks of %d tokens, %d MiB", half, num_blocks, block_size, num_blocks * block_bytes // MIB)
    full_spec = spec if half == "full" else ModelConfig.load(pair.full_path).kv_spec(dtype)
    return EngineParts(runner, BlockPool(num_blocks, block_size), config, full_spec, pair, longest)


def _profile(model: Transformer, spec: KvSpec, device: torch.device, block_size: int, tokens: int) -> int:
    """Runs the largest step and one decode step on a scratch cache; returns bytes that may go to KV."""
    if device.type == "cpu":
        tokens = min(tokens, _CPU_WARM_TOKENS)
    blocks = list(range(-(-(tokens + 1) // block_size)))
    scratch = ModelRunner(model, KvCache(spec, len(blocks), block_size, device))
    scratch.run([Work([0] * tokens, 0, blocks, wants_logits=True)])
    if tokens < model.max_positions:
        scratch.run([Work([0], tokens, blocks, wants_logits=True)])
    if device.type == "cpu":
        return psutil.virtual_memory().available
    torch.cuda.synchronize(device)
    total = torch.cuda.get_device_properties(device).total_memory
    peak = torch.cuda.max_memory_allocated(device)
    return max(0, int(total * _CUDA_FRACTION) - peak)
