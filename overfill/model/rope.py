"""Rotary position embedding (RoFormer, arXiv 2104.09864) and the scalings that checkpoints use.

All angles are computed in float32, as in Hugging Face, so that equal specs rotate keys equally in every process.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from overfill.kv.spec import RopeSpec


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> Tensor:
    """Radians per position of each rotated pair, with the spec's scaling. [head_dim / 2] float32.

    Sources of the scalings:

    - linear: position interpolation (arXiv 2306.15595)
    - llama3: the Llama 3.1 reference code
    - yarn: "NTK-by-parts" (arXiv 2309.00071, section 3.2)
    """
    frequencies = 1.0 / spec.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if spec.type == "linear":
        return frequencies / spec.factor
    if spec.type == "llama3":
        return _llama3(frequencies, spec)
    if spec.type == "yarn":
        return _yarn(frequencies, spec, head_dim)
    return frequencies


def rope_tables(spec: RopeSpec, head_dim: int, max_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, times the attention factor.

    Each is [max_positions, head_dim / 2] float32.
    """
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(spec, head_dim))
    cos, sin = angles.cos() * spec.attention_factor, angles.sin() * spec.attention_factor
    return cos.to(device), sin.to(device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs ``(i, i + D/2)`` of every head.

    Args:
        x: [T, heads, D], queries or keys.
        cos, sin: [T, D/2] float32, rows of ``rope_tables`` at the tokens' positions.

    Returns:
        [T, heads, D] in ``x``'s dtype, computed in float32.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [T, 1, D/2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _llama3(frequencies: Tensor, spec: RopeSpec) -> Tensor:
    """Stretches long wavelengths by ``factor``, keeps short ones and interpolates between the two."""
    turns = spec.original_max_positions * frequencies / (2 * math.pi)  # in the original context
    smooth = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / spec.factor + smooth * frequencies


def _yarn(frequencies: Tensor, spec: RopeSpec, head_dim: int) -> Tensor:
    """Keeps pairs that turn often, stretches pairs that turn rarely, and interpolates between the two."""

    def pair_that_turns(times: float) -> float:
        wavelength = spec.original_max_positions / (times * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(spec.theta))

    low, high = pair_that_turns(spec.beta_fast), pair_that_turns(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / spec.factor * stretched + frequencies * (1 - stretched)
