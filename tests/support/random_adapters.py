"""Adapters with random weights that change nearly every token of a small model."""

from __future__ import annotations

from collections.abc import Sequence

from overfill.making.tiny import random_products
from overfill.model.adapter import AdapterRecord, LoraAdapter, LowRank, Projection
from overfill.model.config import ModelConfig


def random_adapter(
    config: ModelConfig, seed: int, rank: int = 4, only: Sequence[Projection] = (), scale: float = 1.0
) -> LoraAdapter:
    """An adapter with products for the projections in ``only``, by default all, in every layer."""
    products = {
        key: LowRank(product.down, scale * product.up)
        for key, product in random_products(config, seed, rank).items()
        if not only or key[1] in only
    }
    return LoraAdapter(AdapterRecord(f"task-{seed}", f"{seed:064x}", "", rank), products)
