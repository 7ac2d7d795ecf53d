"""Checks the arguments of vLLM itself (``--engine-args``). Does not import vLLM, which takes many seconds."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from overfill.errors import InvalidRequest
from overfill.settings.config_file import nearest

_SET_ELSEWHERE = {
    "model": "--pair",
    "dtype": "--dtype",
    "max_model_len": "--max-model-len",
    "block_size": "--block-size",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "kv_cache_memory_bytes": "--kv-memory",
    "enable_prefix_caching": "--prefix-cache",
    "kv_cache_dtype": "--kv-cache-dtype",
    "tensor_parallel_size": "--tensor-parallel-size",
    "enable_lora": "--adapters",
    "max_loras": "--max-adapters",
    "max_cpu_loras": "--max-adapters",
    "max_lora_rank": "--max-adapter-rank",
}
"""Arguments of vLLM that a setting of the worker sets."""
_SET_HERE = (
    "kv_transfer_config", "kv_events_config", "logits_processors", "async_scheduling", "skip_tokenizer_init",
    "distributed_executor_backend", "worker_cls", "lora_target_modules",
)  # fmt: skip
_UNSUPPORTED = {
    "nnodes": 1,
    "node_rank": 0,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "data_parallel_rank": None,
    "data_parallel_hybrid_lb": False,
    "data_parallel_external_lb": False,
    "decode_context_parallel_size": 1,
    "prefill_context_parallel_size": 1,
    "speculative_config": None,
    "enable_dbo": False,
    "enable_batch_sharded_sampling": False,
    "enable_elastic_ep": False,
    "kv_offloading_size": None,
}
"""Arguments that this version cannot serve, with the value that it can."""
_SOURCE = "arg_utils.py"  # in vLLM's package `engine`; declares EngineArgs


def check_vllm_args(engine_args: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises InvalidRequest, which names the argument, for one that vLLM does not know or that OverFill sets.

    Args:
        known: names of the arguments of vLLM; empty if they are not known here.
    """
    for name, value in engine_args.items():
        if known and name not in known:
            raise InvalidRequest(
                "engine_args",
                f"{name} is no argument of this vLLM's EngineArgs; {nearest(name, known, 'see the docs of vLLM')}",
            )
        if name in _SET_ELSEWHERE:
            raise InvalidRequest("engine_args", f"{name} is set by {_SET_ELSEWHERE[name]}")
        if name in _SET_HERE:
            raise InvalidRequest("engine_args", f"{name} is set by OverFill")
        if name in _UNSUPPORTED and value != _UNSUPPORTED[name]:
            raise InvalidRequest(
                "engine_args", f"{name} {value} is not supported in this version; leave it at {_UNSUPPORTED[name]}"
            )


def installed_arguments() -> set[str]:
    """Returns the names of the arguments of the installed vLLM, from its source; empty if they are not found."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None or not (file := Path(spec.origin).with_name("engine") / _SOURCE).is_file():
        return set()
    classes = (node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    fields = next((node.body for node in classes if node.name == "EngineArgs"), [])
    return {node.target.id for node in fields if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
