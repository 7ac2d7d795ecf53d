"""What the mock engine answers and which KV it makes, without the engine: for the suite of ``engine_conformance``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sampled_reference import ReferenceAnswer, Request

from overfill.api.tokenizer import Tokenizer
from overfill.engine.sequence import FinishReason, StopRule
from overfill.model.manifest import Pair
from overfill.model.steps import SampledToken


class MockReference:
    """The answers of a mock engine whose ``answer`` is ``text`` and never ends by itself."""

    def __init__(self, pair_folder: Path, text: str) -> None:
        self.pair = Pair.load(pair_folder)
        self.eos_ids = self.pair.full_config.eos_token_ids
        self._ids = Tokenizer.load(self.pair.full_path).encode_continuation(text)

    def kv(self, prompt: tuple[int, ...]) -> torch.Tensor:
        """The KV of ``prompt``, as it travels. [2, layers, tokens, kv_heads, head_dim]"""
        kv = self.pair.full_config.kv_spec("float32")
        halves = np.array([prompt, range(len(prompt))], np.uint32).view(np.float32).reshape(2, 1, -1, 1, 1)
        shape = (2, kv.num_layers, len(prompt), kv.num_kv_heads, kv.head_dim)
        return torch.from_numpy(np.broadcast_to(halves, shape).copy())

    def first(self, request: Request) -> SampledToken:
        return self._token(request, 0)

    def answer(self, request: Request) -> ReferenceAnswer:
        stop = StopRule.of(request.sampling, self.eos_ids, self.pair.full_config.max_positions - len(request.prompt))
        tokens: list[SampledToken] = []
        finish: FinishReason | None = None
        while finish is None:
            place = len(request.emitted) + len(tokens)
            token = self._token(request, place)
            emitted, finish = stop.judge(token.token_id, place)
            tokens += [token] if emitted else []
        return ReferenceAnswer(tokens, finish)

    def _token(self, request: Request, place: int) -> SampledToken:
        begin = 0 if request.sampling.greedy else request.sampling.seed or 0
        return SampledToken(self._ids[(begin + request.sample_index + place) % len(self._ids)])
