"""Starts a worker's ranks and brings their links, their executor and the worker's services together."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from overfill.engine.device import NotEnoughMemory
from overfill.engine.vllm.internals import VllmCore
from overfill.engine.vllm.ranks.executor import RankExecutor
from overfill.engine.vllm.ranks.link import RankLinks
from overfill.engine.vllm.ranks.worker import WorkerRanks
from overfill.errors import InternalError, InvalidRequest, OverfillError, Unavailable
from overfill.kv.chunks import Chunk
from overfill.kv.spec import KvSpec
from overfill.kv.store import DeviceEvent, LayerTargets
from overfill.request.grammar import Grammars
from overfill.request.params import SamplingParams
from overfill.v1 import common_pb2

_CONNECTING = 30.0
"""Seconds for the ranks' links after vLLM has loaded."""
_LAST_WORDS = 1.0
"""Seconds for a rank's last words."""


class RankGroup:
    """The ranks of a worker from their start to their end.

    Attributes:
        arguments: what vLLM's settings need for several ranks.
        links: the worker's links to them.
        ranks: the ranks as the worker's services use them; None before ``join``.
    """

    def __init__(self, num_ranks: int) -> None:
        self.arguments: Mapping[str, Any] = {
            "tensor_parallel_size": num_ranks,
            "distributed_executor_backend": RankExecutor,
            "worker_cls": "overfill.engine.vllm.ranks.process.RankWorker",
        }
        self._num_ranks = num_ranks
        self._executor: RankExecutor | None = None
        self.ranks: WorkerRanks | None = None
        self.links = RankLinks(num_ranks, self._on_lost)

    def join(self, vllm: VllmCore, spec: KvSpec) -> None:
        """Waits for the ranks' links, once vLLM has loaded.

        Args:
            spec: geometry of the KV of the model that the ranks run.

        Raises:
            UnsupportedModel: the ranks' caches do not fit together.
        """
        self._executor = vllm.executor
        vllm.on_close = self.links.close
        self.ranks = WorkerRanks(self.links, self.links.wait(_CONNECTING), spec)

    def failure(self) -> OverfillError | None:
        """Ends the links after a failed start, and returns what a rank said of it."""
        try:
            self.links.wait(_LAST_WORDS)
        except Unavailable:
            pass
        except InvalidRequest as error:
            return NotEnoughMemory(error.reason) if error.field == "kv_memory" else error
        except OverfillError as error:
            return error
        finally:
            self.links.close()
        return None

    def new_processor(
        self, params: SamplingParams, prompt: Sequence[int], grammars: Grammars, eos_ids: Sequence[int]
    ) -> RankProcessor | None:
        """As ``model.processors.new_processor``, in all ranks. Blocks until they have it."""
        assert self.ranks is not None
        if not params.need_processor(eos_ids):
            return None
        made = RankProcessor(secrets.token_hex(8))
        weakref.finalize(made, self.ranks.forget, made.key).atexit = False
        if params.grammar is not None:  # the matchers are in the ranks, and take memory of this machine
            grammars.count(made, self._num_ranks)
        self.ranks.prepare(made.key, params, prompt, eos_ids)
        return made

    def _on_lost(self, rank: int, reason: str) -> None:
        if self._executor is not None:
            self._executor.lose(reason)


class RankProcessor:
    """Stands for an answer's processor in the ranks, which drop theirs with it."""

    def __init__(self, key: str) -> None:
        self.key = key


class RemoteBlocks:
    """The ``KvStore`` of a worker whose blocks are in its ranks: their size, and nothing to read or write."""

    codec = common_pb2.KV_CODEC_RAW

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def read(
        self, block_table: Sequence[int], chunks: Sequence[Chunk], after: Mapping[int, DeviceEvent | None]
    ) -> None:
        raise InternalError("this process has no KV; its ranks have it")

    def write(self, block_table: Sequence[int], targets: LayerTargets, chunks: Sequence[Chunk]) -> int:
        raise InternalError("this process has no KV; its ranks have it")
