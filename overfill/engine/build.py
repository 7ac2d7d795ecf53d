"""From a pair folder to a warm model with its KV cache: what every engine is made of.

Two steps, so that both halves can share one device: ``load_half`` loads and profiles, ``size_pools`` divides what is
left. ``fit_blocks`` and ``CacheDemand`` are the arithmetic; they see numbers only.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from overfill.engine.runner import ModelRunner, Work
from overfill.errors import InvalidRequest, OverfillError
from overfill.kv.blocks import BlockPool
from overfill.kv.cache import KvCache
from overfill.kv.handshake import KvIdentity
from overfill.kv.prefix import PrefixCache
from overfill.kv.spec import DTypeName, KvCacheDtype, KvSpec
from overfill.kv.tensors import TORCH_DTYPES
from overfill.model.config import ModelConfig
from overfill.model.graphs import GATHERED_BYTES, CudaRecorder, GraphedTransformer
from overfill.model.manifest import Pair
from overfill.model.native.transformer import fastest
from overfill.model.sampling import sample
from overfill.model.transformer import Model, Transformer
from overfill.request.grammar import Grammars
from overfill.request.params import MAX_LOGPROBS, SamplingParams
from overfill.rpc.constants import WIRE_VERSION
from overfill.v1 import common_pb2

log = logging.getLogger(__name__)

MIB = 2**20
MEMORY_FRACTION = 0.9  # of the memory that is free once weights are loaded; the rest is for fragments
_DEFAULT_CPU_KV_BYTES = 1024 * MIB
_CPU_WARM_TOKENS = 128  # a CPU takes what memory it needs; there the warm-up only touches weights and kernels
_INDEX_BYTES = 48  # per gathered token: positions, blocks and slots, each int64 and with intermediate results
_MASK_BYTES = 5  # per new and cached token: a bool, and the float32 that attention makes of it

Half = Literal["full", "decoder"]


class NotEnoughMemory(OverfillError):
    """Weights, steps and KV cache do not fit the device, or the longest request does not fit the KV cache."""


@dataclass(frozen=True, slots=True)
class CacheDemand:
    """What one half takes of memory besides its weights, as a function of its number of KV blocks.

    Attributes:
        block_bytes: of one KV block, all layers.
        token_layer_bytes: of one token's keys and values in one layer, as attention gathers them.
        longest: most tokens of one sequence.
        step_tokens: most new tokens in a step of several per sequence.
        activations: bytes that a measured step took without attending to cached tokens.
    """

    block_bytes: int
    block_size: int
    token_layer_bytes: int
    longest: int
    max_num_seqs: int
    step_tokens: int
    activations: int = 0

    def step_bytes(self, num_blocks: int) -> int:
        """Most that a step takes: activations, and one layer's keys and values as attention gathers them.

        A decode step pads every sequence to the longest; other steps gather one sequence at a time, with a mask.
        No sequence is longer than the cache, and each has a block at least.
        """
        context = min(self.longest, num_blocks * self.block_size)
        gathered = context * (self.token_layer_bytes + _INDEX_BYTES)
        decode = min(self.max_num_seqs, num_blocks) * gathered
        chunk = gathered + min(self.step_tokens, context) * context * _MASK_BYTES
        return self.activations + max(decode, chunk)


def memory_needed(demands: Sequence[CacheDemand], blocks: Sequence[int]) -> tuple[int, int]:
    """Bytes of all caches with so many blocks each, and of the largest step; halves of one process step in turn."""
    caches = sum(d.block_bytes * n for d, n in zip(demands, blocks, strict=True))
    return caches, max(d.step_bytes(n) for d, n in zip(demands, blocks, strict=True))


def fit_blocks(demands: Sequence[CacheDemand], available: int) -> int:
    """Most blocks that every half's cache may have, the same number each, within ``available`` bytes; 0 if none."""
    most = max(0, available) // sum(d.block_bytes for d in demands)

    def needed(num_blocks: int) -> int:
        return sum(memory_needed(demands, [num_blocks] * len(demands)))

    return max(0, bisect.bisect_right(range(most + 1), available, key=needed) - 1)


