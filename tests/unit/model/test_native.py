"""Tests that the native forward pass computes what the reference computes, for every shape that the engine uses."""

from __future__ import annotations

import threading
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_adapters import random_adapter
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from overfill.making.head_plan import head_mask_of
from overfill.model.native import library
from overfill.model.native.transformer import NativeTransformer, fastest_model, supported
from overfill.model.transformer import Transformer

pytestmark = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason=f"no native kernels: {library.unavailable_reason()}"
)

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 197,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "head_dim": 64,
}
CHOSEN_ROWS = {
    "tokens": 90,
    "tail_rank": 7,
    "whole": b64encode(head_mask_of(torch.arange(3, 183, 2), SHAPE["vocab_size"])).decode(),
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral-no-groups": MistralConfig(**SHAPE | {"num_key_value_heads": 6}, sliding_window=None),
    "qwen2-odd-sizes": Qwen2Config(
        **SHAPE | {"hidden_size": 51, "intermediate_size": 77, "vocab_size": 193, "head_dim": 10},
        tie_word_embeddings=True,
    ),
    "qwen3-dim-128": Qwen3Config(**SHAPE | {"head_dim": 128}),
    "head-in-two-parts": LlamaConfig(**SHAPE, overfill_head={"tokens": 90, "tail_rank": 7}),
    "head-of-chosen-rows": LlamaConfig(**SHAPE, overfill_head=CHOSEN_ROWS),
    "dim-80": LlamaConfig(**SHAPE | {"head_dim": 80}),
    "dim-256-one-kv-head": LlamaConfig(**SHAPE | {"head_dim": 256, "num_key_value_heads": 1}),
}
PROMPT = torch.randint(0, 193, (400,), generator=torch.Generator().manual_seed(7)).tolist()


on_both_units = pytest.mark.parametrize(
    "amx", [False, pytest.param(True, marks=pytest.mark.skipif(not library.has_amx(), reason="no AMX here"))]
)


def load(folder: Path, quantize: str = "none", amx: bool | None = None) -> NativeTransformer:
    loaded = Transformer.load(folder, torch.bfloat16, CPU, quantize=quantize)
    model = fastest_model(loaded) if amx is None else NativeTransformer(loaded, amx=amx)
    assert isinstance(model, NativeTransformer)
    return model


def through(run, adapters: Mapping[str, int] | None = None) -> torch.Tensor:
    """Runs a prompt, a chunk, several new tokens and a single one, next to another sequence."""

    def step(new: dict[str, list[int]]) -> torch.Tensor:
        return run.step(new, adapters=adapters)

    logits = [step({"a": PROMPT[:200]}), step({"a": PROMPT[200:330], "b": PROMPT[:37]})]
    logits += [step({"b": PROMPT[37:39], "a": PROMPT[330:333]})]
    logits += [step({"a": [PROMPT[333 + i]], "b": [PROMPT[39 + i]]}) for i in range(5)]
    logits += [step({"c": PROMPT[:390]})]  # enough rows for threads to divide rows, not panels
    return torch.cat(logits)


