"""Loads a half of a pair into vLLM."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from overfill.engine.device import native_dtype, use_threads
from overfill.engine.gpu_memory import vllm_utilization
from overfill.engine.protocol import (
    DEFAULT_CPU_KV_BYTES,
    REPLAY_BUDGET,
    EngineCore,
    EngineOptions,
    LoadedEngine,
    ServedHalf,
)
from overfill.engine.vllm.adapters import VllmAdapters, lora_arguments
from overfill.engine.vllm.decode import VllmDecodeEngine
from overfill.engine.vllm.hashes import HashedPrompt
from overfill.engine.vllm.hooks import hub
from overfill.engine.vllm.internals import (
    CONNECTOR,
    EngineArgs,
    KVEventsConfig,
    KVTransferConfig,
    VllmConfig,
    VllmCore,
    current_platform,
    quieten,
)
from overfill.engine.vllm.prefill import VllmPrefillEngine
from overfill.engine.vllm.ranks.group import RankGroup, RemoteBlocks
from overfill.engine.vllm.refusals import Refusals, reason_of
from overfill.engine.vllm.sampler import OverfillSampler
from overfill.engine.vllm_args import check_vllm_args
from overfill.engine.vllm_release import installed, untested_warning
from overfill.errors import InvalidRequest
from overfill.kv.journal import KeyJournal
from overfill.kv.keys import root_key
from overfill.kv.spec import DTypeName
from overfill.kv.tensors import TORCH_DTYPES
from overfill.model.lora import slot_bytes
from overfill.model.manifest import Half, Pair
from overfill.model.processors import new_processor
from overfill.request.grammar import Grammars
from overfill.telemetry import logs
from overfill.telemetry.metrics import DecodeMetrics, EngineMetrics, PrefillMetrics

log = logging.getLogger(__name__)


def load_vllm(pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
    """Loads ``half`` into a vLLM engine in this process; there can be one at a time.

    Raises:
        InvalidRequest: an option does not fit vLLM or the model; ``field`` names it.
        NotEnoughMemory: vLLM cannot hold the weights or the KV cache.
        UnsupportedModel: vLLM refuses the checkpoint, or keeps KV in a way that cannot be handed over.
    """
    _check(options)
    # Here and not in the engine's thread, because vLLM loads and warms up in this one. Later it replaces the function.
    use_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    quieten()
    release = installed()
    if warning := untested_warning(release):
        log.warning(warning)
    config = pair.config(half)
    dtype = options.dtype or native_dtype(options.compute_device)
    spec = config.kv_spec(dtype)
    refusals = Refusals(pair.path(half), half, options, spec)
    arguments = _arguments(str(pair.path(half)), half, options, dtype, config.longest(options.max_model_len))
    lends = options.prefix_cache and (half == "full" or _returns_kv(pair, options))
    arguments["kv_events_config"] = KVEventsConfig(enable_kv_cache_events=lends, publisher="null")
    has_adapters = half == "decoder" and options.max_adapters > 0
    if has_adapters:
        arguments |= lora_arguments(config, options)
        refusals.check_adapters(slot_bytes(config, arguments["max_lora_rank"], TORCH_DTYPES[dtype]))
    extra = {"kv": spec, "by_layer": half == "full"}
    tokenizer = (pair.full_path / "tokenizer.json", config.vocab_size, pair.full_config.eos_token_ids)
    group = None
    if options.tensor_parallel_size > 1:
        group = RankGroup(options.tensor_parallel_size)
        arguments |= group.arguments
        extra |= {"ranks": group.links.config, "refusals": refusals, "grammars": tokenizer, "logs": logs.configured()}
    arguments["kv_transfer_config"] = KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path="overfill.engine.vllm.connector",
        kv_role="kv_producer" if half == "full" else "kv_consumer",
        kv_load_failure_policy="fail",
        kv_connector_extra_config=extra,
    )
    vllm_config = None
    try:
        vllm_config = _vllm_config(arguments, options.engine_args)
        refusals.check_cache(vllm_config)
        vllm = VllmCore(vllm_config)
        if group is not None:
            group.join(vllm, spec)
        adapters = VllmAdapters(vllm, config, options) if has_adapters else None
    except Exception as error:
        if group is not None and (told := group.failure()) is not None:
            raise told from error
        raise refusals.explain(error, vllm_config) from error
    log.info("%s on vLLM: %d KV blocks of %d tokens", half, vllm.num_blocks, vllm.block_size)
    journal = KeyJournal()
    served = ServedHalf(
        engine_version=str(release),
        half=half,
        pair=pair,
        config=config,
        kv=spec if half == "full" else pair.full_config.kv_spec(dtype),
        # vLLM wants room for the token that it samples after a prompt.
        max_model_len=vllm.max_model_len - (half == "full"),
        device=options.device,
        store=hub.store or RemoteBlocks(vllm.block_size),
        grammars=Grammars(*tokenizer, options.grammars),
        new_processor=new_processor if group is None else group.new_processor,
        blocks_of=partial(_blocks_of, pair.kv_identity(dtype).cache_key, vllm.block_size, options.prefix_cache),
        prefix_keys=journal if lends else None,
        ranks=None if group is None else group.ranks,
        adapters=adapters,
    )

    def new_core(emit: Callable[[list[Any]], None], metrics: EngineMetrics) -> EngineCore:
        if half == "full":
            assert isinstance(metrics, PrefillMetrics)
            return VllmPrefillEngine(
                vllm,
                options.compute_device,
                options.max_num_seqs,
                spec.num_layers,
                spec.token_layer_bytes,
                journal,
                emit,
                metrics,
            )
        assert isinstance(metrics, DecodeMetrics)
        return VllmDecodeEngine(vllm, options.max_num_seqs, emit, metrics, journal, adapters, lends)

    return LoadedEngine(served, new_core)


def _arguments(folder: str, half: Half, options: EngineOptions, dtype: DTypeName, longest: int) -> dict[str, Any]:
    """Returns vLLM's arguments for a half's checkpoint and sequences of up to ``longest`` tokens."""
    if half == "full":
        batched = max(options.max_num_batched_tokens, options.max_num_seqs)
        share = -(-batched // 2)  # so that a short prompt does not wait for a long one, as in OverFill's engine
    else:  # every sequence gets its token beside two replays
        batched, share = options.max_num_seqs + 2 * REPLAY_BUDGET, REPLAY_BUDGET
    kv_memory = options.kv_memory
    if kv_memory is None and options.compute_device.type == "cpu":
        kv_memory = DEFAULT_CPU_KV_BYTES
    arguments: dict[str, Any] = {
        "model": folder,
        "dtype": dtype,
        "max_model_len": options.max_model_len or -1,
        "block_size": options.block_size,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": batched,
        "long_prefill_token_threshold": min(share, longest),
        "kv_cache_memory_bytes": kv_memory,
        "enable_prefix_caching": options.prefix_cache,
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "async_scheduling": False,  # the sampler needs each token before the next step
        "logits_processors": [OverfillSampler],
    }
    if (utilization := vllm_utilization(options)) is not None:
        arguments["gpu_memory_utilization"] = utilization
    return arguments


def _returns_kv(pair: Pair, options: EngineOptions) -> bool:
    """Whether a decoder's KV of an answer is the reader's, and this process can lend it."""
    plain = not options.engine_args.keys() & {"quantization", "hf_overrides"}
    return plain and options.tensor_parallel_size == 1 and pair.returns_kv()


def _check(options: EngineOptions) -> None:
    if options.kv_cache_dtype != "auto":
        raise InvalidRequest(
            "kv_cache_dtype", f"{options.kv_cache_dtype} needs --engine overfill; vLLM stores KV as auto"
        )
    if options.compute_device.type == "cuda" and options.compute_device.index not in (None, 0):
        raise InvalidRequest(
            "device", f"{options.compute_device}: vLLM takes the first GPU; choose it with CUDA_VISIBLE_DEVICES"
        )
    kind = options.compute_device.type
    if (kind == "cpu") != current_platform.is_cpu():
        raise InvalidRequest(
            "device",
            f"{kind} does not fit the installed vLLM, which computes on {current_platform.device_type}",
        )
    check_vllm_args(options.engine_args, {field.name for field in dataclasses.fields(EngineArgs)})


def _vllm_config(arguments: Mapping[str, Any], engine_args: Mapping[str, Any]) -> VllmConfig:
    """Lets vLLM check its arguments, before it loads anything.

    Raises:
        InvalidRequest: vLLM refuses ``engine_args``, and accepts the rest without them.
        Exception: vLLM refuses the rest.
    """
    try:
        return EngineArgs(**{**arguments, **engine_args}).create_engine_config()
    except Exception as error:
        if engine_args and _accepts(arguments):
            raise InvalidRequest(
                "engine_args", f"vLLM refuses {json.dumps(engine_args)}: {reason_of(error)}"
            ) from error
        raise


def _accepts(arguments: Mapping[str, Any]) -> bool:
    try:
        EngineArgs(**arguments).create_engine_config()
    except Exception:
        return False
    return True


def _blocks_of(identity: str, block_size: int, enabled: bool, prompt: Any, cache_namespace: str) -> HashedPrompt:
    root = root_key(identity, cache_namespace) if enabled else None
    return HashedPrompt(prompt, block_size, root, cache_namespace)
