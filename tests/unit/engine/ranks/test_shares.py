"""Which share of a model each rank has, and what ranks cannot divide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from overfill.engine.vllm.ranks.shares import check_shares, head_share
from overfill.errors import InvalidRequest
from overfill.model.manifest import Pair


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


@pytest.mark.parametrize(
    ("shape", "ranks", "words"),
    [
        ({"num_heads": 9, "num_kv_heads": 3}, 2, "2 does not divide the decoder's 9 attention heads"),
        ({"intermediate_size": 2331}, 2, "2 does not divide the decoder's 2331 neurons of each MLP"),
        ({"num_heads": 12, "num_kv_heads": 3}, 2, "2 neither divides the decoder's 3 KV heads nor is a multiple"),
        ({"num_heads": 9, "num_kv_heads": 3, "intermediate_size": 9, "vocab_size": 500}, 9, "512 rows to which"),
    ],
)
def test_what_ranks_cannot_divide_is_refused_by_name(
    tiny_pair: Path, shape: dict[str, Any], ranks: int, words: str
) -> None:
    config = replace(Pair.load(tiny_pair).decoder_config, **shape)
    with pytest.raises(InvalidRequest) as refused:
        check_shares(config, "decoder", ranks)
    assert refused.value.field == "tensor_parallel_size"
    assert words in refused.value.reason


def test_ranks_that_fit_are_not_refused(tiny_pair: Path) -> None:
    config = replace(Pair.load(tiny_pair).decoder_config, num_heads=8, num_kv_heads=2)
    for ranks in (1, 2, 4, 8):
        check_shares(config, "decoder", ranks)
