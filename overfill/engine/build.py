"""Builds what an engine needs: loads a half of a pair, warms it up and gives it a KV cache.

There are two steps, so that both halves can share one device. ``load_half`` loads and profiles a half; ``size_pools``
divides the memory that is left. ``MemoryRequirement`` and ``fit_blocks`` are plain arithmetic on numbers.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from overfill.engine.device import NotEnoughMemory, native_dtype
from overfill.engine.gpu_memory import free_share
from overfill.engine.protocol import DEFAULT_CPU_KV_BYTES, REPLAY_BUDGET, EngineOptions
from overfill.engine.runner import ModelRunner
from overfill.engine.stage import Stage, new_prefix_cache
from overfill.engine.work import Scoring, Work
from overfill.kv.blocks import BlockPool
from overfill.kv.cache import KvCache
from overfill.kv.spec import DEFAULT_BLOCK_SIZE, DTypeName
from overfill.kv.tensors import TORCH_DTYPES
from overfill.model.lora import LoraSlots, slot_bytes
from overfill.model.manifest import Half, Pair
from overfill.model.native.transformer import fastest_model
from overfill.model.processors import new_processor
from overfill.model.sampling import sample
from overfill.model.transformer import ForwardModel, Transformer
from overfill.process.limits import available_memory
from overfill.request.grammar import Grammars
from overfill.request.params import MAX_LOGPROBS, SamplingParams
from overfill.v1 import common_pb2
from overfill.version import __version__

log = logging.getLogger(__name__)

MIB = 2**20
MEMORY_FRACTION = 0.9  # share of the memory that is free after the weights are loaded; fragmentation takes the rest
_CPU_WARM_TOKENS = 128  # on a CPU the warm-up only touches weights and kernels; memory is not measured there
_INDEX_BYTES = 48  # per gathered token: positions, blocks and slots in int64, and their intermediate results
_MASK_BYTES = 5  # per pair of a new and a cached token: a bool, and the float32 that attention makes of it


@dataclass(frozen=True, slots=True)
class MemoryRequirement:
    """Memory that one half needs besides its weights, as a function of its number of KV blocks.

    Attributes:
        block_bytes: bytes of one KV block, over all layers.
        block_size: tokens per KV block.
        token_layer_bytes: bytes of one token's keys and values in one layer, as attention gathers them.
        longest: maximum number of tokens of one sequence.
        max_num_seqs: maximum number of sequences in one step.
        step_tokens: maximum number of new tokens in a step that has several per sequence.
        activations: measured bytes of a step that attends to no cached tokens.
    """

    block_bytes: int
    block_size: int
    token_layer_bytes: int
    longest: int
    max_num_seqs: int
    step_tokens: int
    activations: int = 0

    def step_bytes(self, num_blocks: int) -> int:
        """Maximum bytes of a step: activations, and one layer's keys and values as attention gathers them.

        A decode step pads every sequence to the longest one. Other steps gather one sequence at a time, with a mask.
        No sequence is longer than the cache, and each has at least one block.
        """
        context = min(self.longest, num_blocks * self.block_size)
        gathered = context * (self.token_layer_bytes + _INDEX_BYTES)
        decode = min(self.max_num_seqs, num_blocks) * gathered
        chunk = gathered + min(self.step_tokens, context) * context * _MASK_BYTES
        return self.activations + max(decode, chunk)


def memory_needed(requirements: Sequence[MemoryRequirement], blocks: Sequence[int]) -> tuple[int, int]:
    """Bytes of all caches, where half ``i`` has ``blocks[i]`` blocks, and of the largest single step.

    Halves in one process step in turn, so only the largest step counts.
    """
    caches = sum(d.block_bytes * n for d, n in zip(requirements, blocks, strict=True))
    return caches, max(d.step_bytes(n) for d, n in zip(requirements, blocks, strict=True))


def fit_blocks(requirements: Sequence[MemoryRequirement], available: int) -> int:
    """Maximum number of blocks, equal for every half, with which all halves fit into ``available`` bytes.

    Returns 0 when not even one block fits.
    """
    upper = max(0, available) // sum(d.block_bytes for d in requirements)

    def needed(num_blocks: int) -> int:
        return sum(memory_needed(requirements, [num_blocks] * len(requirements)))

    return max(0, bisect.bisect_right(range(upper + 1), available, key=needed) - 1)


@dataclass(frozen=True, slots=True)
class LoadedHalf:
    """A loaded and warmed-up model without a KV cache.

    Attributes:
        dtype: of weights, activations and KV.
        requirement: memory that this half needs besides its weights.
        adapters: the model's slots, whose memory is taken; None without any.
    """

    half: Half
    pair: Pair
    model: ForwardModel
    dtype: DTypeName
    requirement: MemoryRequirement
    options: EngineOptions
    adapters: LoraSlots | None = None


def load_half(pair: Pair, half: Half, options: EngineOptions) -> LoadedHalf:
    """Loads one half and runs its largest steps once; quantises a decoder as the pair says.

    Raises:
        InvalidRequest: ``max_model_len`` exceeds the model's context.
        NotEnoughMemory: weights, adapters' slots or activations do not fit the device.
        InvalidPair: the checkpoint is damaged.
        UnsupportedModel: the engine does not run this model.
    """
    pair.check_engine(half, "overfill")
    device, block_size = options.compute_device, options.block_size or DEFAULT_BLOCK_SIZE
    dtype = options.dtype or native_dtype(device)
    config, max_num_seqs = pair.config(half), options.max_num_seqs
    longest = config.longest(options.max_model_len)
    with _out_of_memory(f"the weights of the {half} model", device, "free some of it, or take another --device"):
        loaded = Transformer.load(
            pair.path(half), TORCH_DTYPES[dtype], device, longest, "none" if half == "full" else pair.quantize
        )
        model = fastest_model(loaded)
    adapters = _new_adapter_slots(model, options) if half == "decoder" and options.max_adapters else None
    # Only these steps have several tokens of a sequence: prompts of a full model, and replays of a decoder.
    largest = options.max_num_batched_tokens if half == "full" else max(max_num_seqs, REPLAY_BUDGET)
    step_tokens = min(largest, longest)
    advice = "free some of it, or give a smaller --max-num-batched-tokens or --max-num-seqs"
    with _out_of_memory(f"a step of {step_tokens} tokens", device, advice):
        warm = step_tokens if device.type == "cuda" else min(step_tokens, _CPU_WARM_TOKENS)
        scratch = KvCache(config.kv_spec(dtype), -(-warm // block_size), block_size, device, options.kv_cache_dtype)
        activations = _profile(model, scratch, step_tokens, max_num_seqs, options.max_adapters if adapters else 0)
    gathered = scratch.gathered_layer_bytes
    requirement = MemoryRequirement(
        scratch.block_bytes, block_size, gathered, longest, max_num_seqs, step_tokens, activations
    )
    return LoadedHalf(half, pair, model, dtype, requirement, options, adapters)


def _new_adapter_slots(model: ForwardModel, options: EngineOptions) -> LoraSlots:
    """Takes the memory of the decoder's adapters, before the KV cache gets what is left."""
    count, rank = options.max_adapters, options.max_adapter_rank
    needed, free = count * slot_bytes(model.config, rank, model.dtype), _free_memory(model.device)
    advice = "give a smaller --max-adapters or --max-adapter-rank"
    if needed > free:
        raise NotEnoughMemory(
            f"{count} adapters of rank {rank} need {_mib(needed)}, more than the {_mib(free)} that this process may "
            f"still use on {model.device}; {advice}"
        )
    with _out_of_memory(f"{_mib(needed)} for {count} adapters of rank {rank}", model.device, advice):
        slots = model.new_adapter_slots(count, rank)
    log.info("decoder: %d slots for adapters up to rank %d, %s each", count, rank, _mib(slots.slot_bytes))
    return slots


