"""LoRA adapters of a decoder (arXiv 2106.09685): low-rank products that are added to its projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """What is known of an adapter without its weights.

    Attributes:
        name: unique among the adapters and tiers of a stack.
        digest: lower-case hexadecimal SHA-256 that identifies weights and config.
        decoder_digest: digest of the decoder on which it works.
        rank: largest rank of its products.
        tail_tokens: number of tokens at the prompt's end that the decoder computes; 0 means the generation prompt.
        own_prefill: whether it was trained with its own prefill instead of the full model's KV.
    """

    name: str
    digest: str
    decoder_digest: str
    rank: int
    tail_tokens: int = 0
    own_prefill: bool = False


@dataclass(frozen=True, slots=True)
class LowRank:
    """One product: the projection's output gains ``up @ (down @ x)``.

    Attributes:
        down: [rank, in], on the CPU.
        up: [out, rank], multiplied by the adapter's scale, alpha ÷ rank.
    """

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter's weights, by layer of the decoder and projection. Projections without a product are left out."""

    record: AdapterRecord
    products: Mapping[tuple[int, Projection], LowRank]
