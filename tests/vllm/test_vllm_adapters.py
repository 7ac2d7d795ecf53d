"""Adapters on vLLM: answers equal those of plain transformers, whatever else is in the batch and in the slots."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapted_decoding import AdaptedDriver, AdaptedRequest, assert_adapted, random_adapter
from decode_conformance import DecodeEngineConformance
from engine_conformance import BLOCK_SIZE, MAX_NUM_SEQS, prompt, sampling
from vllm_engines import OnRanks, OnVllm

from overfill.engine.protocol import EngineOptions, LoadedEngine
from overfill.engine.vllm import adapters as adapters_module
from overfill.errors import InternalError, InvalidRequest
from overfill.model.manifest import Half, Pair

# Importing and loading vLLM warns of deprecated uses of torch, which are not ours.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

NUM_SLOTS = 2
MAX_RANK = 6  # vLLM has buffers for 8


class AdapterTests(DecodeEngineConformance):
    """A decoder with two slots, both of which have an adapter before each test."""

    decode_driver = AdaptedDriver

    @pytest.fixture(autouse=True)
    def _adapters(self, driver: AdaptedDriver, _nothing_is_left: None) -> None:
        config = driver.reference.pair.decoder_config
        assert driver.change(0, random_adapter(config, 1, MAX_RANK)).error is None
        assert driver.change(1, random_adapter(config, 2, 3, ["v_proj", "o_proj", "up_proj"])).error is None

    def test_a_batch_mixes_adapters_and_none(self, driver):
        requests = [
            AdaptedRequest(prompt(40, n), sampling(name, 12 + n), answer_start=35, slot=(None, 0, 1)[n % 3])
            for n, name in enumerate(["greedy", "temperature", "sampled_regex", "logprobs"] * 2)
        ]
        assert len(requests) == MAX_NUM_SEQS
        joined = []
        for request in requests:  # reserving never fails, as vLLM has a place for each slot
            joined += driver.begin(request)
            driver.step()
        driver.run()
        for request, decoding in zip(requests, joined, strict=True):
            assert_adapted(driver, request, decoding)

    def test_adapters_come_and_go_while_others_answer(self, driver):
        first, second = dict(driver.adapters).values()
        config = driver.reference.pair.decoder_config
        running = AdaptedRequest(prompt(40), sampling("greedy", 60, ignore_eos=True), answer_start=38, slot=0)
        (decoding,) = driver.begin(running)
        driver.step()
        in_use = driver.change(0, second)
        assert isinstance(in_use.error, InternalError)
        for adapter in (random_adapter(config, 3, 5), None, second):
            assert driver.change(1, adapter).error is None
            driver.step()
            if adapter is not None:
                other = AdaptedRequest(prompt(30), sampling("greedy", 5), answer_start=28, slot=1)
                (beside,) = driver.begin(other)
                driver.run_until(lambda beside=beside: beside.finish)
                assert_adapted(driver, other, beside)
                driver.release(beside)
        driver.run()
        assert_adapted(driver, running, decoding, first)

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
        assert list(Path(slots._folder.name).iterdir()) == []


def with_slots(options: EngineOptions) -> EngineOptions:
    return replace(options, max_adapters=NUM_SLOTS, max_adapter_rank=MAX_RANK)


class TestAdapters(OnVllm, AdapterTests):
    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        return super().load(pair, half, with_slots(options))

    @pytest.mark.parametrize("length", [2, BLOCK_SIZE + 1, 3 * BLOCK_SIZE + 5])
    @pytest.mark.parametrize("tail", [1, BLOCK_SIZE, BLOCK_SIZE + 9])
    def test_the_decoder_computes_the_tail_and_samples_the_first_token(self, driver, length, tail):
        start = max(1, length - tail)
        requests = [
            AdaptedRequest(prompt(length), sampling(name, 9), sample_index=2, answer_start=start, slot=slot)
            for name, slot in (("greedy", None), ("temperature", 0), ("frequency_penalty", 1))
        ]
        for request, decoding in zip(requests, driver.answer(*requests), strict=True):
            assert_adapted(driver, request, decoding)

    @pytest.mark.parametrize("start", [2 * BLOCK_SIZE, 2 * BLOCK_SIZE + 7])
    def test_adapters_share_the_prompt_and_nothing_behind_it(self, driver, start):
        """The tail is longer than a block, so that KV of one adapter would be found under the same tokens."""
        base = AdaptedRequest(prompt(start + 2 * BLOCK_SIZE), sampling("greedy", 40), answer_start=start)
        held = []
        for slot in (0, 1, None, 0):
            (decoding,) = driver.answer(request := replace(base, slot=slot))
            assert_adapted(driver, request, decoding)
            held.append(decoding.held_tokens)
        assert held == [0] + 3 * [start // BLOCK_SIZE * BLOCK_SIZE]

    @pytest.mark.parametrize("count", [1, 40])
    def test_emitted_tokens_pass_through_the_adapter_again(self, driver, count):
        whole = AdaptedRequest(prompt(50), sampling("frequency_penalty", 48, ignore_eos=True), answer_start=44, slot=0)
        (decoding,) = driver.answer(whole)
        resumed = replace(whole, emitted=tuple(token.token_id for token in decoding.tokens[:count]))
        assert_adapted(driver, resumed, *driver.answer(resumed))

    def test_max_tokens_of_one(self, driver):
        request = AdaptedRequest(prompt(20), sampling("greedy", 1), answer_start=19, slot=1)
        assert_adapted(driver, request, *driver.answer(request))

    def test_stage_takes_what_fits_and_leaves_no_weights_behind(self, driver, monkeypatch):
        slots: Any = driver.served.adapters
        config = driver.reference.pair.decoder_config
        folder = Path(slots._folder.name)
        elements = sum(p.down.numel() + p.up.numel() for p in random_adapter(config, 4, 8).products.values())
        assert slots.slot_bytes >= 4 * elements
        assert (slots.num_slots, slots.max_rank) == (NUM_SLOTS, MAX_RANK)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert list(folder.iterdir()) == [], "vLLM has read them"
        with pytest.raises(InvalidRequest, match="'task-4' has rank 7, more than this worker's --max-adapter-rank 6"):
            slots.stage(1, random_adapter(config, 4, MAX_RANK + 1))
        slots.stage(1, random_adapter(config, 4))
        assert [file.name for file in folder.iterdir()] == ["1"]
        with monkeypatch.context() as patch:
            patch.setattr(adapters_module, "save_file", lambda *arguments: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                slots.stage(1, random_adapter(config, 4))
        assert list(folder.iterdir()) == []


class TestAdaptersOnRanks(OnRanks, AdapterTests):
    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        return super().load(pair, half, with_slots(options))
