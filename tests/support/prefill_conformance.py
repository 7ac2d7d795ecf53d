"""What every prefill engine keeps of the protocol; see ``engine_conformance``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_conformance import (
    BLOCK_SIZE,
    LENGTHS,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    SAMPLING,
    EngineConformance,
    prompt,
    sampling,
)
from engine_drivers import DecodeDriver, PrefillDriver, Prefilling
from sampled_reference import Request, assert_same_tokens

from overfill.engine.sequence import Imported, Release
from overfill.kv.journal import KeyFeed
from overfill.kv.keys import PromptKeys, root_key
from overfill.model.processors import LogitProcessor
from overfill.request.params import SamplingParams


def assert_computed(driver: PrefillDriver, *prompts: Prefilling) -> None:
    """Compares first tokens and KV with the reference's."""
    for prefilling in prompts:
        assert prefilling.error is None, prefilling.error
        assert prefilling.computed is not None
        expected = [driver.reference.first(prefilling.request)] if prefilling.sequence.sample_first_token else []
        assert_same_tokens([token for token in [prefilling.computed.first] if token is not None], expected)
        kv = driver.reference.kv(prefilling.request.prompt)
        torch.testing.assert_close(prefilling.kv, kv, rtol=driver.kv_tolerance, atol=driver.kv_tolerance)


def keys_of(driver: PrefillDriver | DecodeDriver, tokens: tuple[int, ...]) -> list[int]:
    """The keys of the prompt's full blocks as a router computes them."""
    root = root_key(driver.served.kv_identity.cache_key, driver.namespace)
    return list(PromptKeys(root, tokens)(driver.block_size))


def greedy(length: int, seed: int = 0) -> Request:
    return Request(prompt(length, seed), sampling("greedy"))


class Unwilling(LogitProcessor):
    """A processor that fails."""

    def catch_up(self, emitted: Sequence[int]) -> None:
        raise RuntimeError("unwilling")

    def needed(self, num_emitted: int) -> bool:
        return True


