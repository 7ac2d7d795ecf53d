"""A part of the vocabulary that stands for all of it in one training pass.

The loss needs the logits of the answers' tokens, of the tokens that the full model finds likely, and the sum over
all others. The sum is estimated from a uniform sample of them: each stands for as many as were left out (sampled
softmax, arXiv 1412.2007, section 3). The product with the head, which is a third of a small decoder's work, shrinks
to the tokens that are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SampledVocabulary:
    """
    Attributes:
        ids: [S] int64; None for the whole vocabulary, whose columns are the ids.
        log_weights: [S] float32, added to the logits: the logarithm of how many tokens each stands for.
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
    """
    Args:
        targets: [N] int64, ids.
        top_ids: [N, k] int64.
        sampled: how many of the other tokens to draw; with 0, or if they are no more than that, all are taken.
        generator: of the CPU.
    """
    wanted = torch.zeros(vocab, dtype=torch.bool, device=targets.device)
    wanted[targets] = True
    wanted[top_ids.flatten()] = True
    others = (~wanted).nonzero().squeeze(1)
    if not 0 < sampled < len(others):
        return SampledVocabulary(None, None, targets, top_ids)
    drawn = others[torch.randperm(len(others), generator=generator)[:sampled].to(others.device)]
    ids = torch.cat([wanted.nonzero().squeeze(1), drawn])
    weights = torch.zeros(len(ids), device=ids.device)
    weights[-sampled:] = torch.log(torch.tensor(len(others) / sampled))
    columns = torch.zeros(vocab, dtype=torch.int64, device=ids.device)
    columns[ids] = torch.arange(len(ids), device=ids.device)
    return SampledVocabulary(ids, weights, columns[targets], columns[top_ids])
