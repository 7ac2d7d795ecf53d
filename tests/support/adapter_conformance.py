"""What every decode engine with adapters keeps of the protocol; see ``engine_conformance``."""

from __future__ import annotations

from dataclasses import replace

import pytest
from adapted_decoding import AdaptedDriver, AdaptedRequest, assert_adapted
from decode_conformance import DecodeEngineConformance
from engine_conformance import BLOCK_SIZE, MAX_NUM_SEQS, prompt, sampling
from random_adapters import random_adapter

from overfill.engine.protocol import EngineOptions
from overfill.errors import InternalError, InvalidRequest

NUM_SLOTS = 2
MAX_RANK = 6  # vLLM has buffers for 8, and our engine for 16


def with_slots(options: EngineOptions) -> EngineOptions:
    """The options of an engine with slots for these tests."""
    return replace(options, max_adapters=NUM_SLOTS, max_adapter_rank=MAX_RANK)


class _WithAdapters(DecodeEngineConformance):
    """A decoder with two slots, both of which have an adapter before each test."""

    decode_driver = AdaptedDriver

    @pytest.fixture(autouse=True)
    def _adapters(self, driver: AdaptedDriver, _nothing_is_left: None) -> None:
        config = driver.reference.pair.decoder_config
        assert driver.change(0, random_adapter(config, 1, MAX_RANK)).error is None
        assert driver.change(1, random_adapter(config, 2, 3, ["v_proj", "o_proj", "up_proj"])).error is None


class MixedAdapterConformance(_WithAdapters):
    """Tests that adapters of a batch do not mix, whatever is in the slots."""

    def test_a_batch_mixes_adapters_and_none(self, driver):
        requests = [
            AdaptedRequest(prompt(40, n), sampling(name, 12 + n), answer_start=35, slot=(None, 0, 1)[n % 3])
            for n, name in enumerate(["greedy", "temperature", "sampled_regex", "logprobs"] * 2)
        ]
        assert len(requests) == MAX_NUM_SEQS
        joined = []
        for request in requests:
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
        in_use = driver.change(0, None)
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


class AdapterConformance(MixedAdapterConformance):
    """Tests a decode engine that has blocks for every sequence."""

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

    def test_turns_of_a_chat_that_different_tasks_answer_find_only_what_the_full_model_wrote(self, driver):
        """Each tail is longer than a block, and so is each answer."""
        turn, written_by_the_full_model = prompt(45), 0
        for number, slot in enumerate((0, 1, None, 1)):
            params = sampling("greedy", 2 * BLOCK_SIZE + 9, ignore_eos=True)
            request = AdaptedRequest(turn, params, answer_start=len(turn) - BLOCK_SIZE - 3, slot=slot)
            (decoding,) = driver.answer(request)
            assert decoding.held_tokens == written_by_the_full_model
            assert_adapted(driver, request, decoding)
            written_by_the_full_model = request.answer_start // BLOCK_SIZE * BLOCK_SIZE
            turn += tuple(token.token_id for token in decoding.tokens) + prompt(11, number)

    @pytest.mark.parametrize("count", [1, 40])
    def test_emitted_tokens_pass_through_the_adapter_again(self, driver, count):
        whole = AdaptedRequest(prompt(50), sampling("frequency_penalty", 48, ignore_eos=True), answer_start=44, slot=0)
        (decoding,) = driver.answer(whole)
        resumed = replace(whole, emitted=tuple(token.token_id for token in decoding.tokens[:count]))
        assert_adapted(driver, resumed, *driver.answer(resumed))

    def test_max_tokens_of_one(self, driver):
        request = AdaptedRequest(prompt(20), sampling("greedy", 1), answer_start=19, slot=1)
        assert_adapted(driver, request, *driver.answer(request))

    @pytest.mark.parametrize("tail", [3, 40])
    def test_tails_of_several_sequences_beside_running_answers(self, driver, tail):
        """An engine may compute short tails in the steps of the running answers."""
        running = [
            AdaptedRequest(prompt(50, n), sampling("temperature", 40), answer_start=48, slot=slot)
            for n, slot in enumerate((0, None))
        ]
        joining = [
            AdaptedRequest(prompt(60, n), sampling("logprobs", 9), answer_start=60 - tail, slot=slot)
            for n, slot in enumerate((0, 1, None))
        ]
        begun = driver.begin(*running)
        driver.step()
        begun += driver.begin(*joining)
        driver.run()
        for request, decoding in zip(running + joining, begun, strict=True):
            assert_adapted(driver, request, decoding)

    def test_an_empty_slot_and_too_large_a_rank_are_refused(self, driver):
        assert driver.change(1, None).error is None
        request = AdaptedRequest(prompt(30), sampling("greedy", 5), answer_start=28, slot=1)
        assert driver.refused(request) == "slot 1 has no adapter"
        config = driver.reference.pair.decoder_config
        with pytest.raises(InvalidRequest, match=f"'task-4' has rank {MAX_RANK + 1}.* {MAX_RANK}$"):
            driver.served.adapters.stage(1, random_adapter(config, 4, MAX_RANK + 1))


class SmallAdapterConformance(_WithAdapters):
    """Tests a decode engine that has too few blocks for its sequences."""

    num_blocks = 10
    max_model_len = 256

    def test_a_sequence_that_loses_its_blocks_computes_its_tail_and_answer_again(self, driver):
        """Only the KV before ``answer_start`` arrives again; the driver writes no more."""
        size = (driver.load.blocks_total // 2 - 1) * BLOCK_SIZE - 9
        old, young = (
            AdaptedRequest(
                prompt(size, seed),
                sampling("temperature", length, ignore_eos=True, seed=seed),
                answer_start=size - 7,
                slot=seed,
            )
            for seed, length in enumerate((self.max_model_len - size, 3 * BLOCK_SIZE))
        )
        decodings = driver.answer(old, young)
        assert len(decodings[1].reserved) > 1, "the younger sequence kept its blocks"
        for request, decoding in zip((old, young), decodings, strict=True):
            assert_adapted(driver, request, decoding)
