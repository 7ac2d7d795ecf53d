"""Where the decoder takes over from the full model when an adapter writes the answer. Serving and training share it."""

from __future__ import annotations

MAX_TAIL_TOKENS = 256
"""Maximum number of prompt tokens at its end that a decoder computes for an adapter."""


def answer_start(prompt_tokens: int, tail_tokens: int, generation_prompt: int) -> int:
    """Returns the index of the first prompt token that the decoder computes.

    Args:
        prompt_tokens: length of the prompt, at least 2.
        tail_tokens: the adapter's own number of tokens, at most ``MAX_TAIL_TOKENS``; 0 means the generation prompt.
        generation_prompt: tokens of the generation prompt, from the token boundary at or before it; 0 without one.
    """
    tail = min(tail_tokens or generation_prompt or 1, MAX_TAIL_TOKENS, prompt_tokens - 1)
    return prompt_tokens - tail
