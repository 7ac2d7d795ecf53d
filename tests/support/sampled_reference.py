"""A two-stage reference that samples: logits of plain transformers, processors and draws of ``overfill.model``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers.cache_utils import DynamicCache

from overfill.engine.sequence import FinishReason, StopRule
from overfill.making.pair_json import write_manifest
from overfill.making.tiny import make_tiny_pair
from overfill.model.processors import new_processor, process
from overfill.model.sampling import sample
from overfill.model.steps import SampledToken
from overfill.pair.reference import TwoStageReference, _forward
from overfill.request.grammar import Grammars
from overfill.request.params import SamplingParams

_SHAPE = {"num_layers": 3, "head_dim": 32, "vocab_size": 288, "max_positions": 1024}


def make_conformance_pair(folder: Path, *, drop_layers: bool = False, one_model: bool = False) -> Path:
    """Writes a tiny pair of a geometry that every engine runs, and returns its folder.

    Args:
        drop_layers: True gives the decoder two layers, which read the full model's layers 0 and 2.
        one_model: True makes the full model the decoder.
    """
    make_tiny_pair(folder, **_SHAPE)
    if drop_layers:
        shallow = make_tiny_pair(folder / "shallow", **{**_SHAPE, "num_layers": 2}, seed=1)
        shutil.rmtree(folder / "decoder")
        shutil.move(shallow / "decoder", folder / "decoder")
        shutil.rmtree(shallow)
        write_manifest(folder, layer_map=[0, 2])
    if one_model:
        write_manifest(folder, decoder="full")
    return folder


@dataclass(frozen=True)
class Request:
    """A request as both the engine under test and the reference get it; ``sampling`` has ``max_tokens``."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    emitted: tuple[int, ...] = ()
    sample_index: int = 0


@dataclass(frozen=True)
class ReferenceAnswer:
    """The tokens that follow ``Request.emitted``, and why the answer ends."""

    tokens: list[SampledToken]
    finish: FinishReason

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


class SampledReference(TwoStageReference):
    """The two-stage reference of a pair, for any sampling parameters."""

    def __init__(self, pair_folder: Path) -> None:
        super().__init__(pair_folder)
        config = self.pair.full_config
        self.eos_ids = config.eos_token_ids
        self._grammars = Grammars(self.pair.full_path / "tokenizer.json", config.vocab_size, self.eos_ids)
        self.kv = cache(self._kv)

    @torch.inference_mode()
    def _kv(self, prompt: tuple[int, ...]) -> torch.Tensor:
        """The full model's KV of ``prompt``, as it travels. [2, layers, tokens, kv_heads, head_dim]"""
        full_cache = DynamicCache(config=self._full.config)
        _forward(self._full, list(prompt), 0, full_cache)
        halves = ([layer.keys for layer in full_cache.layers], [layer.values for layer in full_cache.layers])
        # Transformers stores a layer as [1, kv_heads, tokens, head_dim].
        return torch.stack([torch.cat(half).transpose(1, 2) for half in halves]).contiguous()

    def first(self, request: Request) -> SampledToken:
        """The full model's token after the prompt, whether or not it ends the answer."""
        return self._answer(request, only_first=True)[0][0]

    def answer(self, request: Request) -> ReferenceAnswer:
        """The answer. A stop token that ends it is not among its tokens."""
        tokens, finish = self._answer(request)
        assert finish is not None
        return ReferenceAnswer(tokens, finish)

    @torch.inference_mode()
    def _answer(self, request: Request, only_first: bool = False) -> tuple[list[SampledToken], FinishReason | None]:
        sampling, prompt = request.sampling, request.prompt
        processor = new_processor(sampling, prompt, self._grammars, self.eos_ids)
        stop = StopRule.of(sampling, self.eos_ids, self.pair.full_config.max_positions - len(prompt))
        decoder_cache, logits = self._prefill(prompt)
        known = list(request.emitted)
        if known:
            logits = _forward(self._decoder, known, len(prompt), decoder_cache)
        tokens: list[SampledToken] = []
        while True:
            position = len(prompt) + len(known)
            row = logits[-1:].clone()
            failed = process(row, [processor], [known])
            (token,), lost = sample(row, [sampling], [position], [request.sample_index])
            assert not failed | lost
            emitted, finish = stop.judge(token.token_id, len(known))
            if emitted or only_first:
                tokens.append(token)
            if finish is not None or only_first:
                return tokens, finish
            known.append(token.token_id)
            logits = _forward(self._decoder, [token.token_id], position, decoder_cache)


def assert_same_tokens(found: Sequence[SampledToken], expected: Sequence[SampledToken]) -> None:
    """Compares ids exactly and log-probabilities within 1e-4."""
    assert [token.token_id for token in found] == [token.token_id for token in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.logprob is None) == (theirs.logprob is None)
        assert (ours.top is None) == (theirs.top is None)
        if ours.logprob is not None:
            assert abs(ours.logprob - theirs.logprob) < 1e-4
        if ours.top is not None:
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
            assert all(abs(a - b) < 1e-4 for (_, a), (_, b) in zip(ours.top, theirs.top, strict=True))
