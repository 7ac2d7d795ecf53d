"""Tests that the generator is Philox4x32-10, and that its numbers are uniform, distinct and reproducible."""

from __future__ import annotations

import numpy as np
import pytest

from overfill.model.philox import philox4x32, uniform

# From the known-answer file of Random123, the reference implementation: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: list[str]) -> np.ndarray:
    return np.array([[int(word, 16) for word in line.split()] for line in text], dtype=np.uint32)


def test_known_answers() -> None:
    counters, keys, results = (words([row[i] for row in KNOWN]) for i in range(3))
    assert np.array_equal(philox4x32(counters, keys), results)


def test_uniform_is_made_of_the_first_two_words() -> None:
    first, second = words(["6627e8d5 e169c58d"])[0].tolist()
    want = ((first >> 5) * 2**26 + (second >> 6)) / 2**53
    assert uniform([0], [0], [0]).tolist() == [want]


@pytest.mark.parametrize("changed", [(1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_every_bit_of_seed_sample_and_position_counts(changed: tuple[int, int, int]) -> None:
    seed, sample, position = changed
    assert uniform([seed], [sample], [position]) != uniform([0], [0], [0])


def test_numbers_are_uniform_in_the_half_open_unit_interval() -> None:
    n = 100_000
    numbers = uniform([42] * n, [0] * n, range(n))
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 160  # chi-square, 99 degrees: p < 1e-4 beyond
    assert len(np.unique(numbers)) == n
