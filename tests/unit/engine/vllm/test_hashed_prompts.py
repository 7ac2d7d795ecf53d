"""A part of a hashed prompt has the hashes of its own blocks only."""

from __future__ import annotations

from overfill.engine.vllm.hashes import HashedPrompt, hashes_of


def test_the_beginning_of_a_prompt_has_the_hashes_of_its_blocks() -> None:
    prompt, shorter = HashedPrompt(range(100), 16, 1, "tenant"), HashedPrompt(range(48), 16, 1, "tenant")
    beginning = prompt.beginning(3)
    assert hashes_of(beginning) == hashes_of(shorter) == hashes_of(prompt)[:3]
    assert (beginning.tokens, beginning.keys) == (shorter.tokens, shorter.keys)
    assert beginning.num_tokens == 48
    assert len(hashes_of(prompt)) == 6
