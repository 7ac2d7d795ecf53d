"""Which KV heads each rank has."""

from __future__ import annotations

import pytest

from overfill.engine.vllm.ranks.shares import head_share


@pytest.mark.parametrize(
    ("heads", "ranks", "shares"),
    [
        (8, 2, [(0, 4), (4, 8)]),
        (4, 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (1, 2, [(0, 1), (0, 1)]),
    ],
)
def test_heads_are_dealt_out_in_order_and_replicated_where_ranks_are_more(
    heads: int, ranks: int, shares: list[tuple[int, int]]
) -> None:
    assert [head_share(heads, rank, ranks) for rank in range(ranks)] == shares
