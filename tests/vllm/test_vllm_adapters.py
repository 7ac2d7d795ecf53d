"""Adapters on vLLM: answers equal those of plain transformers, whatever else is in the batch and in the slots."""

from __future__ import annotations

import stat
from dataclasses import replace
from typing import Any

import pytest
from adapted_decoding import AdaptedRequest, assert_adapted
from adapter_conformance import (
    MAX_RANK,
    NUM_SLOTS,
    AdapterConformance,
    MixedAdapterConformance,
    SmallAdapterConformance,
    with_slots,
)
from engine_conformance import prompt, sampling
from random_adapters import random_adapter
from vllm_engines import OnRanks, OnVllm

from overfill.engine.protocol import EngineOptions, LoadedEngine
from overfill.engine.vllm import adapters as adapters_module
from overfill.errors import InvalidRequest
from overfill.model.manifest import Half, Pair

# Importing and loading vLLM warns of deprecated uses of torch, which are not ours.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


def staged(slots: Any) -> list[str]:
    """Names of the slots whose adapters vLLM has not read."""
    return [file.name for file in slots._folder.iterdir() if file.is_dir()]


class AdapterTests(MixedAdapterConformance):
    """Tests of vLLM with any number of ranks."""

    def test_an_adapter_that_vllm_does_not_take_leaves_the_slot_empty(self, driver, monkeypatch):
        monkeypatch.setattr(adapters_module, "check_fits", lambda *arguments: None)
        slots: Any = driver.served.adapters
        adapter = random_adapter(driver.reference.pair.decoder_config, 5)
        products = {(layer + 7, projection): product for (layer, projection), product in adapter.products.items()}
        changed = driver.change(1, replace(adapter, products=products))
        assert "the model has no model.layers.7.mlp.down_proj" in str(changed.error)
        request = AdaptedRequest(prompt(30), sampling("greedy", 5), answer_start=28, slot=1)
        assert "slot 1 has no adapter" in driver.refused(request)
        assert driver.change(1, adapter).error is None
        assert_adapted(driver, request, *driver.answer(request))
        assert staged(slots) == []


class TestAdapters(OnVllm, AdapterTests, AdapterConformance):
    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        return super().load(pair, half, with_slots(options))

    def test_stage_takes_what_fits_and_leaves_no_weights_behind(self, driver, monkeypatch):
        slots: Any = driver.served.adapters
        config = driver.reference.pair.decoder_config
        elements = sum(p.down.numel() + p.up.numel() for p in random_adapter(config, 4, 8).products.values())
        assert slots.slot_bytes >= 4 * elements
        assert (slots.num_slots, slots.max_rank) == (NUM_SLOTS, MAX_RANK)
        assert stat.S_IMODE(slots._folder.stat().st_mode) == 0o700
        assert staged(slots) == [], "vLLM has read them"
        with pytest.raises(InvalidRequest, match="'task-4' has rank 7, more than this worker's --max-adapter-rank 6"):
            slots.stage(1, random_adapter(config, 4, MAX_RANK + 1))
        slots.stage(1, random_adapter(config, 4))
        assert staged(slots) == ["1"]
        with monkeypatch.context() as patch:
            patch.setattr(adapters_module, "save_file", lambda *arguments: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                slots.stage(1, random_adapter(config, 4))
        assert staged(slots) == []


class TestAdaptersWithFewBlocks(OnVllm, SmallAdapterConformance):
    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        return super().load(pair, half, with_slots(options))


class TestAdaptersOnRanks(OnRanks, AdapterTests):
    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        return super().load(pair, half, with_slots(options))
