"""Tests that the generator is Philox4x32-10, that every bit of its input counts, and which word a token gets."""

from __future__ import annotations

import plain_race
import pytest
import torch

from overfill.model.philox import philox4x32, token_words


def tensors(words: list[int]) -> list[torch.Tensor]:
    return [torch.tensor([word]) for word in words]


def token_words_of(seed: int, position: int, sample_index: int, vocab: int) -> list[int]:
    return token_words([seed], [position], [sample_index], torch.arange(-(-vocab // 4))).flatten()[:vocab].tolist()


@pytest.mark.parametrize(("counter", "key", "result"), plain_race.RANDOM123)
def test_known_answers(counter: str, key: str, result: str) -> None:
    counter, key, result = map(plain_race.words, (counter, key, result))
    assert [word.item() for word in philox4x32(tensors(counter), tensors(key))] == result
    assert plain_race.philox4x32(counter, key) == result


@pytest.mark.parametrize("vocab", [1, 4, 257])
def test_a_token_has_its_own_word(vocab: int) -> None:
    seed, position, sample_index = 0xFEDCBA9876543210, 2**31 + 5, 65535
    key = [0x76543210, 0xFEDCBA98]
    counters = [[position, sample_index, block, 0] for block in range(vocab // 4 + 1)]
    want = [word for counter in counters for word in plain_race.philox4x32(counter, key)]
    assert token_words_of(seed, position, sample_index, vocab) == want[:vocab]


@pytest.mark.parametrize("changed", [(1, 0, 0), (1 << 32, 0, 0), (1 << 63, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_every_bit_of_seed_position_and_sample_counts(changed: tuple[int, int, int]) -> None:
    assert not set(token_words_of(*changed, vocab=100)) & set(token_words_of(0, 0, 0, vocab=100))


def test_words_are_uniform_and_distinct() -> None:
    n = 100_000
    words = torch.tensor(token_words_of(42, 0, 0, vocab=n))
    counts = (words.double() / 2**32).histc(bins=100, min=0, max=1)
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 160  # chi-square, 99 degrees: p < 1e-4 beyond
    assert len(words.unique()) > n - 10  # of 32 bits, about one pair is equal