class PrefillConformance(EngineConformance):
    """Tests a prefill engine that has blocks for every prompt."""

    half = "full"

    def unwilling(self, driver: PrefillDriver, params: SamplingParams) -> Any:
        """A processor that fails."""
        return Unwilling(params, [], None)

    @pytest.mark.parametrize("length", LENGTHS)
    def test_kv_and_first_token_are_the_full_model_s(self, driver, length):
        assert_computed(driver, *driver.compute(greedy(length)))

    @pytest.mark.parametrize("name", SAMPLING)
    def test_the_first_token_is_sampled_as_the_request_says(self, driver, name):
        assert_computed(driver, *driver.compute(Request(prompt(21), sampling(name), sample_index=2)))

    def test_no_first_token_unless_it_is_wanted(self, driver):
        prefilling = driver.submit(greedy(40), sample_first_token=False)
        driver.run()
        assert_computed(driver, prefilling)
        assert prefilling.computed.first is None

    def test_several_prompts_at_once(self, driver):
        assert_computed(driver, *driver.compute(*(greedy(length, 1) for length in LENGTHS)))

    def test_equal_prompts_at_once(self, driver):
        assert_computed(driver, *driver.compute(*[greedy(3 * BLOCK_SIZE + 5, 1)] * 4))

    def test_a_long_prompt_is_computed_in_chunks_of_the_budget(self, driver):
        (prefilling,) = driver.compute(greedy(5 * MAX_NUM_BATCHED_TOKENS + 3))
        assert len(prefilling.chunks) == 6
        assert max(end - start for start, end in prefilling.chunks) <= MAX_NUM_BATCHED_TOKENS
        assert_computed(driver, prefilling)

    def test_prompts_arrive_while_others_are_computed(self, driver):
        prompts = []
        for number in range(5):
            prompts.append(driver.submit(greedy(60 + 41 * number, number)))
            driver.step()
        driver.run()
        assert_computed(driver, *prompts)

    def test_kv_stays_as_it_is_until_the_release(self, driver):
        (kept,) = driver.compute(greedy(100))
        driver.compute(*(greedy(90, number) for number in range(4)))
        kept.read = [0] * len(kept.read)
        for layer in range(len(kept.read)):
            driver.read(kept, layer, 100, None)
        assert_computed(driver, kept)

    def test_the_second_of_two_equal_prompts_takes_its_beginning_from_the_cache(self, driver):
        first, second = (driver.compute(greedy(3 * BLOCK_SIZE + 5))[0] for _ in range(2))
        assert first.cached_tokens == 0
        assert second.cached_tokens == 3 * BLOCK_SIZE
        assert second.chunks == [(3 * BLOCK_SIZE, 3 * BLOCK_SIZE + 5)]
        assert_computed(driver, first, second)

    @pytest.mark.parametrize("length", LENGTHS)
    def test_the_last_token_is_always_computed(self, driver, length):
        for _ in range(2):
            (prefilling,) = driver.compute(greedy(length, 1))
            driver.cancel(prefilling)
            assert prefilling.cached_tokens < length
            assert_computed(driver, prefilling)

    def test_prefixes_are_shared_within_a_namespace_only(self, driver):
        own = driver.namespace
        driver.compute(greedy(70))
        driver.namespace = own + "/other"
        (other,) = driver.compute(greedy(70))
        driver.namespace = own
        (again,) = driver.compute(greedy(70))
        assert other.cached_tokens == 0
        assert again.cached_tokens == 2 * BLOCK_SIZE
        assert_computed(driver, other, again)

    def test_load_counts_the_tokens_that_the_cache_had(self, driver):
        driver.compute(greedy(70))
        before = driver.load
        driver.compute(greedy(70))
        assert driver.load.prefix_tokens_found - before.prefix_tokens_found == 2 * BLOCK_SIZE
        assert driver.load.prefix_tokens_looked_up - before.prefix_tokens_looked_up == 70

    @pytest.mark.parametrize("length", [BLOCK_SIZE - 1, 2 * BLOCK_SIZE, 3 * BLOCK_SIZE + 5])
    def test_the_journal_reports_the_keys_that_a_router_computes(self, driver, length):
        feed = driver.served.prefix_keys.feed()
        present_keys(feed)
        tokens = prompt(length, 7)
        driver.compute(Request(tokens, sampling("greedy")))
        keys = keys_of(driver, tokens)
        assert driver.served.blocks_of(tokens, driver.namespace).keys == keys
        assert present_keys(feed) == set(keys)
        feed.close()

    @pytest.mark.parametrize("blocks", [0, 1, 3])
    def test_what_is_imported_is_not_computed_and_found_later(self, driver, blocks):
        request = greedy(3 * BLOCK_SIZE + 5)
        prefilling = driver.submit(request, imports=True)
        driver.import_kv(prefilling, driver.reference.kv(request.prompt), blocks * BLOCK_SIZE)
        driver.run()
        assert prefilling.awaiting.cached_tokens == 0
        assert prefilling.chunks[0][0] == prefilling.cached_tokens == blocks * BLOCK_SIZE
        assert_computed(driver, prefilling)
        (again,) = driver.compute(request)
        assert again.cached_tokens == 3 * BLOCK_SIZE
        assert_computed(driver, again)

    def test_a_prompt_imports_what_the_cache_lacks(self, driver):
        request = greedy(3 * BLOCK_SIZE + 5)
        driver.compute(replace(request, prompt=request.prompt[: BLOCK_SIZE + 1]))
        prefilling = driver.submit(request, imports=True)
        driver.import_kv(prefilling, driver.reference.kv(request.prompt), 2 * BLOCK_SIZE)
        driver.run()
        assert prefilling.awaiting.cached_tokens == BLOCK_SIZE
        assert prefilling.cached_tokens == 2 * BLOCK_SIZE
        assert_computed(driver, prefilling)

    def test_the_rest_is_computed_on_the_kv_that_was_imported(self, driver):
        request = greedy(2 * BLOCK_SIZE + 5)
        prefilling = driver.submit(request, imports=True)
        foreign = driver.reference.kv(prompt(2 * BLOCK_SIZE + 5, 1))
        driver.import_kv(prefilling, foreign, 2 * BLOCK_SIZE)
        driver.run()
        torch.testing.assert_close(prefilling.kv[:, :, : 2 * BLOCK_SIZE], foreign[:, :, : 2 * BLOCK_SIZE])

    def test_other_prompts_are_computed_while_one_is_imported(self, driver):
        first = driver.submit(greedy(2 * BLOCK_SIZE + 5), imports=True)
        (other,) = driver.compute(greedy(70, 1))
        assert first.awaiting is not None
        assert first.scheduled is None
        assert_computed(driver, other)
        driver.import_kv(first, driver.reference.kv(first.request.prompt), BLOCK_SIZE)
        driver.run()
        assert_computed(driver, first)

    @pytest.mark.parametrize("length", [BLOCK_SIZE - 1, BLOCK_SIZE, 2 * BLOCK_SIZE])
    def test_a_prompt_that_lacks_no_full_block_is_computed_at_once(self, driver, length):
        """The last token is always computed."""
        if length == 2 * BLOCK_SIZE:
            driver.compute(greedy(length))
        prefilling = driver.submit(greedy(length), imports=True)
        driver.run()
        assert prefilling.awaiting is None
        assert_computed(driver, prefilling)

    def test_release_of_a_prompt_that_is_being_imported(self, driver):
        prefilling = driver.submit(greedy(2 * BLOCK_SIZE + 5), imports=True)
        driver.until(lambda: prefilling.awaiting)
        assert driver.load.blocks_used == 3
        driver.cancel(prefilling)
        driver.assert_empty()
        driver.core.handle(Imported(prefilling.id, BLOCK_SIZE))  # was on its way
        (again,) = driver.compute(prefilling.request)
        assert again.cached_tokens == 0
        assert_computed(driver, again)

    def test_cached_blocks_are_lent(self, driver):
        tokens = prompt(3 * BLOCK_SIZE + 5)
        (prefilling,) = driver.compute(Request(tokens, sampling("greedy")))
        driver.cancel(prefilling)
        loan = driver.lend((*tokens, 9))
        assert (loan.tokens, len(loan.blocks)) == (3 * BLOCK_SIZE, 3)
        kv = driver.reference.kv(tokens)[:, :, : loan.tokens]
        torch.testing.assert_close(driver.lent_kv(loan), kv, rtol=driver.kv_tolerance, atol=driver.kv_tolerance)
        assert (driver.load.blocks_used, driver.load.running, driver.load.waiting) == (3, 0, 0)
        assert driver.lend(tokens[: 2 * BLOCK_SIZE]).tokens == 2 * BLOCK_SIZE, "no token is left to compute"
        driver.core.check()

    def test_what_is_not_cached_in_the_namespace_is_not_lent(self, driver):
        driver.compute(greedy(70))
        assert driver.lend(prompt(70, 1)).tokens == 0
        driver.namespace += "/other"
        assert (loan := driver.lend(prompt(70))).tokens == 0
        assert not loan.blocks

    def test_loans_take_the_place_of_no_prompt(self, driver):
        driver.compute(greedy(70))
        for _ in range(2 * MAX_NUM_SEQS):
            assert driver.lend(prompt(70)).tokens == 2 * BLOCK_SIZE
        assert_computed(driver, *driver.compute(greedy(70), greedy(90, 1)))

    def test_load_counts_blocks_and_tokens_from_the_submission_to_the_release(self, driver):
        prefilling = driver.submit(greedy(3 * BLOCK_SIZE + 5))
        queued = driver.load
        assert (queued.blocks_used, queued.queued_tokens) == (0, 3 * BLOCK_SIZE + 5)
        assert queued.running + queued.waiting == 1
        driver.step()
        assert driver.load.blocks_used > 0
        assert driver.load.queued_tokens < queued.queued_tokens
        driver.run()
        assert (driver.load.blocks_used, driver.load.queued_tokens) == (4, 0)
        used = driver.load
        driver.cancel(prefilling)
        assert driver.load.freed_capacity_since(used)

    def test_load_counts_all_blocks_of_a_prompt_from_its_first_chunk_on(self, driver):
        """A router must not place another prompt on blocks that this one will need."""
        blocks = 3 * MAX_NUM_BATCHED_TOKENS // BLOCK_SIZE
        driver.submit(greedy(blocks * BLOCK_SIZE))
        driver.step()
        load, computed = driver.load, MAX_NUM_BATCHED_TOKENS // BLOCK_SIZE
        assert (load.blocks_used, load.blocks_reserved) == (blocks, blocks - computed)
        assert load.blocks_used + load.blocks_cached <= load.blocks_total
        driver.run()
        assert (driver.load.blocks_used, driver.load.blocks_reserved) == (blocks, 0)

    def test_cancel_before_the_first_step(self, driver):
        driver.cancel(driver.submit(greedy(70)))
        driver.assert_empty()
        driver.run()

    def test_cancel_behind_others_in_the_queue(self, driver):
        first, queued, last = (driver.submit(greedy(3 * MAX_NUM_BATCHED_TOKENS, number)) for number in range(3))
        driver.step()
        driver.cancel(queued)
        driver.run()
        assert_computed(driver, first, last)

    def test_cancel_between_two_chunks(self, driver):
        other, prefilling = driver.submit(greedy(40)), driver.submit(greedy(3 * MAX_NUM_BATCHED_TOKENS))
        driver.until(lambda: prefilling.chunks)
        driver.cancel(prefilling)
        driver.run()
        assert_computed(driver, other)

    def test_cancel_between_two_layers(self, driver):
        prefilling = driver.submit(greedy(3 * MAX_NUM_BATCHED_TOKENS))

        def cancel(announced: Prefilling) -> None:
            announced.sequence.cancelled |= announced is prefilling

        driver.on_kv = cancel
        driver.until(lambda: prefilling.sequence.cancelled)
        driver.cancel(prefilling)
        driver.assert_empty()
        assert_computed(driver, *driver.compute(prefilling.request))

    def test_cancel_of_a_cancelled_prompt_that_has_not_been_released(self, driver):
        """The flag is set on another thread, which sends ``Release`` later."""
        prefilling, other = driver.submit(greedy(200)), driver.submit(greedy(30))
        prefilling.sequence.cancelled = True
        for _ in range(3):
            driver.step()
        driver.cancel(prefilling)
        driver.run()
        assert_computed(driver, other)

    def test_release_of_a_computed_prompt_twice_and_of_an_unknown_one(self, driver):
        (prefilling,) = driver.compute(greedy(70))
        assert driver.load.blocks_used > 0
        driver.cancel(prefilling)
        for id in (prefilling.id, "unknown"):
            driver.assert_empty()
            driver.core.handle(Release(id))
        driver.run()

    @pytest.mark.parametrize("length", [40, 2 * MAX_NUM_BATCHED_TOKENS + 40])
    def test_a_prompt_that_cannot_be_sampled_fails_and_leaves_no_kv_in_the_cache(self, driver, length):
        """Its KV may be the cause, that of earlier chunks too."""
        failing, beside = driver.submit(greedy(length, 6)), driver.submit(greedy(20, 7))
        failing.sequence.processor = self.unwilling(driver, failing.request.sampling)
        driver.run()
        assert str(failing.error) == "unwilling"
        assert_computed(driver, beside)
        driver.cancel(failing)
        (again,) = driver.compute(failing.request)
        assert again.cached_tokens == 0
        assert_computed(driver, again)

    def test_a_cancelled_prompt_leaves_only_right_kv_in_the_cache(self, driver):
        prefilling = driver.submit(greedy(4 * MAX_NUM_BATCHED_TOKENS))
        driver.until(lambda: len(prefilling.chunks) == 2)
        driver.cancel(prefilling)
        (again,) = driver.compute(prefilling.request)
        assert again.cached_tokens <= 2 * MAX_NUM_BATCHED_TOKENS
        assert_computed(driver, again)


