"""Describe how a decoder is made: its sizes and methods, as data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from overfill.errors import InvalidRequest
from overfill.kv.spec import Quantization
from overfill.model.config import ModelConfig

Size = int | float
"""An int is an exact size; a float is a share of the full model's size."""

Method = Literal["channel", "rotate"]
Fit = Literal["none", "least-squares"]

KeptLayers = Literal["first", "last", "firstlast"]
"""``depth_prune_strategy`` of OverFill's authors: which layers of the full model a depth-pruned decoder has kept."""

MULTIPLE = 64
"""A size given as a share is rounded to a multiple of this number: matrix products are fastest at such sizes."""


@dataclass(frozen=True, slots=True)
class DecoderRecipe:
    """Sizes of a decoder and the methods that make it from its full model.

    Args:
        hidden_size: Width of the residual stream: exact as an int; a share of the full model's as a float.
        intermediate_size: Width of the MLPs, likewise.
        layers: Number of layers, likewise.
        method: How the residual stream is narrowed: its largest channels stay, or its leading directions.
        fit: ``none`` keeps the sliced weights; ``least-squares`` fits them to the full model.
        quantize: Form of the decoder's weights in memory. The checkpoint is never quantised.
        tokens: Answer tokens of calibration text for the fit. More take longer and fit better.
        head_tokens: Number of tokens, the most frequent first, whose rows in the head stay whole. The other rows share
            a matrix of rank ``tail_rank`` (``overfill.model.head``). 1.0 keeps all rows whole.
        tail_rank: Rank of the matrix of the other rows.
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

    def check(self, full: Path) -> dict[str, int]:
        """Checks the sizes against a full model, and returns them as numbers.

        Args:
            full: Folder of its checkpoint.

        Raises:
            InvalidRequest: a size does not fit.
            InvalidPair, UnsupportedModel: as ``ModelConfig.load``.
        """
        return self.sizes(ModelConfig.load(full))

    def sizes(self, full: ModelConfig) -> dict[str, int]:
        """Returns all sizes as numbers; ``tail_rank`` is 0 when all rows of the head stay whole.

        Args:
            full: Geometry of the full model.

        Raises:
            InvalidRequest: a size does not fit.
        """
        sizes = {
            "hidden_size": resolve_size("hidden_size", self.hidden_size, full.hidden_size),
            "intermediate_size": resolve_size("intermediate_size", self.intermediate_size, full.intermediate_size),
            "layers": resolve_size("layers", self.layers, full.num_layers, multiple=1),
            "head_tokens": resolve_size("head_tokens", self.head_tokens, full.vocab_size),
            "tail_rank": self.tail_rank,
        }
        if sizes["head_tokens"] == full.vocab_size:
            return sizes | {"tail_rank": 0}
        maximum = sizes["hidden_size"] - 1
        if not 1 <= self.tail_rank <= maximum:
            raise InvalidRequest("tail_rank", f"must be in 1..{maximum} at this hidden size; got {self.tail_rank}")
        return sizes

    def as_json(self, **more: Any) -> dict[str, Any]:
        """Returns the methods as ``pair.json`` records them, with ``more`` added."""
        return {"method": self.method, "fit": self.fit, "quantize": self.quantize, **more}


def resolve_size(name: str, size: Size, full: int, multiple: int = MULTIPLE) -> int:
    """Converts ``size`` to a number; ``full`` is the full model's size.

    Raises:
        InvalidRequest: ``size`` is not in the range from 1 to ``full``.
    """
    if isinstance(size, float):
        if not 0 < size <= 1:
            raise InvalidRequest(name, f"{size} is not a share of the full model's {full}; give a share in (0, 1]")
        size = full if size == 1 else min(full, max(multiple, round(size * full / multiple) * multiple))
    if not 1 <= size <= full:
        raise InvalidRequest(name, f"must be in 1..{full} (the full model has {full}); got {size}")
    return size


def slow_sizes(hidden_size: int, intermediate_size: int) -> str:
    """Says which widths GPUs multiply slowly, for a warning; empty if there are none."""
    sizes = {"hidden size": hidden_size, "MLP size": intermediate_size}
    slow = [f"{name} {size:,}" for name, size in sizes.items() if size % 8]  # cuBLAS wants rows of 16 bytes
    return (
        f"{' and '.join(slow)}: GPUs multiply slowly unless a size is a multiple of 8; those of {MULTIPLE} are best"
        if slow
        else ""
    )


def kept_layers(strategy: KeptLayers, full_layers: int, layers: int) -> tuple[int, ...]:
    """Returns the full model's layers that ``strategy`` keeps (``get_kept_layers_prune`` in the authors' code).

    ``first`` and ``last`` keep layers at one end. ``firstlast`` keeps layer 0 and the last ``layers - 1`` layers.
    """
    if strategy == "first":
        return tuple(range(layers))
    if strategy == "last":
        return tuple(range(full_layers - layers, full_layers))
    return (0, *range(full_layers - layers + 1, full_layers))
