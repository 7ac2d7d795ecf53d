"""What OverFill touches of vLLM beyond its plug-in interfaces.

The plug-in interfaces are ``KVConnectorBase_V1`` (``connector.py``) and ``LogitsProcessor`` (``sampler.py``). vLLM
promises nothing about the rest. Used here:

- ``EngineCore`` in this process: its constructor, ``step_fn``, ``post_step``, ``abort_requests``, ``shutdown``;
- ``Request`` with a block hasher of our own, and its lists of tokens;
- of the scheduler: ``add_request``, ``requests``, ``_update_from_kv_xfer_finished``, ``failed_recving_kv_req_ids``,
  ``kv_event_publisher``, and the KV cache manager's ``get_computed_blocks``, ``cache_blocks``, ``get_block_ids``,
  ``evict_blocks`` and ``block_pool``, of which ``get_cached_block``, ``cache_full_blocks``, ``touch``, ``free_blocks``;
- the model runner's ``lora_manager``, its modules and the adapters that it holds;
- ``static_forward_context``, whose attention layers can write into a cache (``impl.do_kv_cache_update``).

``ranks.executor`` and ``ranks.process`` have what is used of vLLM's executor and worker for several ranks, and
``refusals`` asks the attention backends for their block sizes.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Container, Iterable
from typing import Any

# Before vLLM is imported, which reads them once. There is one process per engine, vLLM sends no usage statistics, and
# OverFill sets threads and logging.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the logits processor is for the first one
os.environ["VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES"] = "1"
# Even for one rank, torch's gloo opens a dozen listeners without authentication, by default on the address of the
# host's name. An engine has no ranks on other hosts, so an interface that the environment names makes no sense either.
os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
os.environ["VLLM_HOST_IP"] = "127.0.0.1"
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # gRPC's threads do not survive a fork
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm import SamplingParams
from vllm.config import KVEventsConfig, KVTransferConfig, VllmConfig
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from overfill.engine.vllm.hooks import PLAIN, REQUEST_ID, ROW_SPEC, hub
from overfill.errors import InternalError, UnsupportedModel

__all__ = [
    "CONNECTOR",
    "EngineArgs",
    "KVEventsConfig",
    "KVTransferConfig",
    "LoRARequest",
    "Request",
    "VllmConfig",
    "VllmCore",
    "current_platform",
]


class _EventPublisher:
    """Takes the place of vLLM's publisher of prefix-cache events, which would open a socket."""

    def publish(self, batch: Any) -> None:
        if hub.hooks is None:
            return
        for event in batch.events:
            if isinstance(event, BlockStored):
                hub.hooks.blocks_stored(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                hub.hooks.blocks_removed(event.block_hashes)

    def shutdown(self) -> None:
        pass


class VllmCore:
    """A vLLM engine in this process, stepped by its caller.

    Attributes:
        block_size: tokens per block.
        num_blocks: blocks that requests can have.
        max_model_len: maximum number of tokens of a request.
        on_close: called after vLLM has ended.
        num_ranks: processes that have a share of each layer; with one, that is this process.

    Raises:
        UnsupportedModel: the model has several kinds of KV cache.
    """

    def __init__(self, config: VllmConfig) -> None:
        ensure_kv_transfer_shutdown()  # a failed start leaves its connector behind, and the next one would take it
        self._core = EngineCore(config, Executor.get_class(config), log_stats=False)
        scheduler = self._core.scheduler
        assert isinstance(scheduler, Scheduler)
        self._scheduler: Any = scheduler
        self._scheduler.kv_event_publisher = _EventPublisher()
        self._manager: Any = scheduler.kv_cache_manager
        self._pool: Any = self._manager.block_pool
        random.seed()  # vLLM gives every process the same seed, also for what has nothing to do with models
        if type(scheduler.connector).__name__ != CONNECTOR:
            raise InternalError(f"vLLM took {type(scheduler.connector).__name__} as its KV connector, not {CONNECTOR}")
        if (kinds := len(scheduler.kv_cache_config.kv_cache_groups)) != 1:
            raise UnsupportedModel(
                f"vLLM keeps {kinds} kinds of KV cache for {config.model_config.model}; OverFill hands over one kind"
            )
        self.block_size: int = config.cache_config.block_size
        self.num_blocks: int = self._pool.num_gpu_blocks - 1  # one is vLLM's null block
        self.max_model_len: int = config.model_config.max_model_len
        self.on_close: Callable[[], object] = lambda: None
        self.num_ranks: int = config.parallel_config.tensor_parallel_size

    @property
    def executor(self) -> Any:
        return self._core.model_executor

    # Requests ---------------------------------------------------------------------------------------------------

    def new_request(
        self,
        id: str,
        tokens: list[int],
        max_tokens: int,
        hasher: Callable[[Any], list[bytes]],
        plain: bool,
        row: Any = None,
        adapter: LoRARequest | None = None,
    ) -> Request:
        """A request that samples ``max_tokens`` tokens after ``tokens``; no token ends it earlier.

        Args:
            hasher: returns the hashes of the request's full blocks that have none yet.
            plain: whether each of its tokens is the most likely one, which vLLM finds by itself.
            row: what ranks need to choose its tokens, a ``ranks.steps.RowSpec``; None with one rank.
        """
        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={REQUEST_ID: id, PLAIN: plain, ROW_SPEC: row},
        )
        return Request(
            request_id=id,
            prompt_token_ids=tokens,
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=hasher,
            lora_request=adapter,
        )

    def add(self, request: Request) -> None:
        self._core.add_request(request)

    def replace_token(self, id: str, position: int, token: int) -> None:
        """Sets a token of a request that has not been scheduled since it was added."""
        request = self._scheduler.requests[id]
        request.prompt_token_ids[position] = token
        request._all_token_ids[position] = token

    def received(self, id: str, num_computed: int) -> None:
        """Says that a waiting request has the KV of ``num_computed`` tokens; the next step can schedule it."""
        self._scheduler.requests[id].num_computed_tokens = num_computed
        self._end_loading(id)

    def received_nothing(self, id: str) -> None:
        """Says that no KV of a waiting request has come; the next step gives it other blocks and may schedule it."""
        request = self._scheduler.requests[id]
        request.num_computed_tokens = 0
        self._scheduler.failed_recving_kv_req_ids.add(id)
        self._end_loading(id)

    def publish(self, id: str, num_computed: int) -> None:
        """Lets the prefix cache share a waiting request's full blocks, which have the KV of ``num_computed`` tokens."""
        self._manager.cache_blocks(self._scheduler.requests[id], num_computed)

    def publish_answer(self, id: str, begin: int, hashes: list[bytes]) -> None:
        """Lets the prefix cache share an ending request's blocks from index ``begin`` on, which it has forgotten.

        Args:
            hashes: hashes of the first blocks; those that other blocks have already are left out.
        """
        request = self._scheduler.requests[id]
        request.block_hashes = hashes
        new = [self._pool.get_cached_block(key, [0]) is None for key in hashes[begin:]]
        table = self._manager.get_blocks(id).blocks[0]
        self._pool.cache_full_blocks(request, table, begin, len(hashes), self.block_size, 0, new)

    def computed_tokens(self, id: str, begin: int) -> list[int]:
        """The tokens of a request from position ``begin`` on whose KV its blocks hold."""
        request = self._scheduler.requests[id]
        return list(request.all_token_ids[begin : request.num_computed_tokens])

    def aborted(self, id: str) -> bool:
        """Whether a request that ends is ended by ``abort``, and not by vLLM within a step."""
        return bool(self._scheduler.requests[id].status == RequestStatus.FINISHED_ABORTED)

    def sent(self, id: str) -> None:
        """Frees the blocks of an ended request. The caller has joined every stream that reads them."""
        self._scheduler._update_from_kv_xfer_finished(KVConnectorOutput(finished_sending={id}))

    def abort(self, id: str) -> None:
        """Ends a request in any state. Frees its blocks, unless ``Hooks.ending`` says otherwise."""
        request = self._scheduler.requests.get(id)
        if request is None or request.is_finished():
            return
        loading = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
        ready = id in self._scheduler.finished_recving_kv_req_ids
        self._core.abort_requests([id])
        if loading and not ready:
            self._end_loading(id)  # vLLM would wait for the writer of the blocks, which has been joined

    def _end_loading(self, id: str) -> None:
        self._scheduler._update_from_kv_xfer_finished(KVConnectorOutput(finished_recving={id}))

    def known(self, id: str) -> bool:
        """Whether vLLM still holds anything of the request."""
        return id in self._scheduler.requests

    def num_requests(self) -> int:
        return len(self._scheduler.requests)

    def num_computed(self, ids: Iterable[str]) -> list[int]:
        """For each request, the tokens whose KV its blocks hold, before the planned step."""
        requests = self._scheduler.requests
        return [requests[id].num_computed_tokens for id in ids]

    # Blocks -----------------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now: empty, or cached and not in use."""
        return int(self._pool.get_num_free_blocks())

    def blocks(self, id: str) -> list[int]:
        """Ids of a request's blocks."""
        return list(self._manager.get_block_ids(id)[0])

    def num_shared(self, request: Request) -> int:
        """Blocks in use by others that the prefix cache would give to a new request."""
        computed, _, _ = self._manager.get_computed_blocks(request)
        return sum(block.ref_cnt > 0 for block in computed.blocks[0])

    def hold(self, hashes: Iterable[bytes], spare: int, unwritten: Container[int]) -> list[Any]:
        """Takes a reference on the cached blocks with ``hashes``, up to the first one that is missing or unwritten.

        They stay as they are until ``drop``. At least ``spare`` blocks stay free, or as many as before.

        Args:
            unwritten: blocks that the running step computes; vLLM caches them when it plans the step.
        """
        held: list[Any] = []
        for key in hashes:
            found = self._pool.get_cached_block(key, [0])
            if found is None or found[0].block_id in unwritten:
                break
            if found[0].ref_cnt == 0 and self.num_free <= spare:
                break
            self._pool.touch(found)
            held += found
        return held

    def drop(self, held: list[Any]) -> None:
        """Gives back the references of ``hold``."""
        self._pool.free_blocks(reversed(held))  # the last blocks are evicted first

    def forget(self, blocks: Iterable[int]) -> None:
        """Takes blocks out of the prefix cache; those in use stay in use."""
        self._manager.evict_blocks(set(blocks))

    def discard(self, blocks: Iterable[int]) -> None:
        """Forgets blocks whose KV may be spoilt, and clears those that no other request has.

        Attention on CPUs multiplies the unused slots of a block by 0, and 0 times NaN is NaN. A later request that gets
        the block would fail, too.
        """
        spoilt = set(blocks)
        self.forget(spoilt)
        alone = [block for block in spoilt if self._pool.blocks[block].ref_cnt <= 1]
        self.executor.collective_rpc(_clear_blocks, args=(alone,))

    def count_blocks(self, ids: Iterable[str], held: Iterable[list[Any]] = ()) -> tuple[int, int]:
        """Blocks of the live requests, which are ``ids``, or ``held``; and other blocks that hold a cached prefix."""
        requests = self._scheduler.requests
        tables = (self._manager.get_blocks(id).blocks[0] for id in ids if id in requests)
        owned = {block.block_id: block for blocks in (*tables, *held) for block in blocks}
        cached = len(self._pool.cached_block_hash_to_block)  # of equal blocks, it counts one
        return len(owned), max(0, cached - sum(block.block_hash is not None for block in owned.values()))

    # Adapters ---------------------------------------------------------------------------------------------------

    def adapter_buffers(self) -> int:
        """Bytes of the buffers for adapters, of all ranks together."""
        return sum(self.executor.collective_rpc(_adapter_buffers))

    def add_adapter(self, adapter: LoRARequest) -> str:
        """Loads an adapter between two steps. Returns why that failed; empty if it did not."""
        refusals = self.executor.collective_rpc(_add_adapter, args=(adapter,))
        if any(refusals):
            self.remove_adapter(adapter.lora_int_id)
        return next(filter(None, refusals), "")

    def remove_adapter(self, number: int) -> None:
        """Removes the adapter ``number`` if vLLM has it. No live request uses it."""
        self.executor.collective_rpc("remove_lora", args=(number,))

    # Steps ------------------------------------------------------------------------------------------------------

    def step(self) -> tuple[list[Any], bool]:
        """Takes a step. Returns its outputs, and whether it computed anything."""
        try:
            outputs, executed = self._core.step_fn()
        except Exception as error:
            if lost := getattr(self.executor, "failure", None):
                raise InternalError(lost) from error
            raise
        self._core.post_step(executed)
        ours = (outputs or {}).get(0)
        return (list(ours.outputs) if ours is not None else []), executed

    def close(self) -> None:
        """Frees the model and the cache; afterwards the process can make another engine."""
        self._core.shutdown()
        ensure_kv_transfer_shutdown()
        self.on_close()
        hub.hooks = hub.runner = hub.store = None
        hub.caches = {}


