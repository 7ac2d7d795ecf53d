"""What the two vLLM engine cores have in common: their sampling, their loans and their load."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from overfill.engine.loans import KEPT_SHARE
from overfill.engine.sequence import Lend, Lent, SequenceFailed
from overfill.engine.vllm.hashes import NO_KEY, hashes_of
from overfill.engine.vllm.hooks import Hooks, hub
from overfill.engine.vllm.internals import VllmCore
from overfill.engine.vllm.ranks.steps import RankExtras, RowSpec
from overfill.engine.vllm.sampler import StepSampler
from overfill.engine.work import Sampled
from overfill.kv.journal import KeyJournal
from overfill.telemetry.metrics import EngineMetrics

log = logging.getLogger(__name__)

_RECOUNT = 10.0
"""Seconds between counts of cached and leaked blocks while the engine is busy: a count looks at every block in use."""


class VllmEngine(Hooks):
    """A vLLM engine whose requests are OverFill's sequences, by id. Subclasses are engine cores.

    Args:
        journal: receives the keys of the blocks in vLLM's prefix cache, where vLLM reports them.

    Attributes:
        step_shape: sequences and tokens in the latest step that vLLM has planned.

    An error that a hook raises ends vLLM's step halfway, and with it the engine's thread and the worker. Sampling is
    the exception: it is a step's last part, and vLLM goes on with any token.
    """

    _metrics: EngineMetrics
    _emit: Callable[[list[Any]], None]

    delay = 0.0

    def __init__(self, vllm: VllmCore, journal: KeyJournal) -> None:
        self._vllm = vllm
        self._journal = journal
        self._loans: dict[str, list[Any]] = {}  # vLLM's blocks
        self._unwritten: Collection[int] = ()  # blocks that the running step computes
        self._sampler = StepSampler()
        self._cached = 0
        self._leaked = 0
        self._counted = float("-inf")
        self.step_shape = (0, 0)
        self.tokens_looked_up = 0
        self.tokens_found = 0
        hub.hooks = hub.runner = self

    def close(self) -> None:
        """Frees vLLM's model and cache."""
        self._vllm.close()

    def check(self) -> None:
        """Raises AssertionError when vLLM holds a request or a block that no sequence has."""
        self._counted = float("-inf")  # the next load counts anew
        ids = self._live()
        if extra := self._vllm.num_requests() - sum(map(self._vllm.known, ids)):
            raise AssertionError(f"vLLM holds {extra} requests that no sequence has")
        if leaked := self._num_used - self._vllm.count_blocks(ids, self._loans.values())[0]:
            raise AssertionError(f"{leaked} blocks are in use, and no sequence has them")

    def _row(self, sequence: Sampled) -> RowSpec | None:
        """What ranks need to choose the sequence's tokens; None if there is only one."""
        if self._vllm.num_ranks == 1:
            return None
        processor = "" if sequence.processor is None else sequence.processor.key
        return RowSpec(sequence.sampling, sequence.sample_index, len(sequence.prompt), processor)

    def _lend(self, message: Lend) -> None:
        """Answers with the cached blocks that can be held, without those that sequences still need."""
        kept = max(self._num_kept(), message.to_peer * self._vllm.num_blocks // KEPT_SHARE)
        hashes = () if message.to_peer and self._awaits_blocks() else hashes_of(message.prompt)
        loan = self._vllm.hold(hashes, kept, self._unwritten)
        self._loans[message.id] = loan
        blocks = [block.block_id for block in loan]
        # No event: an earlier step has ended on the device, too, because vLLM waits for its tokens.
        self._emit([Lent(message.id, blocks, len(blocks) * self._vllm.block_size, None)])

    def _end_loan(self, id: str) -> bool:
        """Gives a loan's blocks back. Returns False if there is no such loan."""
        loan = self._loans.pop(id, None)
        if loan is not None:
            self._vllm.drop(loan)
        return loan is not None

    def _num_kept(self) -> int:
        """Free blocks that live sequences will need."""
        raise NotImplementedError

    def _awaits_blocks(self) -> bool:
        """Whether a sequence waits for blocks."""
        raise NotImplementedError

    def _live(self) -> list[str]:
        """Ids of the sequences that vLLM may know."""
        raise NotImplementedError

    def _planned(self) -> Iterable[str]:
        """Ids of the sequences in the step, once vLLM has planned it; none before."""
        raise NotImplementedError

    def _step(self) -> tuple[list[Any], bool]:
        """Takes vLLM's step. Counts a failed one, which ends the engine's thread, and fails the sequences in it."""
        self._sampler.clear()
        try:
            outputs, executed = self._vllm.step()
            self._sampler.finish({o.request_id: o.new_token_ids[0] for o in outputs if o.new_token_ids})
            return outputs, executed
        except Exception as error:
            self._metrics.step_failed()
            self._emit([SequenceFailed(id, error, ends_engine=True) for id in self._planned()])
            raise

    @property
    def _num_used(self) -> int:
        return self._vllm.num_blocks - self._vllm.num_free

    def _recount(self) -> None:
        """Counts cached and leaked blocks again when the last count is too old."""
        now = time.monotonic()
        if now - self._counted > _RECOUNT:
            owned, self._cached = self._vllm.count_blocks(self._live(), self._loans.values())
            self._leaked = self._num_used - owned
            self._counted = now

    # Hooks

    def scheduled(self, num_tokens: Mapping[str, int], preempted: Collection[str]) -> None:
        self.step_shape = (len(num_tokens), sum(num_tokens.values()))

    def blocks_stored(self, hashes: Iterable[int]) -> None:
        for key in hashes:
            if key != NO_KEY:
                self._journal.add(key)

    def blocks_removed(self, hashes: Iterable[int]) -> None:
        for key in hashes:
            if key != NO_KEY:
                self._journal.remove(key)

    def sampled_by_ranks(self, extras: RankExtras) -> None:
        self._sampler.details |= extras.details
        self._sampler.errors |= extras.errors

    def sample(self, logits: torch.Tensor, request_ids: Sequence[str], rows: Sequence[int]) -> None:
        try:
            self._sampler.sample(logits, request_ids, rows, self._sampled)
        except Exception as error:
            log.exception("sampling failed")
            self._metrics.step_failed()
            self._sampler.errors |= dict.fromkeys(request_ids, error)

    def _sampled(self, id: str) -> Sampled | None:
        """The sequence ``id`` if it gets a token in this step."""
        raise NotImplementedError
