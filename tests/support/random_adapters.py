"""Adapters with random weights, large enough to change a small model's answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from overfill.model.adapter import AdapterRecord, LoraAdapter, LowRank, Projection, projection_shapes
from overfill.model.config import ModelConfig


def random_adapter(
    config: ModelConfig, rank: int, seed: int, projections: Sequence[Projection] | None = None, scale: float = 0.15
) -> LoraAdapter:
    """An adapter with products for ``projections``, by default all, in every layer."""
    generator = torch.Generator().manual_seed(seed)

    def factor(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * scale

    products = {
        (layer, projection): LowRank(factor(rank, columns), factor(rows, rank))
        for layer in range(config.num_layers)
        for projection, (rows, columns) in projection_shapes(config).items()
        if projections is None or projection in projections
    }
    record = AdapterRecord(f"task-{seed}", f"{seed:064x}", "0" * 64, rank)
    return LoraAdapter(record, products)
