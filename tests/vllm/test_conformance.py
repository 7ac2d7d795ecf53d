"""Runs the conformance tests of the engine protocol on vLLM."""

from __future__ import annotations

from typing import Any

import decode_conformance as decode
import prefill_conformance as prefill
import pytest
from engine_conformance import prompt, sampling
from sampled_reference import Request
from vllm_engines import OnVllm

from overfill.engine.protocol import REPLAY_BUDGET
from overfill.engine.vllm import engine, sampler

# Importing and loading vLLM warns of deprecated uses of torch, which are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")


class CountsLeaks:
    """Test of both engines on vLLM; OverFill's pool has tests of its own."""

    def test_the_load_has_blocks_that_no_sequence_owns(self, driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine, "_RECOUNT", -1.0)
        pool = driver.core._vllm._pool
        assert driver.load.blocks_leaked == 0
        lost = pool.get_new_blocks(2)
        assert driver.load.blocks_leaked == 2
        pool.free_blocks(lost)
        assert driver.load.blocks_leaked == 0


class TestDecode(OnVllm, CountsLeaks, decode.DecodeConformance):
    def test_a_sequence_that_a_full_step_leaves_out_is_refused_after_it(
        self, driver: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(driver.core._vllm._scheduler, "max_num_scheduled_tokens", REPLAY_BUDGET)
        (replaying,) = driver.begin(Request(prompt(20), sampling("greedy", 960), emitted=prompt(950, 3)))
        left_out = driver.submit(Request(prompt(10), sampling("greedy", 9)))
        driver.step()
        assert left_out.refused is not None
        left_out.released = True
        driver.run()
        decode.assert_right(driver, replaying, *driver.answer(left_out.request))

    @pytest.mark.parametrize("part", ["process", "choose"])
    def test_sampling_that_fails_for_all_ends_the_step_s_sequences_and_not_the_engine(
        self, driver: Any, monkeypatch: pytest.MonkeyPatch, part: str
    ) -> None:
        running = driver.begin(*(Request(prompt(20, n), sampling("temperature", 9)) for n in range(2)))
        driver.step()
        before = self.num_failed_steps(driver)

        def fail(*arguments: object) -> None:
            raise decode.Broken

        with monkeypatch.context() as patch:
            patch.setattr(sampler, part, fail)
            driver.step()
        for decoding in running:
            assert isinstance(decoding.error, decode.Broken)
            assert not decoding.ended_engine
            driver.release(decoding)
        assert self.num_failed_steps(driver) == before + (part == "process")
        decode.assert_right(driver, *driver.answer(running[0].request))


class TestDecodeWithDroppedLayers(OnVllm, decode.DroppedLayersDecodeConformance):
    pass


class TestDecodeWithFewBlocks(OnVllm, decode.SmallDecodeConformance):
    pass


class TestReturns(OnVllm, decode.ReturnsDecodeConformance):
    pass


class TestReturnsWithFewBlocks(OnVllm, decode.SmallReturnsDecodeConformance):
    pass


class TestFailedDecodeStep(OnVllm, decode.FailedStepDecodeConformance):
    pass


class TestPrefill(OnVllm, CountsLeaks, prefill.PrefillConformance):
    @pytest.fixture(autouse=True)
    def _announces_each_layer_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The engine would announce the few bytes of a tiny model's layers together, after the step."""
        monkeypatch.setattr("overfill.engine.layers.MIN_NOTIFY_BYTES", 1)


class TestPrefillWithFewBlocks(OnVllm, prefill.SmallPrefillConformance):
    pass


class TestFailedPrefillStep(OnVllm, prefill.FailedStepPrefillConformance):
    pass
