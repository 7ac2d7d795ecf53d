"""Runs the steps of a mock engine: it waits, writes KV that names its prompt, and takes tokens from the players."""

from __future__ import annotations

import time
from collections.abc import Sequence

from overfill.engine.mock.adapters import MockAdapterSlots
from overfill.engine.mock.options import MockOptions
from overfill.engine.mock.script import Player
from overfill.engine.mock.store import MockKvStore
from overfill.engine.sequence import DecodeSequence
from overfill.engine.work import Sampled, Work
from overfill.errors import InternalError
from overfill.model.manifest import Half
from overfill.model.steps import NO_HOOKS, LayerHooks, SampledToken

_LEAST_STEP = 1e-3
"""Minimum seconds of a decode step. With less, steps of few sequences would take the event loop's time."""


class MockRunner:
    """A ``Runner`` without a model. Of a decoder, it checks that the KV of each sequence is that of its prompt."""

    device = None
    max_scored = 0  # there are no logits
    mixes_lengths = True

    def __init__(
        self, half: Half, cache: MockKvStore, options: MockOptions, adapters: MockAdapterSlots | None = None
    ) -> None:
        self.cache = cache
        self.token_layer_bytes = cache.spec.token_layer_bytes
        self._half = half
        self._options = options
        self._adapters = adapters

    def step_seconds(self, sequences: int) -> float:
        """Seconds of a decode step, which its engine waits."""
        return max(_LEAST_STEP, self._options.step + self._options.per_sequence * sequences)

    def next_tokens(
        self, works: Sequence[Work], sequences: Sequence[Sampled], hooks: LayerHooks = NO_HOOKS
    ) -> tuple[list[SampledToken], dict[int, Exception]]:
        """Takes the token after each work that wants one from its player. A step of prompts waits before."""
        failed: dict[int, Exception] = {}
        if self._half == "full":
            self._prefill(works, hooks)
        sampled = []
        for row, sequence in enumerate(sequences):
            player = sequence.processor
            assert isinstance(player, Player)
            try:
                if isinstance(sequence, DecodeSequence):
                    self._check_prompt(works[row], sequence)
                    if sequence.adapter is not None and self._adapters is not None:
                        player.mark = self._adapters.marks[sequence.adapter]
                sampled.append(player.next(sequence.emitted, sequence.sample_index))
            except Exception as error:
                failed[row] = error
                sampled.append(SampledToken(0))
        return sampled, failed

    def copy_kv(
        self,
        source: MockRunner,
        source_blocks: Sequence[int],
        blocks: Sequence[int],
        layer_map: Sequence[int],
        num_tokens: int,
        start: int,
    ) -> None:
        """Copies a sequence's KV; see ``Runner``."""
        taken = source.cache.slots(source_blocks, start, num_tokens)
        slots = self.cache.slots(blocks, start, num_tokens)
        self.cache.k[slots], self.cache.v[slots] = source.cache.k[taken], source.cache.v[taken]

    def synchronize(self) -> None:
        """Does nothing: a step has ended when ``next_tokens`` returns."""

    def clean_up(self, error: Exception) -> None:
        """Does nothing: a failed step leaves nothing behind."""

    def _prefill(self, works: Sequence[Work], hooks: LayerHooks) -> None:
        """Writes the prompts' KV, and waits for their tokens, in each layer for the same time."""
        for work in works:
            self.cache.put(work.blocks, work.tokens, work.start)
        num_layers, began = self.cache.spec.num_layers, time.monotonic()
        seconds = self._options.base + self._options.per_token * sum(len(work.tokens) for work in works)
        for layer in range(num_layers):
            hooks.layer_start(layer)
            time.sleep(max(0.0, began + seconds * (layer + 1) / num_layers - time.monotonic()))
            hooks.kv_written(layer)

    def _check_prompt(self, work: Work, sequence: DecodeSequence) -> None:
        """Raises InternalError in a sequence's first step if its blocks hold other KV than its shared prompt's."""
        shared = sequence.num_shared
        if work.start == shared and not self.cache.holds(work.blocks, sequence.prompt[:shared]):
            raise InternalError(f"the KV in the sequence's blocks is not that of its {shared} prompt tokens")
