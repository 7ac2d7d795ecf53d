"""Samples a part of the vocabulary to represent all of it in one training pass (sampled softmax).

The loss needs three things: the logits of the answers' tokens, those of the full model's most likely tokens, and the
sum over all others. A uniform sample estimates that sum; each sampled token represents several (arXiv 1412.2007,
section 3). The product with the head, a third of a small decoder's work, is then computed for these tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SampledVocabulary:
    """The tokens whose logits one training pass computes; a column is the index of such a token.

    Attributes:
        ids: [S] int64, token ids of the columns. None means the whole vocabulary.
        log_weights: [S] float32, added to the logits: the logarithm of the number of tokens that a column represents.
            None means one each.
        targets: [N] int64, columns of the tokens to learn.
        top: [N, k] int64, columns of the full model's most likely tokens.
    """

    ids: Tensor | None
    log_weights: Tensor | None
    targets: Tensor
    top: Tensor


def sample_vocabulary(
    targets: Tensor, top_ids: Tensor, vocab: int, sampled: int, generator: torch.Generator
) -> SampledVocabulary:
    """Takes ``targets`` and ``top_ids``, and draws some of the other tokens.

    Args:
        targets: [N] int64, ids of the tokens to learn.
        top_ids: [N, k] int64, ids of the full model's most likely tokens.
        sampled: Number of other tokens to draw. 0, or a number that reaches them all, takes the whole vocabulary.
        generator: A generator on the CPU.
    """
    required = torch.zeros(vocab, dtype=torch.bool, device=targets.device)
    required[targets] = True
    required[top_ids.flatten()] = True
    others = (~required).nonzero().squeeze(1)
    if not 0 < sampled < len(others):
        return SampledVocabulary(None, None, targets, top_ids)
    drawn = others[torch.randperm(len(others), generator=generator)[:sampled].to(others.device)]
    ids = torch.cat([required.nonzero().squeeze(1), drawn])
    weights = torch.zeros(len(ids), device=ids.device)
    weights[-sampled:] = torch.log(torch.tensor(len(others) / sampled))
    columns = torch.zeros(vocab, dtype=torch.int64, device=ids.device)
    columns[ids] = torch.arange(len(ids), device=ids.device)
    return SampledVocabulary(ids, weights, columns[targets], columns[top_ids])