class SmallPrefillConformance(EngineConformance):
    """Tests a prefill engine that has too few blocks for its prompts."""

    half = "full"
    num_blocks = 10
    max_model_len = 256

    def test_a_prompt_waits_until_blocks_are_free(self, driver):
        length = (driver.load.blocks_total - 3) * BLOCK_SIZE - 9
        first, second = driver.compute(greedy(length, 1), greedy(length, 2))
        assert first.computed is not None
        assert second.computed is None
        driver.cancel(first)
        driver.run()
        assert_computed(driver, first, second)

    def test_a_prompt_that_waits_for_blocks_can_be_cancelled(self, driver):
        length = (driver.load.blocks_total - 3) * BLOCK_SIZE - 9
        first, second = driver.compute(greedy(length, 1), greedy(length, 2))
        driver.cancel(second)
        driver.cancel(first)
        driver.assert_empty()

    def test_lent_blocks_are_not_evicted(self, driver):
        tokens = prompt(3 * BLOCK_SIZE + 1)
        (lent,) = driver.compute(Request(tokens, sampling("greedy")))
        driver.cancel(lent)
        loan = driver.lend(tokens)
        for seed in range(4):
            (prefilling,) = driver.compute(greedy(4 * BLOCK_SIZE, seed))
            assert_computed(driver, prefilling)
            driver.cancel(prefilling)
        kv = driver.reference.kv(tokens)[:, :, : 3 * BLOCK_SIZE]
        torch.testing.assert_close(driver.lent_kv(loan), kv, rtol=driver.kv_tolerance, atol=driver.kv_tolerance)
        (waiting,) = driver.compute(greedy((driver.load.blocks_total - 3) * BLOCK_SIZE + 1, 9))
        assert waiting.computed is None, "it needs a lent block"
        driver.end_loan(loan)
        driver.run()
        assert_computed(driver, waiting)

    def test_the_journal_reports_what_is_evicted(self, driver):
        """The next equal prompt finds exactly the leading blocks whose keys are present."""
        feed = driver.served.prefix_keys.feed()
        present: set[int] = set()
        partly = False
        for seed in (0, 1, 0, 1, 2, 0, 2, 1):
            request = greedy(5 * BLOCK_SIZE + 1, seed)
            keys = keys_of(driver, request.prompt)
            leading = next((index for index, key in enumerate(keys) if key not in present), len(keys))
            partly |= 0 < leading < len(keys)
            (prefilling,) = driver.compute(request)
            assert prefilling.cached_tokens == leading * BLOCK_SIZE
            assert_computed(driver, prefilling)
            driver.cancel(prefilling)
            present = present_keys(feed, present)
        assert partly, "choose other prompts"
        feed.close()


class FailedStepPrefillConformance(EngineConformance):
    """Tests what a failed step does; this class has one test, because the step may end the engine."""

    half = "full"

    def test_a_failed_step_ends_its_own_prompts_or_the_worker(self, driver):
        failing, later = driver.submit(greedy(MAX_NUM_BATCHED_TOKENS)), driver.submit(greedy(70, 1))
        self.fail_next_step(driver.core)
        try:
            driver.until(lambda: failing.error)
        except RuntimeError:
            assert driver.dead
            assert self.num_failed_steps(driver) == 1
            assert isinstance(failing.error, RuntimeError)
            assert failing.ended_engine
            return
        assert not failing.ended_engine
        assert self.num_failed_steps(driver) == 1
        assert isinstance(failing.error, RuntimeError)
        assert failing.computed is None
        driver.run()
        driver.cancel(failing)
        (again,) = driver.compute(failing.request)
        assert again.cached_tokens == 0
        assert_computed(driver, later, again)


def present_keys(feed: KeyFeed, before: set[int] | None = None) -> set[int]:
    """The keys in the cache after the changes in ``feed``, which has reported ``before``."""
    present = set(before or ())
    while (delta := feed.take()) is not None:
        present |= set(delta.added)
        present -= set(delta.removed)
    return present
