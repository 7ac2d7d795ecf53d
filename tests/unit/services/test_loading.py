"""Tests how a worker reads its half of a pair, and what it says on a GPU when it does not run vLLM."""

import json
import logging
import threading
from contextlib import contextmanager

import pytest
import torch

from overfill.errors import InvalidPair
from overfill.settings.config import ColocatedConfig, DecodeConfig, PrefillConfig
from services import loading

EXPECTED = "--engine auto runs the {} on OverFill's own engine, not on vLLM, the engine for GPUs, because "


@pytest.fixture
def warnings(fresh, monkeypatch, caplog):
    """Returns a function that loads a worker's pair on a device, and returns the warnings. Loads no weights."""
    monkeypatch.setattr(loading, "use_device", lambda device: None)
    monkeypatch.setattr(loading, "load_engine", lambda *what: None)
    monkeypatch.setattr(loading, "load_colocated", lambda *what, **named: None)

    async def load(kind, *flags, device="cuda", engines=("overfill", "vllm")):
        monkeypatch.setattr(loading, "resolve_device", lambda asked: torch.device(device))
        folder = fresh()
        manifest = json.loads((folder / "pair.json").read_text())
        manifest["decoder"]["engines"] = list(engines)
        (folder / "pair.json").write_text(json.dumps(manifest))
        config = kind.parse(["--pair", str(folder), *flags])
        caplog.clear()
        if isinstance(config, ColocatedConfig):
            await loading.load_both_halves_of(config)
        else:
            await loading.load_half_of(config, "decoder")
        return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]

    return load


async def test_a_worker_without_vllm_says_what_to_install(with_vllm, warnings):
    with_vllm(False)
    (line,) = await warnings(DecodeConfig)
    assert line.startswith(EXPECTED.format("decoder") + "vLLM is not installed here: ")
    assert "[vllm]" in line
    assert "the image overfill-worker-vllm" in line
    assert "\n" not in line
    with_vllm(True)
    assert await warnings(DecodeConfig) == []


async def test_a_worker_whose_half_vllm_cannot_run_says_why(with_vllm, warnings):
    with_vllm(True)
    (line,) = await warnings(DecodeConfig, "--quantize", "int8")
    assert line == EXPECTED.format("decoder") + (
        "vLLM cannot quantise the decoder to int8 on load; --quantize none lets vLLM run it"
    )
    (line,) = await warnings(DecodeConfig, engines=["overfill"])
    assert "pair.json leaves vllm out of decoder.engines" in line
    assert "not installed" not in line
    with_vllm(False)
    (line,) = await warnings(DecodeConfig, engines=["overfill"])
    assert ". Also, vLLM is not installed here: " in line


async def test_a_worker_on_another_gpu_than_the_first_says_how_vllm_gets_it(with_vllm, warnings):
    with_vllm(True)
    assert await warnings(DecodeConfig, device="cuda:0") == []
    (line,) = await warnings(DecodeConfig, device="cuda:1")
    assert line == EXPECTED.format("decoder") + (
        "vLLM takes the first GPU, and --device is cuda:1; choose the GPU with CUDA_VISIBLE_DEVICES instead"
    )


async def test_a_worker_with_both_stages_says_that_it_has_no_vllm(with_vllm, warnings):
    with_vllm(True)
    (line,) = await warnings(ColocatedConfig)
    assert line.startswith(EXPECTED.format("full model and the decoder") + "a worker with both stages has no other")


async def test_a_worker_loads_with_its_share_of_the_gpu_and_in_its_turn(with_vllm, warnings, monkeypatch):
    with_vllm(True)
    turns, loaded = [], []

    @contextmanager
    def turn(options):
        turns.append((options.gpu_share, options.tensor_parallel_size))
        yield
        assert len(loaded) == len(turns)

    monkeypatch.setattr(loading, "loading_turn", turn)
    monkeypatch.setattr(loading, "load_engine", lambda *what: loaded.append(what))
    await warnings(DecodeConfig, "--gpu-share", "0.25")
    await warnings(DecodeConfig, "--tensor-parallel-size", "2")
    assert turns == [(0.25, 1), (1.0, 2)]


@pytest.mark.parametrize("loads", [True, False])
async def test_damaged_weights_are_refused_whether_they_load_or_not(loads, fresh, monkeypatch):
    def load(*what):
        assert loads, "the weights make no sense"

    monkeypatch.setattr(loading, "load_engine", load)
    file = fresh() / "decoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    flags = ["--pair", str(file.parent.parent), "--device", "cpu"]
    with pytest.raises(InvalidPair, match=r"decoder\.digest"):
        await loading.load_half_of(DecodeConfig.parse(flags), "decoder")
    monkeypatch.setattr(loading, "load_colocated", lambda *what, **named: load())
    with pytest.raises(InvalidPair, match=r"decoder\.digest"):
        await loading.load_both_halves_of(ColocatedConfig.parse(flags))


async def test_a_worker_ignores_the_weights_of_the_other_half(fresh, monkeypatch):
    monkeypatch.setattr(loading, "load_engine", lambda *what: what[1].decoder_digest)
    folder = fresh()
    (folder / "decoder" / "model.safetensors").unlink()
    config = PrefillConfig.parse(["--pair", str(folder), "--device", "cpu"])
    stated = json.loads((folder / "pair.json").read_text())["decoder"]["digest"]
    assert await loading.load_half_of(config, "full") == stated


async def test_weights_are_checked_while_they_load(fresh, monkeypatch):
    loads, checks = threading.Event(), threading.Event()

    def check(pairs, halves):
        assert halves == ["decoder"]
        checks.set()
        assert loads.wait(60)

    def load(*what):
        loads.set()
        assert checks.wait(60)

    monkeypatch.setattr(loading, "check_digests", check)
    monkeypatch.setattr(loading, "load_engine", load)
    await loading.load_half_of(DecodeConfig.parse(["--pair", str(fresh()), "--device", "cpu"]), "decoder")


async def test_nothing_is_said_on_a_cpu_or_after_a_choice(with_vllm, warnings):
    with_vllm(False)
    assert await warnings(DecodeConfig, device="cpu") == []
    assert await warnings(DecodeConfig, "--engine", "overfill") == []
    assert await warnings(ColocatedConfig, "--engine", "overfill") == []
    assert await warnings(DecodeConfig, engines=["vllm"]) == [], "the choice of the engine refuses it"


def test_memory_for_adapters_is_taken_with_a_folder_of_them_only(tmp_path):
    flags = ["--pair", "p", "--device", "cpu", "--max-adapters", "3", "--max-adapter-rank", "32"]

    def sizes(half, *more):
        options = loading.engine_options(ColocatedConfig.parse([*flags, *more]), half)
        return options.max_adapters, options.max_adapter_rank

    assert sizes("decoder")[0] == 0
    assert sizes("decoder", "--adapters", str(tmp_path)) == (3, 32)
    assert sizes("full", "--adapters", str(tmp_path))[0] == 0
