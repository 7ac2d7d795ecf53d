"""What a step calls while it runs, and what it returns for each sequence. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LayerHook = Callable[[int], None]


def _ignore(layer: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class LayerHooks:
    """Functions that a forward pass calls with each layer's index. A function that raises aborts the step.

    Attributes:
        layer_start: called before a layer.
        kv_written: called before a layer's attention, once the new keys and values are in the cache (on CUDA: once
            their writes are queued on the current stream).
    """

    layer_start: LayerHook = _ignore
    kv_written: LayerHook = _ignore


NO_HOOKS = LayerHooks()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A sampled token.

    Attributes:
        token_id: Id of the token.
        logprob: Natural-log probability under softmax(logits), before temperature and filters. None if not requested.
        top: (token id, logprob) of the most likely tokens, best first. None if not requested.
    """

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
