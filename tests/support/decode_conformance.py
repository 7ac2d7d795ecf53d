"""What every decode engine keeps of the protocol; see ``engine_conformance``."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_conformance import BLOCK_SIZE, LENGTHS, MAX_NUM_SEQS, SAMPLING, EngineConformance, prompt, sampling
from engine_drivers import DecodeDriver, Decoding
from prefill_conformance import keys_of, present_keys
from sampled_reference import Request, assert_same_tokens

from overfill.engine.sequence import FinishReason, Release, Share, Start, Yielded
from overfill.errors import InternalError, InvalidRequest
from overfill.kv.keys import codec_namespace
from overfill.model.processors import LogitProcessor
from overfill.request.params import Grammar, SamplingParams


def assert_right(driver: DecodeDriver, *decodings: Decoding) -> None:
    """Compares answers with the reference's."""
    for decoding in decodings:
        assert decoding.error is None, decoding.error
        expected = driver.reference.answer(decoding.request)
        assert_same_tokens(decoding.tokens, expected.tokens)
        assert decoding.finish is expected.finish


class Broken(Exception):
    """What a broken processor raises."""


def break_sampling(processor: LogitProcessor, part: str) -> None:
    """Lets the part of the sampling that uses ``part`` of the processor raise."""

    def fail(*arguments: object) -> None:
        raise Broken

    if part == "matcher":
        processor.matcher = SimpleNamespace(accept=lambda tokens: None, fill=fail)
    else:
        processor.__class__ = type("BrokenProcessor", (LogitProcessor,), {part: property(fail)})


class DecodeEngineConformance(EngineConformance):
    """A decode engine, and the check that it computes tokens of answers only."""

    half = "decoder"

    def break_sampling(self, driver: DecodeDriver, processor: Any, part: str) -> None:
        """As the function."""
        break_sampling(processor, part)

    @pytest.fixture(autouse=True)
    def _the_decoder_computes_no_prompt_token(self, driver: DecodeDriver) -> Iterator[None]:
        yield
        counted = driver.metrics.registry.get_sample_value("overfill_decode_prompt_tokens_computed_total")
        assert counted == 0


class _AnswerTests(DecodeEngineConformance):
    """Tests of plain answers and replays, for several decoders."""

    @pytest.mark.parametrize("length", LENGTHS)
    def test_the_answer_continues_the_first_token_on_the_full_model_s_kv(self, driver, length):
        assert_right(driver, *driver.answer(Request(prompt(length), sampling("greedy", BLOCK_SIZE + 4))))

    def test_answers_in_a_batch_equal_answers_alone(self, driver):
        requests = [Request(prompt(length), sampling("temperature", 20, seed=length)) for length in LENGTHS]
        assert_right(driver, *driver.answer(*requests))

    @pytest.mark.parametrize("count", [1, 7, 40])
    @pytest.mark.parametrize("name", ["greedy", "frequency_penalty"])
    def test_emitted_tokens_are_replayed_and_neither_sampled_nor_reported_again(self, driver, name, count):
        whole = Request(prompt(BLOCK_SIZE + 1), sampling(name, 48, ignore_eos=True))
        answer = driver.reference.answer(whole)
        (resumed,) = driver.answer(replace(whole, emitted=tuple(answer.ids[:count])))
        assert_right(driver, resumed)
        assert_same_tokens(resumed.tokens, answer.tokens[count:])


class DroppedLayersDecodeConformance(_AnswerTests):
    """Tests a decoder with fewer layers than the full model."""

    pair_fixture = "conformance_pair_with_dropped_layers"


