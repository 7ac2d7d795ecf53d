"""Starts a worker's ranks and brings their links, their executor and the worker's services together."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from overfill.engine.device import NotEnoughMemory
from overfill.engine.protocol import ServedHalf
from overfill.engine.sequence import Processor
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
_TOLD = 1.0
"""Seconds for a rank's last words."""


class RankGroup:
    """The ranks of a worker from their start to their end.

    Attributes:
        arguments: what vLLM's settings need for several ranks.
    """

    def __init__(self, num_ranks: int) -> None:
        self.arguments: Mapping[str, Any] = {
            "tensor_parallel_size": num_ranks,
            "distributed_executor_backend": RankExecutor,
            "worker_cls": "overfill.engine.vllm.ranks.process.RankWorker",
        }
        self._num_ranks = num_ranks
        self._executor: RankExecutor | None = None
        self._ranks: WorkerRanks | None = None
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
        self._ranks = WorkerRanks(self.links, self.links.wait(_CONNECTING), spec)

    def half(self, served: ServedHalf) -> RankedHalf:
        """Returns the half as it runs in these ranks."""
        assert self._ranks is not None
        known = {field.name: getattr(served, field.name) for field in fields(served)}
        known |= {"new_processor": self._new_processor, "ranks": self._ranks}
        if served.half == "full":
            known["serving_ranks"] = self._ranks
        else:
            known["puller"] = self._ranks.puller
        return RankedHalf(**known)

    def failure(self) -> OverfillError | None:
        """Ends the links after a failed start, and returns what a rank said of it."""
        try:
            self.links.wait(_TOLD)
        except Unavailable:
            pass
        except InvalidRequest as error:
            return NotEnoughMemory(error.reason) if error.field == "kv_memory" else error
        except OverfillError as error:
            return error
        finally:
            self.links.close()
        return None

    def _new_processor(
        self, params: SamplingParams, prompt: Sequence[int], grammars: Grammars, eos_ids: Sequence[int]
    ) -> RankProcessor | None:
        """As ``new_processor``, in all ranks. Blocks, so that a thread of ``grammars`` calls it."""
        assert self._ranks is not None
        if not needs_processor(params, eos_ids):
            return None
        handle = new_handle(self._ranks)
        if params.grammar is not None:  # the matchers are in the ranks, and take memory of this machine
            grammars.count(handle, self._num_ranks)
        self._ranks.prepare_now(handle.key, params, prompt, eos_ids)
        return handle

    def _on_lost(self, rank: int, reason: str) -> None:
        if self._executor is not None:
            self._executor.lose(reason)


@dataclass(frozen=True, slots=True)
class RankedHalf(ServedHalf):
    """A half that runs in ranks, which make the processors of answers before the engine gets them."""

    ranks: WorkerRanks | None = None

    async def prepare_processor(
        self, params: SamplingParams, prompt: Sequence[int], eos_ids: Sequence[int], key: str = ""
    ) -> Processor | None:
        """As ``ServedHalf.prepare_processor``. All ranks have the processor before this returns."""
        assert self.ranks is not None
        if not needs_processor(params, eos_ids):
            return None
        if params.grammar is not None:  # also tries the grammar, in a process of its own
            return await super(RankedHalf, self).prepare_processor(params, prompt, eos_ids, key)
        made = new_handle(self.ranks)
        await self.ranks.prepare(made.key, params, prompt, [*eos_ids])
        return made


class RankProcessor:
    """Stands for an answer's processor in the ranks, which drop theirs with it."""

    def __init__(self, key: str) -> None:
        self.key = key


def new_handle(ranks: WorkerRanks) -> RankProcessor:
    handle = RankProcessor(secrets.token_hex(8))
    weakref.finalize(handle, ranks.forget, handle.key).atexit = False
    return handle


def needs_processor(params: SamplingParams, eos_ids: Sequence[int]) -> bool:
    """True if ``new_processor`` makes one."""
    too_short = params.min_tokens and params.end_ids(eos_ids)
    return bool(params.grammar or params.penalised or params.logit_bias or too_short)


class RemoteBlocks:
    """The ``KvStore`` of a worker whose blocks are in its ranks: their size, and nothing to read or write."""

    codec = common_pb2.KV_CODEC_RAW

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def read(
        self, block_table: Sequence[int], chunks: Sequence[Chunk], after: Mapping[int, DeviceEvent | None]
    ) -> None:
        _refuse()

    def write(self, block_table: Sequence[int], targets: LayerTargets, chunks: Sequence[Chunk]) -> int:
        _refuse()


def _refuse() -> NoReturn:
    raise InternalError("this process has no KV; its ranks have it")
