"""The paged KV cache: two tensors, addressed by slot.

Token ``t`` of a sequence with block table ``table`` lives in slot
``table[t // block_size] * block_size + t % block_size``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from overfill.kv.spec import KvSpec

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class KvCache:
    """Keys and values of all blocks.

    Attributes:
        k, v: [num_layers, num_blocks, block_size, num_kv_heads, head_dim], ``spec.dtype``. Keys are post-RoPE.
    """

    def __init__(self, spec: KvSpec, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (spec.num_layers, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        self.k = torch.zeros(shape, dtype=TORCH_DTYPES[spec.dtype], device=device)
        self.v = torch.zeros_like(self.k)

    @property
    def block_bytes(self) -> int:
        return self.spec.token_bytes * self.block_size

    def slots(self, block_table: Sequence[int], start: int, end: int) -> torch.Tensor:
        """Slots of tokens ``start..end`` of a sequence. [end - start], int64, on the cache's device."""
        table = torch.tensor(block_table, dtype=torch.int64)
        positions = torch.arange(start, end, dtype=torch.int64)
        slots = table[positions // self.block_size] * self.block_size + positions % self.block_size
        return slots.to(self.k.device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each [num_slots, num_kv_heads, head_dim], as views."""
        shape = (self.num_blocks * self.block_size, self.spec.num_kv_heads, self.spec.head_dim)
        return self.k[index].view(shape), self.v[index].view(shape)