class ReturnsDecodeConformance(_AnswerTests):
    """Tests a decoder that is the reader: its answers are cached and lent like prompts, but for adapters."""

    pair_fixture = "conformance_pair_of_one_model"

    def test_the_next_turn_finds_the_answer_of_the_turn_before(self, driver):
        turn, before = prompt(45), 0
        for number in range(3):
            request = Request(turn, sampling("greedy", 2 * BLOCK_SIZE + 9, ignore_eos=True))
            (decoding,) = driver.answer(request)
            assert_right(driver, decoding)
            assert decoding.held_tokens == before
            turn += tuple(token.token_id for token in decoding.tokens)
            before = (len(turn) - 1) // BLOCK_SIZE * BLOCK_SIZE  # the last token's KV is not computed
            turn += prompt(11, number)

    def test_what_the_answer_left_is_lent_and_named_as_a_router_knows_it(self, driver):
        feed = driver.served.prefix_keys.feed()
        present_keys(feed)
        (decoding,) = driver.answer(Request(prompt(45), sampling("greedy", 2 * BLOCK_SIZE, ignore_eos=True)))
        whole = decoding.request.prompt + tuple(token.token_id for token in decoding.tokens)
        loan = driver.lend(whole)
        assert loan.tokens == 3 * BLOCK_SIZE
        kv = driver.reference.kv(whole[: loan.tokens])
        tolerance = 10 * driver.kv_tolerance  # the answer was computed token by token
        torch.testing.assert_close(driver.lent_kv(loan), kv, rtol=tolerance, atol=tolerance)
        assert set(keys_of(driver, whole[: loan.tokens])) <= present_keys(feed)
        feed.close()

    def test_an_answer_that_is_cancelled_leaves_what_was_computed(self, driver):
        request = Request(prompt(20), sampling("greedy", 200, ignore_eos=True))
        (decoding,) = driver.begin(request)
        driver.run_until(lambda: len(decoding.tokens) > 50)
        driver.release(decoding)
        loan = driver.lend(request.prompt + tuple(token.token_id for token in decoding.tokens))
        assert loan.tokens == 2 * BLOCK_SIZE

    def test_replayed_tokens_are_returned_too(self, driver):
        request = Request(prompt(20), sampling("greedy", 150, ignore_eos=True), emitted=prompt(100, 1))
        (decoding,) = driver.begin(request)
        driver.run_until(lambda: len(decoding.tokens) > 1)
        driver.release(decoding)
        assert driver.lend(request.prompt + request.emitted).tokens == 3 * BLOCK_SIZE

    def test_nothing_is_returned_behind_kv_of_a_lossy_codec(self, driver):
        driver.namespace = codec_namespace(driver.namespace, "int8")
        (decoding,) = driver.answer(Request(prompt(45), sampling("greedy", 2 * BLOCK_SIZE, ignore_eos=True)))
        whole = decoding.request.prompt + tuple(token.token_id for token in decoding.tokens)
        assert driver.lend(whole).tokens == BLOCK_SIZE, "the prompt's"

    def test_an_answer_that_fails_leaves_nothing(self, driver):
        request = Request(prompt(45), sampling("greedy", 2 * BLOCK_SIZE, ignore_eos=True), emitted=prompt(50, 1))
        failing = driver.reserve(request)
        driver.write(failing, torch.full_like(driver.reference.kv(request.prompt), torch.nan))
        driver.start(failing)
        driver.run()
        assert isinstance(failing.error, InternalError)
        driver.release(failing)
        assert driver.lend(request.prompt + request.emitted).tokens == 0

    def test_loans_take_the_place_of_no_sequence(self, driver):
        (decoding,) = driver.answer(Request(prompt(70), sampling("greedy", 5)))
        loans = [driver.lend(prompt(70)) for _ in range(2 * MAX_NUM_SEQS)]
        assert {loan.tokens for loan in loans} == {2 * BLOCK_SIZE}
        assert (driver.load.blocks_used, driver.load.running, driver.load.waiting) == (2, 0, 0)
        assert_right(driver, decoding, *driver.answer(Request(prompt(70, 1), sampling("greedy", 5))))