def size_pools(halves: Sequence[LoadedHalf], memory_fraction: float = MEMORY_FRACTION) -> list[Stage]:
    """Allocates the KV cache of every half in this process, all on one device.

    The halves must not step at the same time: memory is kept for the largest step only. Without ``kv_memory``, the free
    memory is divided so that all caches hold the same number of tokens (on a CPU at most 1 GiB each).

    Args:
        halves: with equal options of the device, its memory and the sequences' length.
        memory_fraction: share of the free memory that caches and steps may take without ``kv_memory``.

    Raises:
        NotEnoughMemory: the message names both sizes and what to change.
    """
    device, options = halves[0].model.device, halves[0].options
    kv_memory, gpu_share = options.kv_memory, options.gpu_share
    requirements = [h.requirement for h in halves]
    free = _free_memory(device)
    larger_share = ""
    if kv_memory is None and device.type == "cuda" and gpu_share < 1:
        free = free_share(device, gpu_share)
        larger_share = f", or a larger --gpu-share than {gpu_share:g}"
    if kv_memory is None:
        fitting = fit_blocks(requirements, int(free * memory_fraction))
        if device.type == "cpu":  # other programs need the machine's memory too
            fitting = min(fitting, DEFAULT_CPU_KV_BYTES // max(d.block_bytes for d in requirements))
        blocks = [fitting] * len(halves)
    else:
        blocks = [kv_memory // d.block_bytes for d in requirements]
    caches, step = memory_needed(requirements, blocks)
    if caches + step > free:
        raise NotEnoughMemory(
            f"{_mib(caches)} of KV cache and {_mib(step)} for the largest step exceed the {_mib(free)} that this "
            f"process may still use on {device}; give a smaller --kv-memory, --max-model-len or --max-num-seqs"
            f"{larger_share}"
        )
    grammars = _grammars(halves[0])
    return [
        _new_stage(half, num_blocks, step, larger_share, grammars)
        for half, num_blocks in zip(halves, blocks, strict=True)
    ]


def _new_stage(loaded: LoadedHalf, num_blocks: int, step: int, larger_share: str, grammars: Grammars) -> Stage:
    half, pair, model, options = loaded.half, loaded.pair, loaded.model, loaded.options
    longest = _longest(loaded.requirement, num_blocks, options.max_model_len, larger_share)
    spec, block_size = model.config.kv_spec(loaded.dtype), loaded.requirement.block_size
    size = _mib(num_blocks * loaded.requirement.block_bytes)
    with _out_of_memory(f"a KV cache of {size}", model.device, "give a smaller --kv-memory"):
        cache = KvCache(spec, num_blocks, block_size, model.device, options.kv_cache_dtype)
    log.info(
        "%s: %d KV blocks of %d tokens, %s; %s kept for the largest step",
        *(half, num_blocks, block_size, size, _mib(step)),
    )
    return Stage(
        half,
        pair,
        loaded.dtype,
        ModelRunner(model, cache),
        new_prefix_cache(pair, loaded.dtype, BlockPool(num_blocks, block_size), options.prefix_cache),
        options,
        longest,
        grammars,
        f"overfill {__version__}",
        new_processor,
        adapters=loaded.adapters,
        returns_kv=half == "decoder" and options.prefix_cache and pair.returns_kv(options.kv_cache_dtype),
    )


def _grammars(half: LoadedHalf) -> Grammars:
    # Both halves take the full model's, because a decoder's config may name other stop tokens.
    pair, vocab_size, limits = half.pair, half.model.config.vocab_size, half.options.grammars
    return Grammars(pair.full_path / "tokenizer.json", vocab_size, pair.full_config.eos_token_ids, limits)


def _longest(requirement: MemoryRequirement, num_blocks: int, max_model_len: int | None, larger_share: str) -> int:
    """Maximum number of tokens of a sequence in a cache of ``num_blocks``.

    Args:
        larger_share: end of the error's advice, if the process has only a share of its GPU.
    """
    capacity = num_blocks * requirement.block_size
    longest = min(requirement.longest, capacity) if max_model_len is None else max_model_len
    if capacity < max(longest, 2):
        needed = max(longest, 2)
        least = -(-needed // requirement.block_size) * requirement.block_bytes // MIB + 1
        raise NotEnoughMemory(
            f"a KV cache of {_mib(num_blocks * requirement.block_bytes)} holds {capacity} tokens, fewer than "
            f"--max-model-len {needed}; give at least --kv-memory {least}MiB, or a smaller --max-model-len"
            f"{larger_share}"
        )
    return longest


def _profile(model: ForwardModel, scratch: KvCache, tokens: int, max_num_seqs: int, num_adapters: int) -> int:
    """Runs the largest steps that ``scratch`` can hold and returns their bytes of activations.

    With adapters, each token has one, and the sequences have different ones. Only CUDA measures memory; elsewhere the
    result is 0.
    """
    device = model.device
    on_cuda = device.type == "cuda"
    tokens = min(tokens, scratch.num_blocks * scratch.block_size)
    if not on_cuda:
        max_num_seqs = 1
    runner, blocks = ModelRunner(model, scratch), list(range(scratch.num_blocks))
    before = torch.cuda.memory_allocated(device) if on_cuda else 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    targets = [0] * min(runner.max_scored if on_cuda else 1, tokens)
    scoring = Scoring(targets, MAX_LOGPROBS, common_pb2.PromptLogprobs())
    adapter = 0 if num_adapters else None
    runner.next_tokens([Work([0] * tokens, 0, blocks, wants_logits=False, scoring=scoring, adapter=adapter)], [])
    # All sequences write to one block, because the results are discarded.
    slots = [i % num_adapters if num_adapters else None for i in range(max_num_seqs)]
    logits = runner.run([Work([0], 0, blocks[:1], wants_logits=True, adapter=slot) for slot in slots])
    costly = SamplingParams(top_k=model.config.vocab_size, top_p=0.9, min_p=0.01, seed=0, logprobs=MAX_LOGPROBS)
    sample(torch.zeros_like(logits), [costly] * max_num_seqs, [1] * max_num_seqs, [0] * max_num_seqs)
    runner.synchronize()
    return torch.cuda.max_memory_allocated(device) - before if on_cuda else 0


def _free_memory(device: torch.device) -> int:
    """Bytes of ``device``'s memory that this process may still allocate."""
    if device.type == "cpu":
        return available_memory()
    torch.cuda.empty_cache()  # memory that torch's allocator kept after profiling would count as used
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
