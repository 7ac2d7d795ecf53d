"""Peers made of Hugging Face transformers alone: its ``generate``, and a plain two-stage loop.

Both run the pair's weights in the dtype of the run, with SDPA attention and transformers' caches.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from overfill.lab.bench.engine.overfill_engine import random_prompt
from overfill.model.manifest import Pair
from overfill.pair.hf_model import load_hf_model


class TransformersGenerate:
    """The full model's ``generate``, greedy."""

    def __init__(self, full: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.name = "transformers"
        self._model = _load(full, dtype, device)
        self._device = device
        # The checkpoint's own configuration would stop at an end-of-sequence token.
        self._config = GenerationConfig(do_sample=False, use_cache=True)
        self._cache: Any = None
        self._ids = torch.empty(0, 0, dtype=torch.int64)

    @torch.inference_mode()
    def begin(self, batch: int, prompt_tokens: int, steps: int) -> None:
        prompt = _prompts(self._model, [prompt_tokens], self._device)
        cache, logits = read_prompt(self._model, prompt)
        cache.batch_repeat_interleave(batch)
        first = logits.argmax(-1, keepdim=True)
        self._ids = torch.cat([prompt, first], dim=1).repeat(batch, 1)
        self._cache = cache

    @torch.inference_mode()
    def steps(self, count: int) -> list[float]:
        clock = _Clock()
        self._ids = self._generate(self._ids, count, self._cache, clock)
        return clock.seconds

    def end(self) -> None:
        self._cache = None

    @torch.inference_mode()
    def prefill(self, lengths: Sequence[int]) -> float:
        # Only equal lengths: generate would pad shorter prompts, and compute more tokens than the other engines do.
        (length,) = set(lengths)
        ids = _prompts(self._model, [length] * len(lengths), self._device)
        start = time.perf_counter()
        self._generate(ids, 1, None, _Clock())
        return time.perf_counter() - start

    def close(self) -> None:
        del self._model

    def _generate(self, ids: torch.Tensor, count: int, cache: Any, clock: _Clock) -> torch.Tensor:
        config = copy.copy(self._config)
        config.max_new_tokens = count
        given = {} if cache is None else {_cache_name(self._model): cache}
        output: torch.Tensor = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([clock]),
            **given,
        )
        return output


class _Clock(StoppingCriteria):
    """Records the seconds of every token, and never stops."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize(input_ids.device)
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class ReferenceLoop:
    """The full model fills a ``DynamicCache``; the decoder continues from it with one forward pass per token."""

    def __init__(self, pair: Pair, dtype: torch.dtype, device: torch.device) -> None:
        self.name = "reference"
        self._device = device
        self._layer_map = pair.layer_map
        self._full = _load(pair.full_path, dtype, device)
        same = pair.decoder_path == pair.full_path
        self._decoder = self._full if same else _load(pair.decoder_path, dtype, device)
        self._cache: Any = None
        self._tokens = torch.empty(0, 1, dtype=torch.int64)

    @torch.inference_mode()
    def begin(self, batch: int, prompt_tokens: int, steps: int) -> None:
        self._cache, logits = self._read([prompt_tokens])
        self._cache.batch_repeat_interleave(batch)
        self._tokens = logits.argmax(-1, keepdim=True).repeat(batch, 1)

    @torch.inference_mode()
    def steps(self, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            logits = _forward(self._decoder, self._tokens, self._cache)
            self._tokens = logits.argmax(-1, keepdim=True)
            self._tokens.tolist()  # copies the ids to the host, as a server must
            seconds.append(time.perf_counter() - start)
        return seconds

    def end(self) -> None:
        self._cache = None

    @torch.inference_mode()
    def prefill(self, lengths: Sequence[int]) -> float:
        start = time.perf_counter()
        for length in lengths:  # this loop reads one prompt at a time
            _, logits = self._read([length])
            logits.argmax(-1).tolist()
        return time.perf_counter() - start

    def close(self) -> None:
        del self._full, self._decoder

    def _read(self, lengths: Sequence[int]) -> tuple[Any, torch.Tensor]:
        """Prefills prompts. Returns a cache for the decoder, and the full model's logits after each prompt."""
        full_cache, logits = read_prompt(self._full, _prompts(self._full, lengths, self._device))
        cache = DynamicCache(config=self._decoder.config)
        for layer, source in enumerate(self._layer_map):
            cache.update(full_cache.layers[source].keys, full_cache.layers[source].values, layer)
        return cache, logits


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    model: Any = load_hf_model(folder)
    return model.to(device=device, dtype=dtype)


def read_prompt(model: Any, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Prefills ``ids`` [prompts, tokens]. Returns the cache, and the logits after each prompt [prompts, vocab]."""
    cache = DynamicCache(config=model.config)
    return cache, _forward(model, ids, cache)


def _forward(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    given = {_cache_name(model): cache}
    logits: torch.Tensor = model(input_ids=ids, use_cache=True, logits_to_keep=1, **given).logits[:, -1]
    return logits


def _cache_name(model: Any) -> str:
    """Name of the cache argument of ``forward``, which was renamed within transformers 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _prompts(model: Any, lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    rows = [random_prompt(model.config.vocab_size, length, seed) for seed, length in enumerate(lengths)]
    return torch.tensor(rows, device=device)