class DecodeConformance(_AnswerTests):
    """Tests a decode engine that has blocks for every sequence."""

    @pytest.mark.parametrize("name", SAMPLING)
    def test_sampling_parameters_mean_the_same_on_every_engine(self, driver, name):
        assert_right(driver, *driver.answer(Request(prompt(21), sampling(name), sample_index=2)))

    def test_sampling_parameters_of_a_batch_do_not_mix(self, driver):
        names = list(SAMPLING)
        for begin in range(0, len(names), MAX_NUM_SEQS):
            batch = names[begin : begin + MAX_NUM_SEQS]
            assert_right(driver, *driver.answer(*(Request(prompt(21), sampling(name, 9)) for name in batch)))

    def test_sequences_join_and_leave_a_running_batch(self, driver):
        joined = []
        for number in range(5):
            joined += driver.begin(Request(prompt(40, number), sampling("temperature", 6 + 3 * number)))
            driver.step()
        driver.run()
        assert_right(driver, *joined)

    def test_the_shape_of_a_step_is_known(self, driver):
        decodings = driver.begin(*(Request(prompt(9, number), sampling("temperature", 6)) for number in range(3)))
        driver.step()
        # A worker that computes its prompts itself has done so in this step.
        assert driver.core.step_shape in ((3, 3), (3, 27))
        driver.run()
        assert_right(driver, *decodings)

    @pytest.mark.parametrize(
        ("name", "part"), [("repetition_penalty", "penalised"), ("logit_bias", "biased"), ("sampled_regex", "matcher")]
    )
    def test_what_one_sequence_makes_the_sampling_raise_fails_it_alone(self, driver, name, part):
        names = ["greedy", name, name, "all_filters", "frequency_penalty"]
        decodings = driver.begin(*(Request(prompt(21, n), sampling(kind, 12)) for n, kind in enumerate(names)))
        driver.step()
        poisoned = decodings.pop(1)
        self.break_sampling(driver, poisoned.sequence.processor, part)
        driver.run()
        assert isinstance(poisoned.error, Broken)
        assert not poisoned.ended_engine
        driver.release(poisoned)
        assert_right(driver, *decodings)

    @pytest.mark.parametrize("max_tokens", [1, 2, 3])
    def test_max_tokens_counts_the_first_token(self, driver, max_tokens):
        (decoding,) = driver.answer(Request(prompt(9), sampling("greedy", max_tokens)))
        assert_right(driver, decoding)
        assert len(decoding.tokens) == max_tokens

    def test_max_tokens_counts_the_emitted_tokens(self, driver):
        (decoding,) = driver.answer(Request(prompt(9), sampling("greedy", 8), emitted=prompt(7, 1)))
        assert_right(driver, decoding)
        assert len(decoding.tokens) == 1

    @pytest.mark.parametrize("index", [0, 1, 5])
    def test_a_stop_id_ends_the_answer_and_is_not_reported(self, driver, index):
        request = Request(prompt(33), sampling("temperature"))
        ids = driver.reference.answer(request).ids
        assert ids[index] not in ids[:index], "choose another prompt"
        stopping = replace(request.sampling, stop_token_ids=(ids[index],))
        (decoding,) = driver.answer(replace(request, sampling=stopping))
        assert_right(driver, decoding)
        assert decoding.finish is FinishReason.STOP
        assert len(decoding.tokens) == index

    def test_emitted_tokens_are_facts_although_the_decoder_would_not_sample_them(self, driver):
        for emitted in (prompt(1, 1), prompt(40, 1)):
            request = Request(prompt(50), sampling("greedy", 50), emitted)
            other = replace(request, emitted=prompt(len(emitted), 2))
            assert driver.reference.answer(request).ids != driver.reference.answer(other).ids
            assert_right(driver, *driver.answer(request, other))

    def test_a_grammar_continues_behind_emitted_tokens(self, driver):
        whole = Request(prompt(21), sampling("sampled_regex", 20))
        answer = driver.reference.answer(whole)
        for count in (1, 3):
            assert_right(driver, *driver.answer(replace(whole, emitted=tuple(answer.ids[:count]))))

    def test_a_grammar_that_becomes_too_complex_ends_its_own_answer_only(self, driver):
        requests = [Request(prompt(33, n), sampling(name, 30)) for n, name in ((1, "regex"), (2, "greedy"))]
        ambiguous = " | ".join(" ".join(["s"] * count) for count in range(2, 30))
        grammar = Grammar("lark", f'start: s\ns: {ambiguous} | "a"\n')
        until_complex = SamplingParams(temperature=0, max_tokens=60, min_tokens=60, grammar=grammar)
        *beside, doomed = driver.answer(*requests, Request(prompt(20), until_complex))
        assert isinstance(doomed.error, InvalidRequest)
        assert "is too complex" in str(doomed.error)
        assert len(doomed.tokens) >= 1
        assert_right(driver, *beside)

    def test_replays_and_decoding_sequences_share_the_engine(self, driver):
        (decoding,) = driver.begin(Request(prompt(33), sampling("temperature", 30)))
        driver.step()
        replays = [Request(prompt(8, n), sampling("greedy", 60), prompt(50, n)) for n in (1, 2)]
        assert_right(driver, *driver.answer(*replays), decoding)

    def test_the_answer_follows_from_the_kv_that_was_written(self, driver):
        request = Request(prompt(70), sampling("greedy", 20))
        decoding = driver.reserve(request)
        driver.write(decoding, driver.reference.kv(prompt(70, 1)))
        driver.start(decoding)
        driver.run()
        assert [token.token_id for token in decoding.tokens] != driver.reference.answer(request).ids

    def test_a_damaged_chunk_is_not_counted_as_written_and_may_be_written_again(self, driver):
        decoding = driver.reserve(Request(prompt(70), sampling("greedy", 20)))
        assert driver.write(decoding, driver.reference.kv(prompt(70, 1)), damaged=True) == 0
        driver.proceed(decoding)
        driver.run()
        assert_right(driver, decoding)

    @pytest.mark.parametrize("length", LENGTHS)
    def test_a_second_equal_prompt_finds_less_than_the_whole_prompt(self, driver, length):
        request = Request(prompt(length), sampling("greedy", 5))
        (first,) = driver.answer(request)
        found = driver.load.prefix_tokens_found
        (second,) = driver.answer(replace(request, sampling=sampling("temperature", 5)))
        assert first.held_tokens == 0
        assert second.held_tokens < length
        assert second.held_tokens > 0 or length <= BLOCK_SIZE
        assert driver.load.prefix_tokens_found - found == second.held_tokens
        assert_right(driver, first, second)

    def test_equal_prompts_at_once_answer_right(self, driver):
        requests = [Request(prompt(70), sampling("temperature", 8, seed=seed)) for seed in range(4)]
        assert_right(driver, *driver.answer(*requests))

    @pytest.mark.parametrize("ended", [False, True])
    def test_sequences_that_wait_for_a_prompt_get_the_blocks_that_one_of_them_received(self, driver, ended):
        """With ``ended``, that one never runs."""
        requests = [Request(prompt(70), sampling("temperature", 8, seed=seed)) for seed in range(4)]
        leader, *others = map(driver.reserve, requests)
        followers = others[:-1]
        used = driver.load.blocks_used
        driver.write(leader, driver.reference.kv(leader.request.prompt))
        driver.core.handle(Share(leader.id, (*(each.id for each in followers), "unknown")))
        if ended:
            driver.release(leader)
        else:
            driver.start(leader)
        driver.until(lambda: all(len(each.reserved) == 2 for each in followers))
        shared = 70 // BLOCK_SIZE
        assert [each.held_tokens for each in others] == [shared * BLOCK_SIZE] * 2 + [0]
        tables = {tuple(each.reserved[-1].blocks[:shared]) for each in followers}
        assert tables == {tuple(leader.reserved[0].blocks[:shared])}
        assert driver.load.blocks_used < used
        for each in others:
            driver.proceed(each)
        driver.run()
        assert_right(driver, *others, *([] if ended else [leader]))

    def test_kv_is_found_within_its_namespace_only(self, driver):
        request = Request(prompt(70), sampling("greedy", 5))
        own = driver.namespace
        driver.answer(request)
        driver.namespace = own + "/other"
        (other,) = driver.answer(request)
        driver.namespace = own
        (again,) = driver.answer(request)
        assert other.held_tokens == 0
        assert again.held_tokens > 0
        assert_right(driver, other, again)

    def test_kv_that_never_arrived_is_not_found(self, driver):
        request = Request(prompt(70), sampling("greedy", 5))
        driver.release(driver.reserve(request))
        (second,) = driver.answer(request)
        assert second.held_tokens == 0
        assert_right(driver, second)

    @pytest.mark.parametrize("cached", [False, True])
    def test_kv_that_fails_its_sequence_is_not_found_again(self, driver, cached):
        """With ``cached``, the sequence that fails found the prompt's beginning in the cache."""
        request = Request(prompt(70), sampling("greedy", 5))
        if cached:
            driver.answer(replace(request, prompt=prompt(70)[: BLOCK_SIZE + 1]))
        failing = driver.reserve(request)
        driver.write(failing, torch.full_like(driver.reference.kv(request.prompt), torch.nan))
        driver.start(failing)
        driver.run()
        assert isinstance(failing.error, InternalError)
        assert (failing.held_tokens > 0) is cached
        driver.release(failing)
        for other in range(3):  # in blocks that had that KV
            assert_right(driver, *driver.answer(Request(prompt(30, other), sampling("greedy", 5))))
        (again,) = driver.answer(request)
        assert again.held_tokens == 0
        assert_right(driver, again)

    def test_the_next_turns_of_a_chat_never_find_kv_that_the_decoder_wrote(self, driver):
        assert not driver.served.lends_kv
        turn, written_by_the_full_model = prompt(45), 0
        for number in range(4):
            request = Request(turn, sampling("greedy", 2 * BLOCK_SIZE + 9, ignore_eos=True))
            (decoding,) = driver.answer(request)
            assert decoding.held_tokens <= written_by_the_full_model
            assert_right(driver, decoding)
            written_by_the_full_model = len(turn)
            turn += tuple(token.token_id for token in decoding.tokens) + prompt(11, number)

    def test_release_before_the_reservation_is_answered(self, driver):
        driver.release(driver.submit(Request(prompt(70), sampling("greedy")), hold=True))
        driver.assert_empty()
        driver.run()

    def test_release_while_the_kv_is_on_its_way(self, driver):
        waiting = driver.reserve(Request(prompt(70), sampling("greedy")))
        driver.step()
        driver.release(waiting)
        driver.assert_empty()
        driver.core.handle(Start(waiting.id, 5))  # was on its way too
        driver.run()

    def test_release_of_a_running_sequence_leaves_the_others_alone(self, driver):
        decodings = driver.begin(*(Request(prompt(70, number), sampling("temperature", 12)) for number in range(3)))
        driver.run_until(lambda: len(decodings[1].tokens) >= 4)
        used = driver.load.blocks_used
        driver.release(decodings[1])
        assert driver.load.blocks_used < used
        count = len(decodings[1].tokens)
        driver.run()
        assert len(decodings[1].tokens) == count
        assert_right(driver, decodings[0], decodings[2])

    def test_release_during_a_replay(self, driver):
        (decoding,) = driver.begin(Request(prompt(70), sampling("greedy", 200), prompt(100, 1)))
        driver.release(decoding)
        driver.assert_empty()
        driver.run()

    def test_release_of_a_finished_sequence_twice_and_of_an_unknown_one(self, driver):
        (decoding,) = driver.answer(Request(prompt(20), sampling("greedy", 3)))
        for id in (decoding.id, decoding.id, "unknown"):
            driver.core.handle(Release(id))
            driver.assert_empty()
        driver.core.handle(Start("unknown", 5))
        driver.core.handle(Yielded("unknown"))
        driver.run()
        driver.assert_empty()

    def test_load_counts_blocks_from_the_reservation_to_the_release(self, driver):
        before = driver.load
        decoding = driver.reserve(Request(prompt(3 * BLOCK_SIZE + 5), sampling("greedy", 20)))
        reserved = driver.load
        assert before.blocks_used == before.blocks_reserved == 0
        assert reserved.blocks_used == reserved.blocks_reserved == len(decoding.reserved[0].blocks) == 4
        assert reserved.running + reserved.waiting == 1
        driver.proceed(decoding)
        driver.run_until(lambda: len(decoding.tokens) > 1)
        running = driver.load
        assert running.blocks_used == 4
        assert running.blocks_reserved == 0
        assert running.running == 1
        driver.release(decoding)
        assert driver.load.freed_capacity_since(running)

    def test_a_reservation_is_answered_while_a_long_answer_is_replayed(self, driver):
        (replaying,) = driver.begin(Request(prompt(20, 8), sampling("greedy", 960), emitted=prompt(950, 3)))
        driver.step()
        (other,) = driver.begin(Request(prompt(10), sampling("greedy", 9)))
        driver.run()
        assert_right(driver, replaying, other)

    def test_a_full_house_refuses_and_names_the_number(self, driver):
        requests = [Request(prompt(3, number), sampling("greedy", 5)) for number in range(MAX_NUM_SEQS + 1)]
        decodings = [driver.reserve(request) for request in requests[:-1]]
        assert str(MAX_NUM_SEQS) in re.findall(r"\d+", driver.refused(requests[-1]))
        driver.release(decodings.pop())
        decodings.append(driver.reserve(requests[-1]))
        for decoding in decodings:
            driver.proceed(decoding)
        driver.run()
        assert_right(driver, *decodings)

    def test_random_cancellations_lose_no_block(self, driver):
        """Cancels a third of the sequences, each in any state."""
        chance, live = random.Random(1), []
        for number in range(60):
            length = chance.choice(LENGTHS)
            name = chance.choice(["greedy", "temperature"])
            emitted = prompt(chance.choice([0, 0, 5]), number)
            decoding = driver.submit(Request(prompt(length, number % 3), sampling(name, 15), emitted), hold=True)
            live.append(decoding)
            for _ in range(chance.randrange(4)):
                driver.step()
            if chance.random() < 0.7 and decoding.reserved:
                driver.proceed(decoding)
            if chance.random() < 0.33:
                driver.release(chance.choice([each for each in live if not each.released]))
            driver.core.check()
        for decoding in live:
            driver.proceed(decoding)
        driver.run()
        assert_right(driver, *(each for each in live if each.finish is not None))


