"""Runs the conformance tests of the engine protocol on the mock engine, except for those of what a model computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import decode_conformance as decode
import prefill_conformance as prefill
import pytest
from adapted_decoding import AdaptedDriver, AdaptedRequest
from engine_conformance import fail_next_step_of, prompt, sampling
from engine_drivers import DecodeDriver
from mock_reference import MockReference
from sampled_reference import Request

from overfill.api.tokenizer import Tokenizer
from overfill.engine.decode import DecodeEngine
from overfill.engine.load import load_engine
from overfill.engine.mock.adapters import adapter_mark
from overfill.engine.prefill import PrefillEngine
from overfill.engine.protocol import EngineCore, EngineOptions, LoadedEngine
from overfill.errors import InternalError, InvalidRequest
from overfill.model.adapter import AdapterRecord, LoraAdapter
from overfill.model.manifest import Half, Pair

TEXT = "the capital of France"


@pytest.fixture(scope="session")
def conformance_reference() -> Callable[[Path], object]:
    return cache(partial(MockReference, text=TEXT))


class Waiting:
    """A core whose ``step`` waits until it is due, as the engine's thread does."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def step(self) -> bool:
        time.sleep(self.core.delay)
        return self.core.step()


class Mock:
    """The hooks of the mock engine."""

    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        arguments = {"answer": TEXT, "answer_tokens": 1 << 30}
        options = replace(options, device=None, engine_args=arguments)
        loaded = load_engine("mock", pair, half, options)
        return replace(loaded, new_core=lambda *given: Waiting(loaded.new_core(*given)))  # type: ignore[arg-type]

    @classmethod
    def fail_next_step(cls, core: Any) -> None:
        assert isinstance(core.core, DecodeEngine | PrefillEngine)
        fail_next_step_of(core.core._runner)


class TestMockDecode(Mock, decode.DecodeConformance):
    # Of what a model computes: its logits, and the sampling.
    test_sampling_parameters_mean_the_same_on_every_engine = None  # type: ignore[assignment]
    test_sampling_parameters_of_a_batch_do_not_mix = None  # type: ignore[assignment]
    test_what_one_sequence_makes_the_sampling_raise_fails_it_alone = None  # type: ignore[assignment]
    test_emitted_tokens_are_facts_although_the_decoder_would_not_sample_them = None  # type: ignore[assignment]
    test_a_grammar_continues_behind_emitted_tokens = None  # type: ignore[assignment]
    test_a_grammar_that_becomes_too_complex_ends_its_own_answer_only = None  # type: ignore[assignment]
    test_the_answer_follows_from_the_kv_that_was_written = None  # type: ignore[assignment]
    test_a_stop_id_ends_the_answer_and_is_not_reported = None  # type: ignore[assignment]

    def test_kv_of_another_prompt_fails_the_sequence(self, driver: DecodeDriver) -> None:
        decoding = driver.reserve(Request(prompt(70), sampling("greedy", 20)))
        driver.write(decoding, driver.reference.kv(prompt(70, 1)))
        driver.start(decoding)
        driver.run()
        assert isinstance(decoding.error, InternalError)
        assert "is not that of its 70 prompt tokens" in str(decoding.error)


class TestMockAdapters(Mock, decode.DecodeEngineConformance):
    decode_driver = AdaptedDriver

    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        return super().load(pair, half, replace(options, max_adapters=2, max_adapter_rank=4))

    def test_answers_begin_with_the_mark_of_their_adapter_in_whichever_slot_it_is(self, driver: AdaptedDriver) -> None:
        tokenizer = Tokenizer.load(driver.reference.pair.full_path)
        records = [AdapterRecord(name, digit * 64, "", 4) for name, digit in (("task", "a"), ("task", "b"))]
        for slot, record in ((0, records[0]), (1, records[1]), (0, records[1]), (1, records[0])):
            assert driver.change(slot, LoraAdapter(record, {})).error is None
            marks = [tokenizer.encode_continuation(adapter_mark(each.record)) for each in driver.adapters.values()]
            requests = [
                AdaptedRequest(prompt(40), sampling("greedy", 60), answer_start=37, slot=used)
                for used in (*driver.adapters, None)
            ]
            for decoding, mark in zip(driver.answer(*requests), [*marks, []], strict=True):
                ids = [token.token_id for token in decoding.tokens]
                assert ids[: len(mark)] == mark
                plain = driver.reference.answer(Request(prompt(40), sampling("greedy", 60 - len(mark)))).ids
                assert ids[len(mark) :] == plain
        with pytest.raises(InvalidRequest, match="'task' has rank 5, more than this worker's --max-adapter-rank 4"):
            driver.served.adapters.stage(0, LoraAdapter(replace(records[0], rank=5), {}))


class TestMockDecodeOfTheReader(Mock, decode.ReturnsDecodeConformance):
    # The script has no logits that could fail.
    test_an_answer_that_fails_leaves_nothing = None  # type: ignore[assignment]


class TestMockDecodeOfTheReaderWithFewBlocks(Mock, decode.SmallReturnsDecodeConformance):
    pass


class TestMockDecodeWithFewBlocks(Mock, decode.SmallDecodeConformance):
    test_emitted_tokens_and_grammar_survive_the_loss_of_blocks = None  # type: ignore[assignment]


class TestMockFailedDecodeStep(Mock, decode.FailedStepDecodeConformance):
    pass


class TestMockPrefill(Mock, prefill.PrefillConformance):
    test_the_first_token_is_sampled_as_the_request_says = None  # type: ignore[assignment]
    test_a_prompt_that_cannot_be_sampled_fails_and_leaves_no_kv_in_the_cache = None  # type: ignore[assignment]


class TestMockPrefillWithFewBlocks(Mock, prefill.SmallPrefillConformance):
    pass


class TestMockFailedPrefillStep(Mock, prefill.FailedStepPrefillConformance):
    pass