@on_both_units
@pytest.mark.parametrize(
    ("quantize", "held"), [("none", "auto"), ("int8", "auto"), ("none", "int8")], ids=["plain", "weights", "cache"]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_nearer_to_float32_than_those_of_the_reference(
    name: str, quantize: str, held: str, amx: bool, save_model, runner, tmp_path: Path
) -> None:
    """Both round to bfloat16, but at different places, so they differ in the last bits."""
    save_model(CONFIGS[name])
    exact, eager = (
        through(runner(Transformer.load(tmp_path, dtype, CPU, quantize=quantize), 256, kv_cache_dtype=held))
        for dtype in (torch.float32, torch.bfloat16)
    )
    for threads in (1, 3):
        torch.set_num_threads(threads)
        error = (through(runner(load(tmp_path, quantize, amx), 256, kv_cache_dtype=held)) - exact).abs()
        assert error.mean() <= 1.05 * (eager - exact).abs().mean()
        assert error.max() <= 0.15 * exact.std()


ADAPTERS = {"a": 0, "c": 2}
"""Slots of the sequences of ``through``; "b" has no adapter."""


@on_both_units
@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("name", ["biases", "qwen2-odd-sizes", "qwen3-dim-128"])
def test_logits_with_adapters_are_nearer_to_float32_than_those_of_the_reference(
    name: str, quantize: str, amx: bool, save_model, runner, tmp_path: Path
) -> None:
    """One adapter has two units of ranks; the other, with some projections only, follows a larger one in its slot."""
    save_model(CONFIGS[name])

    def logits(model) -> torch.Tensor:
        slots = model.new_adapter_slots(3, 20)
        slots.stage(0, random_adapter(model.config, 1, 20, scale=0.3))
        slots.stage(2, random_adapter(model.config, 2, 20))
        slots.stage(2, random_adapter(model.config, 3, 5, ["k_proj", "o_proj", "up_proj"], scale=0.5))
        return through(runner(model, 256), ADAPTERS)

    exact, eager = (
        logits(Transformer.load(tmp_path, dtype, CPU, quantize=quantize)) for dtype in (torch.float32, torch.bfloat16)
    )
    for threads in (1, 3):
        torch.set_num_threads(threads)
        error = (logits(load(tmp_path, quantize, amx)) - exact).abs()
        assert error.mean() <= 1.05 * (eager - exact).abs().mean()
        assert error.max() <= 0.15 * exact.std()


def test_rows_of_adapters_change_no_other_row(save_model, runner, tmp_path: Path) -> None:
    """Rows without an adapter equal those of a step without any, to the last bit; so do rows that are asked for."""
    save_model(CONFIGS["biases"])
    torch.set_num_threads(2)
    model = load(tmp_path)
    slots = model.new_adapter_slots(2, 16)
    slots.stage(1, random_adapter(model.config, 1, 16))
    new = {"a": PROMPT[:50], "b": PROMPT[:30], "c": PROMPT[:3]}
    plain, mixed = runner(model, 256).step(new), runner(model, 256).step(new, adapters={"b": 1})
    assert torch.equal(plain[:50], mixed[:50])
    assert torch.equal(plain[80:], mixed[80:])
    assert not torch.isclose(plain[50:80], mixed[50:80]).all(1).any()
    assert torch.equal(runner(model, 256).step(new, logits=[49, 79, 81], adapters={"b": 1}), mixed[[49, 79, 81]])
    with pytest.raises(ValueError, match="adapter slot does not exist"):
        runner(model, 256).step(new, adapters={"b": 2})


@pytest.mark.parametrize(
    ("quantize", "held"), [("none", "auto"), ("int8", "auto"), ("int8", "int8")], ids=["plain", "weights", "both"]
)
def test_a_sequence_gets_the_same_bits_beside_others_with_other_adapters(
    quantize: str, held: str, save_model, runner, tmp_path: Path
) -> None:
    """This holds on one thread and without AMX, whose sums and parts of a context depend on the whole step."""
    save_model(CONFIGS["biases"])
    torch.set_num_threads(1)
    model = load(tmp_path, quantize, amx=False)
    slots = model.new_adapter_slots(3, 16)
    for slot in range(3):
        slots.stage(slot, random_adapter(model.config, slot, 16))
    adapters = {str(i): i % 4 - 1 for i in range(14)}  # more than the twelve rows of a tile
    steps = [
        {name: PROMPT[i : 12 + 6 * i] for i, name in enumerate(adapters)},
        {name: PROMPT[i : 1 + i + i % 7] for i, name in enumerate(adapters)},  # decode steps, and short replays
        {name: PROMPT[i : i + 1] for i, name in enumerate(adapters)},
    ]

    def logits(names: list[str]) -> list[dict[str, torch.Tensor]]:
        run, found = runner(model, 256, kv_cache_dtype=held), []
        for step in steps:
            new = {name: step[name] for name in names}
            rows = run.step(new, adapters=adapters).split([len(tokens) for tokens in new.values()])
            found.append(dict(zip(names, rows, strict=True)))
        return found

    together = logits([*adapters])
    for name in adapters:
        alone = logits([name])
        assert all(torch.equal(a[name], b[name]) for a, b in zip(alone, together, strict=True)), name


@pytest.mark.parametrize("name", ["llama", "tied", "head-in-two-parts", "head-of-chosen-rows"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_most_likely_tokens_are_those_of_the_logits(
    name: str, threads: int, save_model, runner, tmp_path: Path
) -> None:
    """With few rows the threads share panels; with many they share rows."""
    save_model(CONFIGS[name])
    torch.set_num_threads(threads)
    model = load(tmp_path)
    logits, named = runner(model, 256), runner(model, 256)
    named.model = SimpleNamespace(forward=model.most_likely)
    for new in ({"a": PROMPT[:390]}, {"a": PROMPT[390:], "b": PROMPT[:30]}, {"a": [3], "b": [5]}):
        assert named.step(new).tolist() == logits.step(new).argmax(-1).tolist()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(9, 3, 64), (8, 1, 32), (5, 5, 96), (6, 2, 128), (2, 1, 256), (6, 2, 72)],
    ids=["smollm2", "one-kv-head", "no-groups", "dim-128", "dim-256", "part-of-a-vector"],
)
def test_attention_of_single_tokens_to_codes_is_nearer_to_float32_than_that_of_the_reference(
    heads: int, kv_heads: int, dim: int, save_model, runner, tmp_path: Path
) -> None:
    """Contexts end at any position of a chunk, next to NaN; some have several spans."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}
    save_model(LlamaConfig(**SHAPE | sizes | {"hidden_size": 360, "num_hidden_layers": 1}))
    torch.set_num_threads(2)
    contexts = {"a": 3, "b": 16, "c": 31, "d": 150, "e": 300}

    def singles(model, block_size: int = 16) -> torch.Tensor:
        run = runner(model, 600 // block_size + 5, block_size, "int8")
        run.step({name: PROMPT[:length] for name, length in contexts.items()})
        return torch.cat([run.step({name: [PROMPT[i]] for name in contexts}) for i in range(3)])

    exact, eager = (singles(Transformer.load(tmp_path, dtype, CPU)) for dtype in (torch.float32, torch.bfloat16))
    model = load(tmp_path)
    for block_size in (4, 16, 24):
        assert (singles(model, block_size) - exact).abs().mean() <= 1.05 * (eager - exact).abs().mean()


@on_both_units
@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_only_the_rows_asked_for_go_through_the_end_of_the_model(
    threads: int, quantize: str, amx: bool, save_model, runner, tmp_path: Path
) -> None:
    """Logits of selected rows equal those of all rows to the last bit, in any order; so do later steps."""
    save_model(CONFIGS["biases"])
    torch.set_num_threads(threads)
    model = load(tmp_path, quantize, amx)
    every, run = runner(model, 256), runner(model, 256)
    whole = [every.step({"a": PROMPT[:50]}), every.step({"a": PROMPT[50:90], "b": PROMPT[:30]})]

    assert run.step({"a": PROMPT[:50]}, logits=[]).shape == (0, 197)
    for rows in ([39, 69], [69, 3, 3]):
        some = runner(model, 256)
        some.step({"a": PROMPT[:50]}, logits=[])
        assert torch.equal(some.step({"a": PROMPT[50:90], "b": PROMPT[:30]}, logits=rows), whole[1][rows])
    run.step({"a": PROMPT[50:90], "b": PROMPT[:30]}, logits=[69])
    assert torch.equal(run.step({"a": [PROMPT[90]]}), every.step({"a": [PROMPT[90]]}))


@on_both_units
@pytest.mark.parametrize("columns", [512, 513, 1024, 4096, 4097, 5001, 14336])
def test_int8_products_with_outliers_are_nearer_to_float64_than_those_of_bfloat16_activations(
    columns: int, amx: bool, save_model, runner, tmp_path: Path
) -> None:
    """Only the MLP changes the hidden state, and only its ``down`` is long; five of its columns have outliers."""
    model = save_model(LlamaConfig(**SHAPE | {"intermediate_size": columns, "num_hidden_layers": 1}))
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.up_proj.weight[:: columns // 5] *= 100
    model.save_pretrained(tmp_path)
    loaded = Transformer.load(tmp_path, torch.bfloat16, CPU, quantize="int8")
    weights, tokens = loaded.weights, PROMPT[:12]
    layer = weights.layers[0]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + loaded.config.rms_norm_eps).rsqrt() * weight

    hidden = weights.embedding[tokens].double()
    gate, up = (norm(hidden, layer.post_norm) @ layer.gate_up.dequantised().double().T).split(columns, 1)
    down, head = (matrix.dequantised().double().T for matrix in (layer.down, weights.head))
    gated = torch.nn.functional.silu(gate) * up
    assert (gated.abs().amax(1) > 10 * gated.square().mean(1).sqrt()).all(), "these are outliers"
    exact, rounded = (norm(hidden + x @ down, weights.norm) @ head for x in (gated, gated.bfloat16().double()))

    run = runner(NativeTransformer(loaded, amx=amx))
    together = run.step({"all": tokens})
    assert (together - exact).norm() <= 0.8 * (rounded - exact).norm()
    assert torch.equal(torch.cat([run.step({f"{row}": [token]}) for row, token in enumerate(tokens)]), together)


@pytest.mark.skipif(not library.has_amx(), reason="no AMX here")
@pytest.mark.parametrize("hidden", [32, 33, 63, 66, 98])
def test_amx_tiles_are_exact_whatever_remains_of_rows_and_columns(
    hidden: int, save_model, runner, tmp_path: Path
) -> None:
    """With up to 8 new tokens and heads of 48, tiles compute products only. Sums of int8 products are integers."""
    sizes = {"hidden_size": hidden, "intermediate_size": hidden + 31, "num_hidden_layers": 1, "head_dim": 48}
    save_model(Qwen2Config(**SHAPE | sizes))
    models = {(kind, amx): load(tmp_path, kind, amx) for kind in ("none", "int8") for amx in (False, True)}
    for rows in (5, 8, 16, 17, 31, 32, 33, 48, 49, 65):
        new = {str(i): PROMPT[i : i + min(8, rows - i)] for i in range(0, rows, 8)}
        logits = {key: runner(model, 32).step(new) for key, model in models.items()}
        assert torch.equal(logits["int8", True], logits["int8", False])
        spread = logits["none", False].std().item()
        torch.testing.assert_close(logits["none", True], logits["none", False], atol=0.05 * spread, rtol=0)


@pytest.mark.skipif(not library.has_amx(), reason="no AMX here")
@pytest.mark.parametrize("block_size", [4, 16, 32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(9, 3, 64), (8, 1, 32), (24, 3, 32), (5, 5, 96), (6, 2, 128), (2, 1, 256)],
    ids=["smollm2", "one-kv-head", "two-bands", "no-groups", "seven-units-or-more", "eight-units-of-a-head"],
)
def test_attention_of_single_tokens_is_the_same_in_amx_tiles(
    heads: int, kv_heads: int, dim: int, block_size: int, save_model, runner, tmp_path: Path
) -> None:
    """Contexts end at any position of a tile, next to NaN; one is longer than a span and than a chunk of scores."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}
    sizes |= {"hidden_size": 360, "num_hidden_layers": 1}
    save_model(LlamaConfig(**SHAPE | sizes))
    torch.set_num_threads(2)
    contexts = {"a": 3, "b": 16, "c": 31, "d": 150, "e": 300}
    logits = []
    for amx in (False, True):
        run = runner(load(tmp_path, amx=amx), 600 // block_size + 5, block_size)
        run.step({name: PROMPT[:length] for name, length in contexts.items()})
        logits.append(torch.cat([run.step({name: [PROMPT[i]] for name in contexts}) for i in range(3)]))
    spread = logits[0].std().item()
    torch.testing.assert_close(logits[1], logits[0], atol=0.05 * spread, rtol=0)


@on_both_units
@pytest.mark.parametrize("held", ["auto", "int8"])
def test_a_sequence_of_nan_keeps_to_itself(held: str, amx: bool, save_model, runner, tmp_path: Path) -> None:
    """A failed sequence leaves NaN in its blocks; the runner fills unowned blocks with NaN anyway."""
    save_model(CONFIGS["llama"])
    run = runner(load(tmp_path, amx=amx), 256, kv_cache_dtype=held)
    run.step({"a": PROMPT[:50], "b": PROMPT[:60]})
    alone = runner(load(tmp_path, amx=amx), 256, kv_cache_dtype=held)
    alone.step({"a": PROMPT[:50]})
    bad = torch.tensor(run._tables["b"])
    for part in run.floating:
        part[:, bad] = float("nan")
    for new in ([1], PROMPT[50:70]):
        got = run.step({"a": new, "b": new})
        want = alone.step({"a": new})
        torch.testing.assert_close(got[: len(new)], want, atol=2e-2, rtol=0)
        assert got[len(new) :].isnan().all()


def test_hooks_run_in_order_and_may_give_up(save_model, runner, tmp_path: Path) -> None:
    save_model(CONFIGS["llama"])
    torch.set_num_threads(2)
    run = runner(load(tmp_path), 256)
    calls: list[tuple[str, int]] = []
    run.step(
        {"a": PROMPT[:20]},
        layer_start=lambda layer: calls.append(("start", layer)),
        kv_written=lambda layer: calls.append(("written", layer)),
    )
    assert calls == [(kind, layer) for layer in range(3) for kind in ("start", "written")]
    for hook in ("layer_start", "kv_written"):

        def give_up(layer: int) -> None:
            if layer == 1:
                raise KeyError("enough")

        with pytest.raises(KeyError, match="enough"):
            run.step({"b": PROMPT[:20]}, **{hook: give_up})
    assert run.step({"c": PROMPT[:20]}).isfinite().all()


def test_hooks_see_kv_in_the_cache(save_model, runner, tmp_path: Path) -> None:
    save_model(CONFIGS["llama"])
    run = runner(load(tmp_path), 256)
    seen: list[bool] = []

    def written(layer: int) -> None:
        slots = run.cache.slots(run._tables["a"], 0, 20)
        k, v = run.cache.layer(layer)
        seen.append(bool(k[slots].isfinite().all() and v[slots].isfinite().all()))

    run.step({"a": PROMPT[:20]}, kv_written=written)
    assert seen == [True] * 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": [500]}, "vocabulary"),
        ({"token_ids": [-1]}, "vocabulary"),
        ({"positions": [5000]}, "beyond the context"),
        ({"slots": [10**6]}, "slot"),
        ({"block_tables": [[99]] * 3}, "not in the cache"),
        ({"table_rows": [3]}, "no block table"),
        ({"table_rows": [-1]}, "no block table"),
        ({"logits_indices": [3]}, "not in the batch"),
    ],
)
def test_nothing_is_read_or_written_out_of_bounds(change: dict, words: str, save_model, runner, tmp_path: Path) -> None:
    save_model(CONFIGS["llama"])
    model = load(tmp_path)
    run = runner(model, 8)
    batches = []
    forward, model.forward = model.forward, lambda batch, *args, **hooks: batches.append(batch)
    run.step({"a": [1]})
    batch = replace(batches[0], **{name: torch.tensor(value) for name, value in change.items()})
    with pytest.raises(ValueError, match=words):
        forward(batch, run.cache)


