"""Replayed decode steps compute what the steps themselves would. The recorder here runs the step again instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from overfill.model import graphs
from overfill.model.graphs import GraphedTransformer
from overfill.model.transformer import Transformer

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
PROMPTS = {"a": list(range(1, 20)), "b": list(range(40, 45)), "c": [7, 8, 9]}


class Again:
    """Records nothing; counts, and overwrites one output as a replayed graph does."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        out = step().clone()

        def replay() -> Tensor:
            self.replayed += 1
            return out.copy_(step())

        return replay


class Failing:
    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def model(save_model, tmp_path: Path) -> Transformer:
    save_model(LlamaConfig(**SHAPE))
    return Transformer.load(tmp_path, torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SEQUENCES", (1, 2, 4))
    monkeypatch.setattr(graphs, "SHORTEST_CONTEXT", 8)


def graphed(model: Transformer, runner, recorder, held: str = "auto"):
    run = runner(model, kv_cache_dtype=held)
    run.model = GraphedTransformer(model, run.cache, recorder)
    return run


@pytest.mark.parametrize("held", ["auto", "int8"])
def test_padded_and_replayed_steps_are_those_of_the_model(held: str, model: Transformer, runner) -> None:
    """Batches shrink, grow and change order; contexts cross from one bucket into the next."""
    recorder = Again()
    plain, replayed = runner(model, kv_cache_dtype=held), graphed(model, runner, recorder, held)
    torch.testing.assert_close(replayed.step(PROMPTS), plain.step(PROMPTS), atol=0, rtol=0)
    assert recorder.recorded == 0  # a prompt is no decode step

    steps = [("a", "b", "c"), ("b",), ("c", "b"), ("c", "a", "b"), *[("a", "c")] * 6, *[("b",)] * 5]
    for number, names in enumerate(steps):
        new = {name: [(11 * number + ord(name)) % 96] for name in names}
        torch.testing.assert_close(replayed.step(new), plain.step(new), atol=1e-5, rtol=0)
    assert recorder.replayed == len(steps)
    assert recorder.recorded < len(steps)


def test_padding_writes_nothing_of_its_own(model: Transformer, runner) -> None:
    recorder = Again()
    plain, replayed = runner(model), graphed(model, runner, recorder)
    for run in (plain, replayed):
        run.step(PROMPTS)
    for cache in (plain.cache, replayed.cache):
        cache.k.nan_to_num_(nan=-1.0)
    before = replayed.cache.k.clone()
    replayed.step({"a": [3], "b": [4], "c": [5]})
    changed = (replayed.cache.k != before).any(-1).any(-1)  # [layers, blocks, block]
    assert changed.flatten(1).sum(1).tolist() == [3, 3]


@pytest.mark.parametrize("change", ["hook", "chunk", "logits", "another cache"])
def test_other_steps_run_as_they_are(change: str, model: Transformer, runner) -> None:
    recorder = Again()
    run = graphed(model, runner, recorder)
    run.step({"a": [1, 2, 3]})
    if change == "hook":
        run.step({"a": [4]}, on_layer_start=lambda layer: None)
    elif change == "chunk":
        run.step({"a": [4, 5]})
    elif change == "logits":
        run.step({"a": [4]}, logits=[])
    else:
        other = runner(model)
        other.model = run.model
        other.step({"a": [4]})
    assert recorder.recorded == 0


def test_a_batch_beyond_the_largest_bucket_runs_as_it_is(model: Transformer, runner) -> None:
    recorder = Again()
    plain, replayed = runner(model), graphed(model, runner, recorder)
    new = {f"s{i}": [i + 1] for i in range(5)}
    torch.testing.assert_close(replayed.step(new), plain.step(new), atol=0, rtol=0)
    assert recorder.recorded == 0


def test_where_recording_fails_steps_run_without(model: Transformer, runner, caplog) -> None:
    plain, failing = runner(model), graphed(model, runner, Failing())
    for token in ([1], [2]):
        torch.testing.assert_close(failing.step({"a": token}), plain.step({"a": token}), atol=0, rtol=0)
    assert [r.message for r in caplog.records if "CUDA graphs" in r.message] == [
        "decode steps run without CUDA graphs from now on: recording one failed: "
        "operation not permitted when stream is capturing"
    ]


def test_buckets_cover_every_context_up_to_the_longest() -> None:
    assert list(graphs._contexts(8)) == [8]
    assert list(graphs._contexts(30)) == [8, 12, 16, 24, 30]
