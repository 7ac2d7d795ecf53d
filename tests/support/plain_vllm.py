"""Engines in place of plain vLLM. They are in a module of their own, because another process imports them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class FakeVllm:
    """Answers prompts, and fails to decode."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        print("noise on stdout", flush=True)
        self.step = arguments["max_num_seqs"]

    async def answer(self, prompt: Sequence[int], max_tokens: int) -> list[float]:
        return [self.step * at for at in range(max_tokens)]

    async def decode(self, prompts: Sequence[Sequence[int]], max_tokens: int, steps: int) -> None:
        raise ValueError("prompt too long")

    def close(self) -> None:
        print("closed", flush=True)


def broken_vllm(arguments: Mapping[str, Any]) -> None:
    """Does not start."""
    raise ValueError("no such model")