def quieten() -> None:
    """Leaves out most of what vLLM logs at its start, which fills a page, unless this process logs in detail."""
    if logging.getLogger("overfill").isEnabledFor(logging.DEBUG):
        return
    logging.getLogger("vllm").setLevel(logging.WARNING)
    # It has a warning for each weight that is stored in another dtype than --dtype.
    logging.getLogger("vllm.model_executor.models.utils").addFilter(_says_more_than_dtypes)


def _says_more_than_dtypes(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Attempted to load weight")


def _clear_blocks(worker: Any, blocks: list[int]) -> None:
    """Called in every rank."""
    for cache in hub.caches.values():
        cache[blocks] = 0


def _adapter_buffers(worker: Any) -> int:
    """Called in every rank."""
    modules = worker.model_runner.lora_manager._adapter_manager.modules.values()
    return sum(buffer.nbytes for module in modules for buffer in (*module.lora_a_stacked, *module.lora_b_stacked))


def _add_adapter(worker: Any, adapter: LoRARequest) -> str:
    """Called in every rank. An error that leaves a rank would make the worker lose the others' answers."""
    try:
        worker.add_lora(adapter)
        manager = worker.model_runner.lora_manager._adapter_manager
        parts = {part for parts in manager.packed_modules.values() for part in parts}
        unused = manager.get_adapter(adapter.lora_int_id).loras.keys() - manager.modules.keys() - parts
        return f"the model has no {min(unused)}" if unused else ""
    except Exception as error:
        return str(error) or type(error).__name__


CONNECTOR = "OverfillConnector"
"""Class in ``connector.py``."""
