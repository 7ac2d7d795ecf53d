"""Tests the fan-out benchmark without servers."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import pytest

from overfill.lab.bench import fan_out
from overfill.lab.bench.fan_out import FanOutFigures, FanOutLoad, measurements_of, run_fan_outs

LOAD = FanOutLoad(["a", "b", "c"], prompt_tokens=8, answer_tokens=2, fan_outs=2, concurrency=2, vocab_size=100)


class Target:
    """Answers with two tokens, after a message without any."""

    log: ClassVar[list[tuple[str, str, tuple[int, ...]]]] = []

    def __init__(self, url, model):
        self.model = model

    async def __aenter__(self):
        return self

    async def __aexit__(self, *args):
        pass

    async def stream(self, prompt, max_tokens):
        self.log.append((self.model, "starts", tuple(prompt)))
        yield 0
        await asyncio.sleep(0)
        self.log.append((self.model, "first", tuple(prompt)))
        yield 1
        await asyncio.sleep(0)
        yield 2


async def test_later_tasks_start_with_the_first_ones_token_and_every_prompt_is_new(monkeypatch):
    monkeypatch.setattr(fan_out, "OpenAiTarget", Target)
    monkeypatch.setattr(Target, "log", [])
    done: list[tuple[int, int]] = []
    figures = await run_fan_outs("http://x", "model:", LOAD, lambda *progress: done.append(progress))
    assert (len(figures.first), len(figures.later), figures.fan_outs) == (2, 4, 2)
    assert done == [(number, 4) for number in range(5)]
    apart = Target.log[:18]
    for event in range(0, 18, 6):
        assert [entry[:2] for entry in apart[event : event + 4]] == [
            ("model:a", "starts"), ("model:a", "first"), ("model:b", "starts"), ("model:c", "starts"),
        ]  # fmt: skip
    prompts = {prompt for _, _, prompt in Target.log}
    assert len(prompts) == 2 * (LOAD.fan_outs + 1)


@pytest.mark.parametrize("with_vllm", [False, True])
def test_aims_are_judged(with_vllm):
    ours = FanOutFigures([1.0], [0.1, 0.2], seconds=1.0, fan_outs=4, computed=1.05)
    alone = FanOutFigures([1.0], [1.0], seconds=3.0, fan_outs=4, computed=4.0)
    peer = FanOutFigures([1.0], [1.0], seconds=2.0, fan_outs=4) if with_vllm else None
    reached = {one.name: one.reached for one in measurements_of(ours, alone, peer) if one.bound is not None}
    expected = {"fan_out_prompt_tokens": True, "fan_outs_ratio_not_shared": True}
    if with_vllm:
        expected |= {"fan_out_later_ratio_vllm": True, "fan_outs_ratio_vllm": False}
    assert reached == expected