@dataclass(frozen=True, slots=True)
class EngineParts:
    """A loaded half of a pair.

    Attributes:
        kv: geometry of the **full** model's KV in this stack's dtype; what travels.
        kv_cache_dtype: how this half holds it.
        max_model_len: most tokens of prompt and answer together.
        grammars: compiles what answers must look like.
    """

    runner: ModelRunner
    pool: BlockPool
    config: ModelConfig
    kv: KvSpec
    pair: Pair
    max_model_len: int
    grammars: Grammars
    kv_cache_dtype: KvCacheDtype = "auto"

    def model_identity(self, half: Half) -> common_pb2.ModelIdentity:
        return common_pb2.ModelIdentity(
            name=self.pair.name,
            full_digest=self.pair.full_digest,
            decoder_digest=self.pair.decoder_digest if half == "decoder" else "",
            tokenizer_digest=self.pair.tokenizer_digest,
            decoder_quantize=self.pair.quantize if half == "decoder" and self.pair.quantize != "none" else "",
            kv_cache_dtype=self.kv_cache_dtype if self.kv_cache_dtype != "auto" else "",
        )

    def prefix_cache(self, enabled: bool) -> PrefixCache:
        """A prefix cache on ``pool``, told what computing KV again costs in this model."""
        return PrefixCache(
            self.pool,
            (self.pair.full_digest, self.kv.dtype),
            enabled=enabled,
            attention_tokens=self.pair.full_config.attention_tokens,
        )

    def kv_identity(self) -> KvIdentity:
        return KvIdentity(WIRE_VERSION, self.pair.full_digest, self.pair.tokenizer_digest, self.kv)


