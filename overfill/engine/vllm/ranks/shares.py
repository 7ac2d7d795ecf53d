"""Which KV heads each rank of a tensor-parallel group has."""

from __future__ import annotations


def head_share(num_kv_heads: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Half-open range of the KV heads that ``rank`` holds, as vLLM deals them out.

    With more ranks than KV heads, neighbouring ranks hold the same head.
    """
    if num_ranks > num_kv_heads:
        head = rank // (num_ranks // num_kv_heads)
        return head, head + 1
    count = num_kv_heads // num_ranks
    return rank * count, (rank + 1) * count
