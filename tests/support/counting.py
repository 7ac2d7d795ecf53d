"""A runner without a model, for tests of the engines' scheduling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from overfill.engine.runner import sample_next
from overfill.engine.work import Sampled, Work
from overfill.model.steps import NO_HOOKS, LayerHooks, SampledToken

VOCAB_SIZE = 64


class CountingRunner:
    """Stands in for ``ModelRunner``: the next token is always the last one plus 1, modulo ``VOCAB_SIZE``.

    Attributes:
        steps: new tokens and the position of the first of them, by step and sequence.
        fail_next: error that the next step raises, once.
        on_layer: called in each layer.
        spoilt: rows of logits that hold one number, by their index in each step.
        max_scored, mixes_lengths: as of every runner.
    """

    max_scored = 6
    mixes_lengths = False

    def __init__(self, num_layers: int = 2, block_size: int = 4) -> None:
        self.device = torch.device("cpu")
        self.token_layer_bytes = 64
        self.steps: list[list[tuple[list[int], int]]] = []
        self.fail_next: Exception | None = None
        self.on_layer: Callable[[int], object] = lambda layer: None
        self.spoilt: dict[int, float] = {}
        self._num_layers = num_layers
        self._block_size = block_size

    def synchronize(self) -> None:
        """Does nothing, because ``run`` has finished when it returns."""

    def clean_up(self, error: Exception) -> None:
        """Does nothing, because a failed step leaves nothing behind."""

    def next_tokens(
        self, works: Sequence[Work], sequences: Sequence[Sampled], hooks: LayerHooks = NO_HOOKS
    ) -> tuple[list[SampledToken], dict[int, Exception]]:
        """Runs one step and samples from its logits; takes and returns the same as ``ModelRunner.next_tokens``."""
        return sample_next(self.run(works, hooks), works, sequences)

    def run(self, works: Sequence[Work], hooks: LayerHooks = NO_HOOKS) -> torch.Tensor:
        """Runs one step; returns logits as ``ModelRunner.run`` does, [N, VOCAB_SIZE]."""
        self.steps.append([(list(work.tokens), work.start) for work in works])
        for work in works:
            if work.end > len(work.blocks) * self._block_size:
                raise AssertionError(f"{work} computes past its blocks")
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        for layer in range(self._num_layers):
            hooks.layer_start(layer)
            self.on_layer(layer)
            hooks.kv_written(layer)
        read = []
        for work in works:
            end = len(work.tokens) - work.wants_logits
            read += [*work.tokens[end - work.num_scored : end], *work.tokens[end:]]
        logits = torch.zeros(len(read), VOCAB_SIZE)
        for row, token in enumerate(read):
            logits[row, (token + 1) % VOCAB_SIZE] = 10.0
        for row, number in self.spoilt.items():
            logits[row] = number
        return logits
