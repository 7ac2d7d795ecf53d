"""What happens in a rank while vLLM takes a step: layers are marked ready, and tokens are chosen.

A rank knows a request by what vLLM sends to every rank: its tokens, and a ``RowSpec`` in its sampling parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from overfill.engine.layers import LayerReports
from overfill.engine.sequence import KvWritten, Processor
from overfill.engine.vllm.hooks import RunnerHooks
from overfill.engine.vllm.ranks.steps import RankExtras, RankStep, RowSpec, portable
from overfill.engine.vllm.sampler import StepSampler

log = logging.getLogger(__name__)


class Agent(Protocol):
    """What a rank's model asks of the rank's agent; see ``agent.RankAgent``."""

    def assign(self, blocks: Sequence[tuple[bytes, int, Sequence[int]]]) -> None: ...

    def mark_ready(self, written: Sequence[KvWritten]) -> None: ...

    def processor(self, key: str) -> Processor | None: ...


class RankRow:
    """A request whose tokens the rank chooses. Has what ``StepSampler`` needs of a sequence.

    Args:
        prompt: vLLM's prompt: the request's, and tokens of its answer that were known before.
        output: tokens since then. vLLM appends to it after each step.
    """

    def __init__(
        self, spec: RowSpec, processor: Processor | None, prompt: Sequence[int], output: Sequence[int]
    ) -> None:
        self.sampling = spec.sampling
        self.sample_index = spec.sample_index
        self.processor = processor
        self._num_prompt = spec.num_prompt
        self._emitted = list(prompt[spec.num_prompt :])
        self._known = len(self._emitted)
        self._output = output

    @property
    def emitted(self) -> list[int]:
        """The answer so far."""
        self._emitted += self._output[len(self._emitted) - self._known :]
        return self._emitted

    @property
    def sampled_position(self) -> int:
        """Position of the next token."""
        return self._num_prompt + self._known + len(self._output)


class RankHooks(RunnerHooks):
    """A rank's part of each step.

    Args:
        rank: the first rank alone reports log-probabilities.
        token_layer_bytes: bytes of one token's keys and values in one layer of this rank.
    """

    def __init__(self, rank: int, agent: Agent, device: torch.device, num_layers: int, token_layer_bytes: int) -> None:
        self._first = rank == 0
        self._agent = agent
        self._device = device
        self._num_layers = num_layers
        self._token_layer_bytes = token_layer_bytes
        self._rows: dict[str, RankRow] = {}
        self._step = RankStep()
        self._reports = LayerReports([], token_layer_bytes, device)
        self._extras = RankExtras()
        self._sampler = StepSampler()

    # Called by the connector

    def begin(self, step: RankStep) -> None:
        """A step begins. Notes its chunks and the blocks that they got."""
        self._step = step
        self._extras = RankExtras()
        parts = [(chunk.id, chunk.num_tokens, chunk.token_end) for chunk in step.chunks]
        self._reports = LayerReports(parts, self._token_layer_bytes, self._device)
        if assigned := [(bytes.fromhex(c.id), c.first_block, c.blocks) for c in step.chunks if c.blocks]:
            self._agent.assign(assigned)

    def layer_written(self) -> None:
        if written := self._reports.written():
            self._agent.mark_ready(written)

    def end_forward(self) -> RankExtras:
        """The model has computed the step; its tokens are chosen later. Returns what will hold the extras."""
        if left := self._reports.rest(self._num_layers):  # all layers, if a graph of the whole model calls no hooks
            self._agent.mark_ready(left)
        return self._extras

    def forget(self, ids: Iterable[str]) -> None:
        for id in ids:
            self._rows.pop(id, None)

    # Called by the sampler

    def row_added(self, id: str, spec: RowSpec | None, prompt: Sequence[int], output: Sequence[int]) -> None:
        """vLLM gives a request a row: a new one, or one that has been preempted, with all of its tokens."""
        if spec is None:
            return
        row = self._rows.get(id)
        processor = None
        if spec.processor:  # one that has been preempted goes on with the state of its processor
            processor = self._agent.processor(spec.processor) if row is None else row.processor
        sampling = spec.sampling if self._first else replace(spec.sampling, logprobs=None)
        self._rows[id] = RankRow(replace(spec, sampling=sampling), processor, prompt, output)

    def sample(self, logits: torch.Tensor, request_ids: Sequence[str], rows: Sequence[int]) -> None:
        try:
            self._sampler.sample(logits, request_ids, rows, self._sampled)
        except Exception as error:
            log.exception("sampling failed")
            self._sampler.errors |= dict.fromkeys(request_ids, error)

    def end_step(self, ids: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
        """vLLM has taken the step's tokens, one or none for each request. Fills the extras."""
        taken = {id: of_id[0] for id, of_id in zip(ids, tokens, strict=True) if of_id}
        self._sampler.finish(taken)
        for id, token in taken.items():
            if error := self._sampler.error(id, token):
                self._extras.errors[id] = portable(error)
        if self._first:
            self._extras.details |= self._sampler.details
        self._sampler.clear()

    def _sampled(self, id: str) -> Any:
        return None if id in self._step.unsampled else self._rows[id]