def resolve_device(device: str) -> torch.device:
    """``auto`` means the first CUDA device if there is one, else the CPU. A CUDA device has its number."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidRequest("device", f"{device} was asked for, but torch sees no CUDA device; use cpu or auto")
    return torch.device("cuda:0" if device == "cuda" else device)


def native_dtype(device: torch.device) -> DTypeName:
    """bfloat16 where the device computes in it; on other CPUs, where it is several times slower, float32."""
    if device.type != "cpu":
        return "bfloat16"
    # Older torch releases cannot tell; there float32 is the safe answer.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if capabilities.get("avx512_bf16") else "float32"


@dataclass(frozen=True, slots=True)
class LoadedHalf:
    """A warm model that has no KV cache yet."""

    half: Half
    pair: Pair
    model: Model
    spec: KvSpec
    full_spec: KvSpec
    demand: CacheDemand
    kv_cache_dtype: KvCacheDtype


def build_engine_parts(
    pair: Pair,
    half: Half,
    *,
    dtype: DTypeName | None,
    device: torch.device,
    block_size: int,
    kv_memory: int | None,
    max_model_len: int | None,
    warm_tokens: int,
    max_num_seqs: int = 64,
    kv_cache_dtype: KvCacheDtype = "auto",
    memory_fraction: float = MEMORY_FRACTION,
    cuda_graphs: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> EngineParts:
    """One half alone: ``load_half``, then ``size_pools``; arguments and errors are theirs.

    Without ``kv_memory`` the cache takes nearly all that is free on a CUDA device. Several workers on one device need
    ``kv_memory`` each, so that the first leaves room for the others.
    """
    loaded = load_half(
        pair,
        half,
        dtype=dtype,
        device=device,
        block_size=block_size,
        max_model_len=max_model_len,
        warm_tokens=warm_tokens,
        max_num_seqs=max_num_seqs,
        kv_cache_dtype=kv_cache_dtype,
        progress=progress,
    )
    return size_pools([loaded], kv_memory, max_model_len, memory_fraction, cuda_graphs)[0]


def load_half(
    pair: Pair,
    half: Half,
    *,
    dtype: DTypeName | None,
    device: torch.device,
    block_size: int,
    max_model_len: int | None,
    warm_tokens: int,
    max_num_seqs: int,
    kv_cache_dtype: KvCacheDtype = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> LoadedHalf:
    """Loads one half and runs its largest steps once; a decoder is quantised as the pair says.

    Args:
        dtype: None takes ``native_dtype``.
        max_model_len: None takes the model's context.
        warm_tokens: most tokens in one step of several per sequence.
        max_num_seqs: most sequences in one step.
        kv_cache_dtype: how the half is to hold KV.

    Raises:
        InvalidRequest: ``max_model_len`` is more than the model's context.
        NotEnoughMemory: weights or activations do not fit the device.
        InvalidPair: the checkpoint is damaged or not supported.
    """
    dtype = dtype or native_dtype(device)
    folder = pair.full_path if half == "full" else pair.decoder_path
    config = ModelConfig.load(folder)
    longest = config.max_positions if max_model_len is None else max_model_len
    if longest > config.max_positions:
        raise InvalidRequest("max_model_len", f"{longest} is more than the model's context of {config.max_positions}")
    with _out_of_memory(f"the weights of the {half} model", device, "free some of it, or take another --device"):
        loaded = Transformer.load(
            folder,
            TORCH_DTYPES[dtype],
            device,
            max_positions=longest,
            progress=progress,
            quantize="none" if half == "full" else pair.quantize,
        )
        model = fastest(loaded)
    spec = config.kv_spec(dtype)
    step_tokens = min(warm_tokens, longest)
    advice = "free some of it, or give a smaller --token-budget or --max-num-seqs"
    with _out_of_memory(f"a step of {step_tokens} tokens", device, advice):
        warm = step_tokens if device.type == "cuda" else min(step_tokens, _CPU_WARM_TOKENS)
        scratch = KvCache(spec, -(-warm // block_size), block_size, device, kv_cache_dtype)
        activations = _profile(model, scratch, step_tokens, max_num_seqs)
    gathered = scratch.gathered_layer_bytes
    demand = CacheDemand(scratch.block_bytes, block_size, gathered, longest, max_num_seqs, step_tokens, activations)
    full_spec = spec if half == "full" else ModelConfig.load(pair.full_path).kv_spec(dtype)
    return LoadedHalf(half, pair, model, spec, full_spec, demand, kv_cache_dtype)


def size_pools(
    halves: Sequence[LoadedHalf],
    kv_memory: int | None,
    max_model_len: int | None,
    memory_fraction: float = MEMORY_FRACTION,
    cuda_graphs: bool = False,
) -> list[EngineParts]:
    """Gives every half of one process and device its KV cache; the halves must not step at the same time.

    Args:
        kv_memory: bytes for each cache; None divides what the device leaves, so that all hold the same number of
            tokens (on a CPU at most 1 GiB each).
        max_model_len: None cuts the longest sequence to what a cache holds.
        memory_fraction: share of the free memory that caches and steps may take when ``kv_memory`` is None.
        cuda_graphs: record decode steps and replay them, on a CUDA device; it takes up to a step's memory more.

    Raises:
        NotEnoughMemory: naming both numbers and what to change.
    """
    device = halves[0].model.device
    demands = [h.demand for h in halves]
    cuda_graphs = cuda_graphs and device.type == "cuda"
    recorded = sum(GATHERED_BYTES + d.activations for d in demands) if cuda_graphs else 0
    free = _free_memory(device) - recorded
    if kv_memory is None:
        fitting = fit_blocks(demands, int(free * memory_fraction))
        if device.type == "cpu":  # the machine has other uses for its memory
            fitting = min(fitting, _DEFAULT_CPU_KV_BYTES // max(d.block_bytes for d in demands))
        blocks = [fitting] * len(halves)
    else:
        blocks = [kv_memory // d.block_bytes for d in demands]
    caches, step = memory_needed(demands, blocks)
    if caches + step > free:
        raise NotEnoughMemory(
            f"{_mib(caches)} of KV cache and {_mib(step)} for the largest step are more than the {_mib(free)} that are "
            f"free on {device}; give a smaller --kv-memory, --max-model-len or --max-num-seqs"
        )
    advice = "give a smaller --kv-memory"
    parts = []
    for half, num_blocks in zip(halves, blocks, strict=True):
        longest = _longest(half.demand, num_blocks, max_model_len)
        with _out_of_memory(f"a KV cache of {_mib(num_blocks * half.demand.block_bytes)}", device, advice):
            cache = KvCache(half.spec, num_blocks, half.demand.block_size, device, half.kv_cache_dtype)
        log.info(
            "%s: %d KV blocks of %d tokens, %s; %s kept for the largest step",
            *(half.half, num_blocks, cache.block_size, _mib(num_blocks * cache.block_bytes), _mib(step)),
        )
        model = half.model
        if cuda_graphs and isinstance(model, Transformer):
            model = GraphedTransformer(model, cache, CudaRecorder(device))
        runner, pool = ModelRunner(model, cache), BlockPool(num_blocks, cache.block_size)
        grammars = _grammars(half)
        parts.append(
            EngineParts(
                runner, pool, half.model.config, half.full_spec, half.pair, longest, grammars, half.kv_cache_dtype
            )
        )
    return parts


def _grammars(half: LoadedHalf) -> Grammars:
    config = half.model.config
    return Grammars(half.pair.full_path / "tokenizer.json", config.vocab_size, config.eos_token_ids)


def _longest(demand: CacheDemand, num_blocks: int, max_model_len: int | None) -> int:
    """Tokens of the longest sequence that a cache of ``num_blocks`` serves."""
    capacity = num_blocks * demand.block_size
    longest = min(demand.longest, capacity) if max_model_len is None else max_model_len
    if capacity < max(longest, 2):
        wanted = max(longest, 2)
        least = -(-wanted // demand.block_size) * demand.block_bytes // MIB + 1
        raise NotEnoughMemory(
            f"a KV cache of {_mib(num_blocks * demand.block_bytes)} holds {capacity} tokens, fewer than "
            f"--max-model-len {wanted}; give at least --kv-memory {least}MiB, or a smaller --max-model-len"
        )
    return longest


def _profile(model: Model, scratch: KvCache, tokens: int, max_num_seqs: int) -> int:
    """Runs the largest steps on ``scratch``, as far as it holds them; bytes of activations, measured on CUDA only."""
    device = model.device
    on_cuda = device.type == "cuda"
    tokens = min(tokens, scratch.num_blocks * scratch.block_size)
    if not on_cuda:
        max_num_seqs = 1
    runner, blocks = ModelRunner(model, scratch), list(range(scratch.num_blocks))
    before = torch.cuda.memory_allocated(device) if on_cuda else 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    runner.run([Work([0] * tokens, 0, blocks, wants_logits=True)])
    # All write to one block: what they compute does not matter.
    logits = runner.run([Work([0], 0, blocks[:1], wants_logits=True)] * max_num_seqs)
    costly = SamplingParams(top_k=model.config.vocab_size, top_p=0.9, min_p=0.01, seed=0, logprobs=MAX_LOGPROBS)
    sample(torch.zeros_like(logits), [costly] * max_num_seqs, [1] * max_num_seqs, [0] * max_num_seqs)
    runner.synchronize()
    return torch.cuda.max_memory_allocated(device) - before if on_cuda else 0


def _free_memory(device: torch.device) -> int:
    """Bytes that nobody uses, other processes included."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()  # what profiling left to torch's allocator counts as used otherwise
    return torch.cuda.mem_get_info(device)[0]


@contextmanager
def _out_of_memory(what: str, device: torch.device, advice: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise NotEnoughMemory(
            f"{what} did not fit {device}, which has {_mib(free)} of {_mib(total)} free; {advice}"
        ) from error


def _mib(size: int) -> str:
    return f"{size // MIB}MiB"