def test_two_engines_of_one_process_compute_at_once(save_model, runner, tmp_path: Path) -> None:
    """Each model runs on its own thread with two intra-op threads, as two workers in one process would."""
    save_model(CONFIGS["llama"])
    want = through(runner(load(tmp_path), 256))
    shared = load(tmp_path)
    runners = [runner(shared, 256), runner(shared, 256), runner(load(tmp_path), 256)]
    results: dict[int, list[torch.Tensor]] = {}

    def work(index: int) -> None:
        torch.set_num_threads(2)
        results[index] = []
        for _ in range(3):
            runners[index]._lengths.clear()
            results[index].append(through(runners[index]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in (logits for each in results.values() for logits in each):
        torch.testing.assert_close(got, want, atol=5e-2, rtol=0)
    assert len(results[2]) == 3


def test_models_that_the_kernels_do_not_cover_run_on_the_reference(save_model, tmp_path: Path) -> None:
    save_model(LlamaConfig(**SHAPE | {"head_dim": 160}))
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        assert type(fastest_model(Transformer.load(tmp_path, dtype, CPU))) is Transformer
    config = Transformer.load(tmp_path, torch.bfloat16, CPU).config
    assert not supported(config, torch.bfloat16, CPU)


def test_the_weights_are_held_once(save_model, tmp_path: Path) -> None:
    save_model(CONFIGS["tied"])
    loaded = Transformer.load(tmp_path, torch.bfloat16, CPU)
    model = NativeTransformer(loaded)
    assert loaded.weights.layers == ()
    assert model._embedding is None
