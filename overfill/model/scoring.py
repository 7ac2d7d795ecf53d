"""Log-probabilities of known tokens. Unlike those of sampled tokens, they are of the unchanged logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from overfill.request.params import MAX_LOGPROBS
from overfill.v1 import common_pb2

SCORED_BYTES = 64 << 20
"""Maximum bytes of a step's logits, [tokens, vocab] float32, that score known tokens."""

_ROWS = 16
"""Rows that are scored at once. It bounds the copies that the arithmetic makes of the logits."""


def max_scored_rows(vocab_size: int) -> int:
    """Maximum number of tokens that one step scores; at least 1."""
    return max(1, SCORED_BYTES // (4 * vocab_size))


def score(logits: Tensor, targets: Sequence[int], count: int, into: common_pb2.PromptLogprobs) -> None:
    """Appends the log-probability of each row's target to ``into``. It is not finite where a row's logits are not.

    Args:
        logits: [N, vocab] float32.
        targets: [N], token ids.
        count: number of most likely tokens to list beside each target.
    """
    for start in range(0, len(targets), _ROWS):
        scores = logits[start : start + _ROWS].log_softmax(dim=-1)
        ids = torch.tensor(targets[start : start + _ROWS], device=logits.device).unsqueeze(1)
        own = scores.gather(1, ids)
        into.logprobs.extend(own.squeeze(1).tolist())
        into.ranks.extend(((scores > own).sum(dim=-1) + 1).tolist())
        if count:
            # k is constant, so that the order of equal tokens does not depend on ``count``.
            top = scores.topk(min(MAX_LOGPROBS, scores.shape[1]), dim=-1)
            into.top_ids.extend(top.indices[:, :count].flatten().tolist())
            into.top_logprobs.extend(top.values[:, :count].flatten().tolist())
