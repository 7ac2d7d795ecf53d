"""A program that draws with the Triton kernel in Triton's interpreter, on a CPU, and prints the tokens as JSON.

Triton reads ``TRITON_INTERPRET`` when it is imported, so that the kernel needs a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import plain_race
import torch

from overfill.model.sampling import race_in_kernel, race_keys
from overfill.request.params import SamplingParams


def random_rows() -> tuple[list[int], list[int]]:
    """Tokens of the kernel and of the reference, for rows of three blocks of the kernel, the last not full."""
    logits = torch.randn(24, 4999, generator=torch.Generator().manual_seed(5)) * 6
    options = ({}, {"top_k": 60}, {"top_p": 0.8}, {"temperature": 5.0, "min_p": 0.01})
    params = [SamplingParams(seed=2**64 - 1 - row, **options[row % len(options)]) for row in range(len(logits))]
    request = params, range(len(logits)), [3] * len(logits)
    return race_in_kernel(logits, *request).tolist(), race_keys(logits, *request).argmax(dim=1).tolist()


def broken_rows() -> list[int]:
    logits = torch.zeros(4, 100)
    logits[1, 50], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    return race_in_kernel(logits, [SamplingParams(seed=0)] * 4, range(4), [0] * 4).tolist()


if __name__ == "__main__":
    params, positions, sample_indices, _ = plain_race.known_requests()
    known = race_in_kernel(plain_race.LOGITS.expand(len(params), -1), params, positions, sample_indices)
    print(json.dumps({"known": known.tolist(), "random": random_rows(), "broken": broken_rows()}))
