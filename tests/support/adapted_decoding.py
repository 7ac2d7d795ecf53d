"""Adapters for tests of engines, and what an engine should answer with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from engine_drivers import DecodeDriver, Decoding
from sampled_reference import ReferenceAnswer, Request, SampledReference, assert_same_tokens
from transformers.cache_utils import DynamicCache

from overfill.engine.sequence import AdapterChanged, ChangeAdapter, Reserve, StopRule
from overfill.model.adapter import LoraAdapter
from overfill.model.processors import new_processor, process
from overfill.model.sampling import sample
from overfill.pair.reference import _forward


@dataclass(frozen=True)
class AdaptedRequest(Request):
    """A request whose prompt the decoder computes from ``answer_start`` on, with the adapter of ``slot``."""

    answer_start: int | None = None
    slot: int | None = None


class AdaptedDriver(DecodeDriver):
    """A servicer that also changes adapters.

    Attributes:
        adapters: those in use, by slot.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.adapters: dict[int, LoraAdapter] = {}
        self.changed: list[AdapterChanged] = []

    def submit(self, request: Request, *, hold: bool = False) -> Decoding:
        if not isinstance(request, AdaptedRequest) or request.answer_start is None:
            return super().submit(request, hold=hold)
        sequence = self.new_sequence(request, answer_start=request.answer_start, adapter=request.slot)
        # The KV travels up to answer_start.
        shared = replace(request, prompt=request.prompt[: request.answer_start])
        decoding = self.sequences[sequence.id] = Decoding(shared, sequence, None, hold)
        self.core.handle(Reserve(sequence))
        return decoding

    def change(self, slot: int, adapter: LoraAdapter | None) -> AdapterChanged:
        """Stages ``adapter`` and puts it into the slot."""
        assert self.served.adapters is not None
        if adapter is not None:
            self.served.adapters.stage(slot, adapter)
        self.core.handle(ChangeAdapter(slot, adapter))
        self.until(lambda: self.changed)
        changed = self.changed.pop()
        assert changed.slot == slot
        if changed.error is None:
            self.adapters.pop(slot, None)
            if adapter is not None:
                self.adapters[slot] = adapter
        return changed

    def _emit(self, events: list[Any]) -> None:
        self.changed += [event for event in events if isinstance(event, AdapterChanged)]
        super()._emit([event for event in events if not isinstance(event, AdapterChanged)])


@torch.inference_mode()
def expected(reference: SampledReference, request: AdaptedRequest, adapter: LoraAdapter | None) -> ReferenceAnswer:
    """The answer of plain transformers: the full model reads the shared prompt, the adapted decoder the rest."""
    sampling, prompt, start = request.sampling, list(request.prompt), request.answer_start
    assert start is not None
    full: Any = DynamicCache(config=reference._full.config)
    _forward(reference._full, prompt[:start], 0, full)
    cache: Any = DynamicCache(config=reference._decoder.config)
    for layer, source in enumerate(reference.pair.layer_map):
        cache.update(full.layers[source].keys, full.layers[source].values, layer)
    known = list(request.emitted)
    processor = new_processor(sampling, prompt, reference._grammars, reference.eos_ids)
    stop = StopRule.of(sampling, reference.eos_ids, reference.pair.full_config.max_positions - len(prompt))
    tokens = []
    with _merged(reference._decoder, adapter):
        logits = _forward(reference._decoder, prompt[start:] + known, start, cache)
        while True:
            position = len(prompt) + len(known)
            row = logits[-1:].clone()
            assert not process(row, [processor], [known])
            (token,), lost = sample(row, [sampling], [position], [request.sample_index])
            assert not lost
            emitted, finish = stop.judge(token.token_id, len(known))
            if emitted:
                tokens.append(token)
            if finish is not None:
                return ReferenceAnswer(tokens, finish)
            known.append(token.token_id)
            logits = _forward(reference._decoder, [token.token_id], position, cache)


def assert_adapted(driver: AdaptedDriver, request: AdaptedRequest, decoding: Decoding, adapter: Any = None) -> None:
    """Compares an answer with that of transformers, with the adapter that the slot has now or with ``adapter``."""
    assert decoding.error is None, decoding.error
    if adapter is None and request.slot is not None:
        adapter = driver.adapters[request.slot]
    answer = expected(driver.reference, request, adapter)
    assert_same_tokens(decoding.tokens, answer.tokens)
    assert decoding.finish is answer.finish


@contextmanager
def _merged(model: Any, adapter: LoraAdapter | None) -> Iterator[None]:
    """Adds an adapter's products to the weights of ``model`` for a while."""
    changed = []
    for (layer, projection), product in (adapter.products if adapter else {}).items():
        block = model.model.layers[layer]
        weight = getattr(block.self_attn if hasattr(block.self_attn, projection) else block.mlp, projection).weight
        changed.append((weight, weight.detach().clone()))
        weight.add_(product.up @ product.down)
    try:
        yield
    finally:
        for weight, before in changed:
            weight.copy_(before)
