"""What vLLM cannot do here is refused by name, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_features import VLLM_REFUSES

from overfill.engine.device import NotEnoughMemory
from overfill.engine.load import load_engine
from overfill.engine.protocol import EngineOptions
from overfill.engine.vllm import load
from overfill.errors import InvalidRequest, UnsupportedModel
from overfill.model.manifest import Pair

OPTIONS = EngineOptions(device=torch.device("cpu"), dtype="float32", kv_memory=1 << 24)


@pytest.mark.parametrize("refusal", VLLM_REFUSES, ids=lambda refusal: refusal.text)
def test_the_words_of_the_table(vllm_pair: Path, refusal: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        load_engine("vllm", Pair.load(vllm_pair), "decoder", replace(OPTIONS, **refusal.options))
    assert refusal.words in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine_args": {"max_tokens": 3}}, "engine_args: max_tokens is no argument of this vLLM's EngineArgs"),
        ({"engine_args": {"model": "other"}}, "engine_args: model is set by --pair"),
        (
            {"engine_args": {"enforce_eager": "maybe"}},
            'engine_args: vLLM refuses {"enforce_eager": "maybe"}: enforce_eager: Input should be a valid boolean',
        ),
        ({"engine_args": {"gpu_memory_utilization": 7}}, "engine_args: vLLM refuses"),
        ({"max_model_len": 1 << 20}, "max_model_len: 1048576 is more than the model's context of 2048"),
        ({"block_size": 7}, "block_size: 7 does not fit vLLM and the decoder model"),
        ({"engine_args": {"enable_lora": True}}, "engine_args: enable_lora is set by --adapters"),
        ({"engine_args": {"async_scheduling": True}}, "engine_args: async_scheduling is set by OverFill"),
        ({"device": torch.device("cuda", 0)}, "device: cuda does not fit the installed vLLM, which computes on cpu"),
        (
            {"device": torch.device("cuda", 1)},
            "device: cuda:1: vLLM takes the first GPU; choose it with CUDA_VISIBLE_DEVICES",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")  # vLLM's own
def test_settings_that_do_not_fit(vllm_pair: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        load_engine("vllm", Pair.load(vllm_pair), "decoder", replace(OPTIONS, **options))
    assert words in str(raised.value)


@pytest.mark.filterwarnings("ignore")  # vLLM's own
@pytest.mark.parametrize(
    ("options", "advice"),
    [({"kv_memory": 1 << 12, "max_model_len": 512}, "--kv-memory"), ({"max_adapters": 1 << 20}, "--max-adapters")],
)
def test_too_little_memory_is_explained(vllm_pair: Path, options: dict[str, Any], advice: str) -> None:
    with pytest.raises(NotEnoughMemory, match=advice):
        load_engine("vllm", Pair.load(vllm_pair), "decoder", replace(OPTIONS, **options))


@pytest.mark.filterwarnings("ignore")  # vLLM's own
def test_several_kinds_of_kv_cache_do_not_read_as_too_little_memory(
    vllm_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from overfill.engine.vllm import internals

    class Core:
        def __init__(self, *args: object, **options: object) -> None:
            scheduler: Any = object.__new__(internals.Scheduler)
            scheduler.kv_cache_config = SimpleNamespace(kv_cache_groups=["full attention", "sliding window"])
            scheduler.kv_cache_manager = SimpleNamespace(block_pool=None)
            scheduler.connector = type(internals.CONNECTOR, (), {})()
            self.scheduler = scheduler

    monkeypatch.setattr(internals, "EngineCore", Core)
    with pytest.raises(UnsupportedModel, match="2 kinds of KV cache"):
        load_engine("vllm", Pair.load(vllm_pair), "decoder", OPTIONS)


@pytest.mark.parametrize(("share", "utilization"), [(1.0, None), (0.5, 0.46 - 1 / 16)])
def test_a_shared_gpu_is_not_taken_whole(
    share: float, utilization: float | None, vllm_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def stop(arguments: Any, engine_args: Any) -> None:
        asked.append(arguments.get("gpu_memory_utilization"))
        raise InvalidRequest("pair", "enough")

    monkeypatch.setattr(load, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(load, "_vllm_config", stop)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 16 << 30))
    options = EngineOptions(device=torch.device("cuda", 0), dtype="float32", gpu_share=share)
    with pytest.raises(InvalidRequest, match="enough"):
        load.load_vllm(Pair.load(vllm_pair), "decoder", options)
    assert asked == [utilization if utilization is None else pytest.approx(utilization)]
