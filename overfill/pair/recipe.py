"""How a decoder is made: sizes and methods, as data. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from overfill.errors import InvalidRequest
from overfill.model.config import ModelConfig, Quantization

Size = int | float
"""A number, or a share of the full model's."""

Method = Literal["channel", "rotate"]
Fit = Literal["none", "least-squares"]

MULTIPLE = 64
"""Shares are rounded to a multiple of this, which matrix products run fastest on."""


@dataclass(frozen=True, slots=True)
class DecoderRecipe:
    """What a decoder keeps of its full model, and how it is made to fit.

    Args:
        hidden_size, intermediate_size, layers: exact as an int; a share as a float.
        method: how the residual stream is made narrower.
        fit: ``none`` leaves the sliced weights as they are.
        quantize: how the decoder's weights are held once they are loaded; the checkpoint is never quantised.
        tokens: answer tokens of calibration text that are used; more take longer and fit better.
        head_tokens: so many tokens, the most frequent in the calibration text, keep rows of their own in the head; the
            other rows become a matrix of rank ``tail_rank`` (``overfill.model.head``). All of them, and there is no
            tail.
    """

    hidden_size: Size = 1.0
    intermediate_size: Size = 1.0
    layers: Size = 1.0
    method: Method = "rotate"
    fit: Fit = "least-squares"
    quantize: Quantization = "none"
    tokens: int = 32_768
    head_tokens: Size = 1.0
    tail_rank: int = 96

    def check(self, full: Path) -> None:
        """Raises InvalidRequest when a size does not fit the checkpoint in ``full``, before anything long starts.

        Also InvalidPair and UnsupportedModel, as ``ModelConfig.load``.
        """
        self.sizes(ModelConfig.load(full))

    def sizes(self, full: ModelConfig) -> dict[str, int]:
        """All sizes as numbers; without a tail its rank is 0. Raises InvalidRequest."""
        sizes = {
            "hidden_size": resolve_size("hidden_size", self.hidden_size, full.hidden_size),
            "intermediate_size": resolve_size("intermediate_size", self.intermediate_size, full.intermediate_size),
            "layers": resolve_size("layers", self.layers, full.num_layers, multiple=1),
            "head_tokens": resolve_size("head_tokens", self.head_tokens, full.vocab_size),
            "tail_rank": self.tail_rank,
        }
        if sizes["head_tokens"] == full.vocab_size:
            return sizes | {"tail_rank": 0}
        most = sizes["hidden_size"] - 1
        if not 1 <= self.tail_rank <= most:
            raise InvalidRequest("tail_rank", f"must be in 1..{most} at this hidden size; got {self.tail_rank}")
        return sizes

    def as_json(self, **more: Any) -> dict[str, Any]:
        """What ``pair.json`` records; ``more`` goes with it."""
        return {"method": self.method, "fit": self.fit, "quantize": self.quantize, **more}


def resolve_size(name: str, size: Size, full: int, multiple: int = MULTIPLE) -> int:
    """``size`` as a number where the full model has ``full``.

    Raises:
        InvalidRequest: it does not fit.
    """
    if isinstance(size, float):
        if not 0 < size <= 1:
            raise InvalidRequest(name, f"{size} is no share of the full model's {full}; give more than 0 and at most 1")
        size = full if size == 1 else min(full, max(multiple, round(size * full / multiple) * multiple))
    if not 1 <= size <= full:
        raise InvalidRequest(name, f"must be in 1..{full}, which is what the full model has; got {size}")
    return size
