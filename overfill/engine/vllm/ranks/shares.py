"""Which share of a model each rank of a tensor-parallel group has, and which models N ranks can divide."""

from __future__ import annotations

from overfill.errors import InvalidRequest
from overfill.model.config import ModelConfig
from overfill.model.manifest import Half

_VOCAB_MULTIPLE = 64
"""vLLM pads the vocabulary to a multiple of this before it divides it."""


def head_share(num_kv_heads: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Half-open range of the KV heads that ``rank`` holds, as vLLM deals them out.

    With more ranks than KV heads, neighbouring ranks hold the same head.
    """
    if num_ranks > num_kv_heads:
        head = rank // (num_ranks // num_kv_heads)
        return head, head + 1
    count = num_kv_heads // num_ranks
    return rank * count, (rank + 1) * count


def check_shares(config: ModelConfig, half: Half, num_ranks: int) -> None:
    """Raises InvalidRequest, which names what cannot be divided, if ``num_ranks`` ranks cannot share the model."""
    what = "full model" if half == "full" else "decoder"
    padded = -(-config.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    for count, name in (
        (config.num_heads, "attention heads"),
        (config.intermediate_size, "neurons of each MLP"),
        (padded, f"rows to which vLLM pads the vocabulary of {config.vocab_size}"),
    ):
        if count % num_ranks:
            raise InvalidRequest("tensor_parallel_size", f"{num_ranks} does not divide the {what}'s {count} {name}")
    heads = config.num_kv_heads
    if heads % num_ranks and num_ranks % heads:
        raise InvalidRequest(
            "tensor_parallel_size",
            f"{num_ranks} neither divides the {what}'s {heads} KV heads nor is a multiple of them",
        )
