"""vLLM's KV connector: hands blocks and layers to OverFill's own sender and receiver, by calls in the same process.

vLLM makes two of these, one for its scheduler and one for its model runner. Here both only pass calls on to the engine
(``internals.Hooks``), which owns the transfers. Nothing is loaded or sent by vLLM itself.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorTransferResults,
)
from vllm.model_executor.models.utils import extract_layer_index

from overfill.engine.vllm.internals import hub


class OverfillConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Passes vLLM's questions and news to the engine. Without an engine, while vLLM warms up, it does nothing."""

    # The scheduler's calls

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        missing = 0 if hub.hooks is None else hub.hooks.tokens_to_load(request.request_id, num_computed_tokens)
        return missing, missing > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if hub.hooks is not None and num_external_tokens:
            hub.hooks.allocated(request.request_id, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        if hub.hooks is not None:
            hub.hooks.scheduled(scheduler_output.num_scheduled_tokens, scheduler_output.preempted_req_ids or ())
        return KVConnectorMetadata()

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return hub.hooks is not None and hub.hooks.ending(request.request_id), None

    # The model runner's calls

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        hub.caches = dict(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        if hub.hooks is not None:
            hub.hooks.layer_started(extract_layer_index(layer_name))

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        if hub.hooks is not None:
            hub.hooks.layer_written(extract_layer_index(layer_name))

    def wait_for_save(self) -> None:
        pass

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return KVConnectorTransferResults()  # the engine tells the scheduler itself, without waiting for a step

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        # A full CUDA graph would leave out save_kv_layer, on which a prefill worker's layer-by-layer sending rests.
        return bool(extra_config.get("by_layer"))
