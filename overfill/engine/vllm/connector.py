"""vLLM's KV connector: hands blocks and layers to OverFill's own sender and receiver.

vLLM makes two kinds of these: one for its scheduler, and one for each model runner. With one rank both are in one
process, and pass calls on to the engine (``hooks.Hooks``), which owns the transfers. Of several ranks each has a
model runner in a process of its own. There the second kind builds the rank's store and starts its agent, and the two
kinds talk by vLLM's metadata (``ranks.steps``). Nothing is loaded or sent by vLLM itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.model_executor.models.utils import extract_layer_index

from overfill.engine.vllm.hooks import hub
from overfill.engine.vllm.layout import UnknownLayout, find_layouts
from overfill.engine.vllm.ranks.agent import RankAgent
from overfill.engine.vllm.ranks.messages import RankHello
from overfill.engine.vllm.ranks.rank import RankHooks
from overfill.engine.vllm.ranks.shares import head_share
from overfill.engine.vllm.ranks.steps import RankExtras, RankStep
from overfill.engine.vllm.store import VllmKvStore
from overfill.errors import UnsupportedModel
from overfill.kv.spec import KvSpec
from overfill.kv.tensors import TORCH_DTYPES
from overfill.model.processors import LogitProcessor, new_processor
from overfill.request.grammar import Grammars
from overfill.request.params import SamplingParams

_IO_THREADS = 4
"""Threads of a rank that copy KV between its cache and the network."""
_layer_index = cache(extract_layer_index)
"""The number of a layer. vLLM's function splits the name, which twice per layer costs a small model's step 0.2 ms."""


class OverfillConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Passes vLLM's questions and news to the engine. Without an engine, while vLLM warms up, it does nothing."""

    _rank: RankHooks | None = None  # in the process of one rank of several

    # The scheduler's calls

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        missing = 0 if hub.hooks is None else hub.hooks.tokens_to_load(request.request_id, num_computed_tokens)
        return missing, bool(missing)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if hub.hooks is not None and num_external_tokens:
            hub.hooks.allocated(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        if hub.hooks is None:
            return KVConnectorMetadata()
        hub.hooks.scheduled(scheduler_output.num_scheduled_tokens, scheduler_output.preempted_req_ids or ())
        return KVConnectorMetadata() if self._extra.get("ranks") is None else hub.hooks.step_of_ranks()

    def update_connector_output(self, connector_output: Any) -> None:
        if hub.hooks is not None and isinstance(extras := connector_output.kv_connector_worker_meta, RankExtras):
            hub.hooks.sampled_by_ranks(extras)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return hub.hooks is not None and hub.hooks.ending(request.request_id), None

    # The model runner's calls

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        hub.caches = dict(kv_caches)
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        spec: KvSpec = self._extra["kv"]
        heads = head_share(spec.num_kv_heads, rank, ranks)
        block_size = self._vllm_config.cache_config.block_size
        hub.store = _new_store(self._vllm_config, spec, heads, block_size)
        if self._extra.get("ranks") is None:
            return
        device = next(iter(kv_caches.values())).device
        executor = ThreadPoolExecutor(_IO_THREADS, "kv")
        hello = RankHello(rank, os.getpid(), heads, spec.num_layers, block_size, spec.dtype)
        make_processor = partial(_make_processor, Grammars(*self._extra["grammars"]))
        agent = RankAgent(self._extra["ranks"], hello, hub.store, executor, make_processor)
        share = spec.token_layer_bytes // spec.num_kv_heads * (heads[1] - heads[0])
        self._rank = hub.runner = RankHooks(rank, agent, device, spec.num_layers, share)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._rank is not None and isinstance(connector_metadata, RankStep):
            self._rank.begin(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        if hub.runner is not None:
            hub.runner.layer_started(_layer_index(layer_name))

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        if hub.runner is not None:
            hub.runner.layer_written()

    def wait_for_save(self) -> None:
        pass

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._rank is not None:
            self._rank.forget(finished_req_ids)
        return KVConnectorTransferResults()  # the engine tells the scheduler itself, without waiting for a step

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return None if self._rank is None else self._rank.end_forward()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        # A full CUDA graph would leave out save_kv_layer, on which a prefill worker's layer-by-layer sending rests.
        return bool(extra_config.get("by_layer"))

    @property
    def _extra(self) -> dict[str, Any]:
        extra: dict[str, Any] = self._kv_transfer_config.kv_connector_extra_config
        return extra


def _new_store(config: Any, spec: KvSpec, heads: tuple[int, int], block_size: int) -> VllmKvStore:
    """The store of this rank's caches, after checks that they hold KV as OverFill hands it over.

    Raises:
        UnsupportedModel: they hold it in another way.
    """
    caches = [hub.caches[name] for name in sorted(hub.caches, key=extract_layer_index)]
    model = config.model_config.model
    expected = (heads[1] - heads[0], block_size, 2 * spec.head_dim)
    wrong = [cache for cache in caches if tuple(cache.shape[1:]) != expected or cache.dtype != TORCH_DTYPES[spec.dtype]]
    if len(caches) != spec.num_layers or wrong:
        found = f"{tuple(wrong[0].shape[1:])} of {wrong[0].dtype}" if wrong else f"{len(caches)} layers"
        raise UnsupportedModel(
            f"vLLM keeps the KV of {model} as {found} per block; OverFill hands over {spec.num_layers} layers of "
            f"{expected} in {spec.dtype}"
        )
    layer = config.compilation_config.static_forward_context[min(hub.caches, key=extract_layer_index)]
    try:
        layouts = find_layouts(caches[0], partial(layer.impl.do_kv_cache_update, layer))
    except UnknownLayout as error:
        raise UnsupportedModel(
            f"vLLM's attention backend for {model} lays out KV in an unknown way: {error}"
        ) from error
    return VllmKvStore(caches, layouts, block_size, heads[0])


def _make_processor(
    grammars: Grammars, params: SamplingParams, prompt: Sequence[int], eos_ids: Sequence[int]
) -> LogitProcessor | None:
    return new_processor(params, prompt, grammars, eos_ids)
