"""Draws tokens in the native library; ``model.sampling`` defines the semantics and is the reference."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import numpy as np
import torch
from torch import Tensor

from overfill.model.native import library
from overfill.request.params import SamplingParams


def draw(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], sample_indices: Sequence[int]
) -> Tensor | None:
    """Draws one token per row, by the race of ``model.sampling.race_keys``.

    Args:
        logits: [N, vocab] float32.
        params: one per row, none greedy, all with a seed.
        positions: position of the sampled token, per row.
        sample_indices: number of the answer among the request's answers, per row.

    Returns:
        [N] int64, -1 for rows whose logits are not finite. None if the kernels do not run here.
    """
    if logits.device.type != "cpu" or (native := library.load()) is None:
        return None
    rows, vocab = logits.shape
    logits = logits.contiguous()
    temperatures, top_p, min_p = (
        np.array(values, dtype=np.float64)
        for values in zip(*((p.temperature, p.top_p, p.min_p) for p in params), strict=True)
    )
    top_k = np.array([min(p.top_k or vocab, vocab) for p in params], dtype=np.int64)
    seeds = np.array([p.seed for p in params], dtype=np.uint64)
    counters = np.array([positions, sample_indices], dtype=np.uint32)
    chosen = torch.empty(rows, dtype=torch.int64)
    native.ovf_draw(
        byref(
            library.Draws(
                rows=rows,
                vocab=vocab,
                threads=torch.get_num_threads(),
                logits=logits.data_ptr(),
                temperatures=temperatures.ctypes.data,
                top_p=top_p.ctypes.data,
                min_p=min_p.ctypes.data,
                top_k=top_k.ctypes.data,
                seeds=seeds.ctypes.data,
                positions=counters[0].ctypes.data,
                sample_indices=counters[1].ctypes.data,
                chosen=chosen.data_ptr(),
            )
        )
    )
    return chosen