class SmallDecodeConformance(DecodeEngineConformance):
    """Tests a decode engine that has too few blocks for its sequences."""

    num_blocks = 10
    max_model_len = 256

    def test_a_refusal_when_blocks_are_short_names_numbers_and_changes_nothing(self, driver):
        total = driver.load.blocks_total
        first = driver.reserve(Request(prompt((total // 2) * BLOCK_SIZE - 9), sampling("greedy", 20)))
        before = driver.load
        lacking = Request(prompt((total // 2 + 1) * BLOCK_SIZE - 9), sampling("greedy", 5))
        assert str(total // 2 + 1) in re.findall(r"\d+", driver.refused(lacking))
        assert driver.load.blocks_used == before.blocks_used
        driver.proceed(first)
        driver.run()
        assert_right(driver, first, *driver.answer(lacking))

    def num_preemptions(self, driver: DecodeDriver) -> int:
        return int(driver.metrics.registry.get_sample_value("overfill_decode_preemptions_total"))

    def grow_beyond_the_blocks(self, driver: DecodeDriver, **young_options: Any) -> tuple[Decoding, Decoding]:
        """Reserves two sequences that fit when they start. The older one then needs the blocks of the other's prompt.

        An engine that finds a preempted sequence's own KV in its cache may continue without another ``Reserved``.
        """
        size = (driver.load.blocks_total // 2 - 1) * BLOCK_SIZE - 9
        lengths = (self.max_model_len - size, 3 * BLOCK_SIZE)
        requests = [
            Request(prompt(size, number), sampling("temperature", length, ignore_eos=True, seed=number))
            for number, length in enumerate(lengths)
        ]
        old, young = driver.reserve(requests[0]), driver.reserve(replace(requests[1], **young_options))
        driver.proceed(old)
        return old, young

    def test_a_sequence_that_loses_its_blocks_asks_for_its_kv_again_and_goes_on_as_before(self, driver):
        old, young = self.grow_beyond_the_blocks(driver)
        driver.proceed(young)
        driver.run()
        assert len(young.reserved) > 1, "the younger sequence kept its blocks"
        assert_right(driver, old, young)

    def test_several_sequences_lose_their_blocks(self, driver):
        before = self.num_preemptions(driver)
        size = (driver.load.blocks_total // 3 - 1) * BLOCK_SIZE - 9
        params = [sampling("frequency_penalty", 4 * BLOCK_SIZE, ignore_eos=True, seed=seed) for seed in range(3)]
        decodings = driver.answer(*(Request(prompt(size, number), each) for number, each in enumerate(params)))
        assert self.num_preemptions(driver) > before + 1
        assert_right(driver, *decodings)

    def test_emitted_tokens_and_grammar_survive_the_loss_of_blocks(self, driver):
        digits = SamplingParams(temperature=3.0, seed=5, max_tokens=90, grammar=Grammar("regex", "[0-9]{200}"))
        whole = Request(prompt(50, 2), digits)
        emitted = tuple(driver.reference.answer(whole).ids[:7])
        old, young = self.grow_beyond_the_blocks(driver, sampling=digits, emitted=emitted, prompt=whole.prompt)
        driver.proceed(young)
        driver.run()
        assert_right(driver, old, young)

    def test_a_sequence_whose_kv_is_on_its_way_while_blocks_run_out(self, driver):
        before = self.num_preemptions(driver)
        old, young = self.grow_beyond_the_blocks(driver)
        driver.run()
        driver.proceed(young)
        driver.run()
        assert self.num_preemptions(driver) > before
        assert_right(driver, old, young)

    @pytest.mark.parametrize("yields", [False, True])
    def test_release_of_a_sequence_that_has_lost_its_blocks(self, driver, yields):
        before = self.num_preemptions(driver)
        old, young = self.grow_beyond_the_blocks(driver)
        driver.proceed(young)
        driver.run_until(lambda: self.num_preemptions(driver) > before)
        if yields:
            driver.proceed(young)
        driver.release(young)
        driver.run()
        assert_right(driver, old)

    def test_answers_do_not_displace_cached_prompts(self, driver):
        request = Request(prompt(3 * BLOCK_SIZE + 1), sampling("greedy", 5))
        assert_right(driver, *driver.answer(request))
        for number in range(4):
            assert_right(
                driver, *driver.answer(Request(prompt(5, number), sampling("temperature", 150, ignore_eos=True)))
            )
        (again,) = driver.answer(request)
        assert again.held_tokens == 3 * BLOCK_SIZE
        assert_right(driver, again)

    def test_blocks_of_cached_prompts_are_used_again(self, driver):
        requests = [Request(prompt(100, number), sampling("greedy", 9)) for number in range(6)]
        for request in itertools.chain(requests, requests):
            assert_right(driver, *driver.answer(request))


class SmallReturnsDecodeConformance(DecodeEngineConformance):
    """Tests a decode engine that has too few blocks for its sequences while some are lent."""

    pair_fixture = "conformance_pair_of_one_model"
    num_blocks = 10
    max_model_len = 256

    def test_a_sequence_that_needs_lent_blocks_goes_on_when_they_are_given_back(self, driver):
        total, tokens = driver.load.blocks_total, prompt(3 * BLOCK_SIZE + 1)
        driver.answer(Request(tokens, sampling("greedy", 2)))
        loan = driver.lend(tokens)
        length = (total - 4) * BLOCK_SIZE - 9
        request = Request(prompt(length), sampling("temperature", self.max_model_len - length, ignore_eos=True))
        (decoding,) = driver.begin(request)
        driver.run()
        assert decoding.finish is None
        kv = driver.reference.kv(tokens)[:, :, : loan.tokens]
        torch.testing.assert_close(driver.lent_kv(loan), kv, rtol=driver.kv_tolerance, atol=driver.kv_tolerance)
        driver.end_loan(loan)
        driver.run()
        assert_right(driver, decoding)


class FailedStepDecodeConformance(DecodeEngineConformance):
    """Tests what a failed step does; this class has one test, because the step may end the engine."""

    def test_a_failed_step_ends_its_own_sequences_or_the_worker(self, driver):
        waiting = driver.reserve(Request(prompt(40, 9), sampling("greedy", 5)))
        running = driver.begin(*(Request(prompt(40, number), sampling("greedy", 9)) for number in range(2)))
        driver.run_until(lambda: all(len(decoding.tokens) > 2 for decoding in running))
        counts = [len(decoding.tokens) for decoding in running]
        self.fail_next_step(driver.core)
        try:
            driver.run_until(lambda: running[0].error)
        except RuntimeError:
            assert driver.dead
            assert self.num_failed_steps(driver) == 1
            assert all(isinstance(decoding.error, RuntimeError) and decoding.ended_engine for decoding in running)
            assert waiting.error is None, "it was not in the step"
            return
        assert not any(decoding.ended_engine for decoding in running)
        assert self.num_failed_steps(driver) == 1
        assert all(isinstance(decoding.error, RuntimeError) for decoding in running)
        driver.proceed(waiting)
        driver.run()
        assert [len(decoding.tokens) for decoding in running] == counts
        for decoding in running:
            driver.release(decoding)
        assert_right(driver, waiting, *driver.answer(running[0].request))
