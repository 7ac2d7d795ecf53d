"""Tests what ``overfill demo`` shows of several tiers, and what it says that a token of each reads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from overfill.cli import demo
from overfill.cli.demo_tiers import TIERS, ask_tiers, default_tiers
from overfill.cli.main import main
from overfill.client import Answer, Delta, SamplingParams, Usage

PAIR: Any = SimpleNamespace(
    decoder_config=SimpleNamespace(
        num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=32, intermediate_size=64,
        head_matrices=[(100, 32)],
    )
)  # fmt: skip


class Stack:
    """Two tiers; ``full`` is exact, ``fast`` has int8 weights and KV."""

    def __init__(self, answer: Callable[..., Answer]) -> None:
        self.asked: list[str] = []
        self._answer = answer

    def status(self) -> SimpleNamespace:
        workers = [SimpleNamespace(tier=None, process=None)]
        for tier, int8 in (("full", ""), ("fast", "int8")):
            model = SimpleNamespace(decoder_quantize=int8, kv_cache_dtype=int8)
            process = SimpleNamespace(kv=SimpleNamespace(dtype="float32"), model=model)
            workers.append(SimpleNamespace(tier=tier, process=process))
        return SimpleNamespace(workers=workers)

    def stream(self, prompt: Any, *, sampling: SamplingParams, tier: str) -> AbstractContextManager[Any]:
        self.asked.append(tier)

        class Stream:
            answer = self._answer(tier=tier, usage=Usage(20, 11, 0))

            def __iter__(self) -> Any:
                return iter([Delta(0, (1,), "It ", None), Delta(1, (2,), "is.", None)])

        return nullcontext(Stream())


def test_every_tier_is_asked_in_turn_and_reads_its_own_weights_and_kv(answer: Callable[..., Answer]) -> None:
    pairs, stack = dict.fromkeys(("full", "fast"), PAIR), Stack(answer)
    seen: list[tuple[str, str]] = []
    full, fast = ask_tiers(stack, pairs, "Why?", SamplingParams(), lambda tier, text: seen.append((tier, text)))
    assert stack.asked == ["full", "fast"]
    assert seen == [(tier, text) for tier in ("full", "fast") for text in ("", "It ", "It is.")]
    assert (full.precision, fast.precision) == ("float32", "int8")
    weights = 2 * (64 * 32 + 32 * 32 + 128 * 32 + 32 * 64) + 100 * 32
    rows = 2 * (64 + 32 + 128 + 32) + 100
    assert (full.weight_bytes, fast.weight_bytes) == (4 * weights, weights + 4 * rows)
    tokens = 20 + 11 // 2  # the prompt and, on average, half of the answer
    assert (full.kv_bytes, fast.kv_bytes) == (tokens * 2 * 2 * 2 * 8 * 4, tokens * 2 * 2 * 2 * (8 + 4))


@pytest.mark.parametrize(
    ("device", "lacking", "int8"), [("cpu", None, True), ("cpu", "AVX", False), ("cuda", None, False)]
)
def test_only_cpus_with_native_kernels_get_int8_and_never_the_full_model(
    device: str, lacking: str | None, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overfill.engine.device.resolve_device", lambda name: SimpleNamespace(type=device))
    monkeypatch.setattr("overfill.model.native.library.unavailable_reason", lambda: lacking)
    full, *others = default_tiers()
    assert (full, tuple(tier.model_copy(update={"settings": {}}) for tier in others)) == (TIERS[0], TIERS[1:])
    assert {tier.quantize for tier in others} == {"int8" if int8 else None}


def test_the_command_shows_answers_and_figures_of_each_tier_and_how_to_start_them(
    answer: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_running", lambda spec: nullcontext(Stack(answer)))
    monkeypatch.setattr(demo, "resolve_pairs", lambda spec, report: spec)
    monkeypatch.setattr(demo, "tier_pair", lambda tier: PAIR)
    tiers = ["--tier", "full=identity", "--tier", "fast=/p:2,quantize=int8"]
    assert main(["demo", "--no-ray", *tiers]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["full", "fast"] in lines, "answers are side by side"
    assert ["It", "scatters."] * 2 in lines
    assert ["fast", "int8", "10.0", "0", "0", "of", "20"] in lines
    figures = out[out.index("weights, KV") :]
    assert "%" not in figures[: figures.index("speed")], "no figure of quality that the texts may belie"
    assert " ".join(out.split()).endswith(" ".join(["overfill up", *tiers]))
