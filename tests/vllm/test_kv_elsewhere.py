"""What only vLLM does with KV that it imports, lends or returns: which blocks its scheduler may touch meanwhile.

What every engine does is in the conformance tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from adapted_decoding import AdaptedDriver, AdaptedRequest
from adapter_conformance import with_slots
from decode_conformance import DecodeEngineConformance, assert_right
from engine_conformance import BLOCK_SIZE, EngineConformance, prompt, sampling
from engine_drivers import DecodeDriver, PrefillDriver
from prefill_conformance import assert_computed, greedy, keys_of, present_keys
from random_adapters import random_adapter
from sampled_reference import Request
from vllm_engines import OnVllm

from overfill.engine.load import load_engine
from overfill.engine.protocol import EngineOptions, LoadedEngine
from overfill.engine.sequence import Imported, Lend
from overfill.model.manifest import Half, Pair

# Importing and loading vLLM warns of deprecated uses of torch, which are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 3 * BLOCK_SIZE + 5


class TestImports(OnVllm, EngineConformance):
    half = "full"

    @pytest.mark.parametrize("name", ["greedy", "temperature"])
    def test_nothing_is_computed_before_the_import_ends(self, driver: Any, name: str) -> None:
        importing = driver.submit(Request(prompt(LENGTH), sampling(name)), imports=True)
        driver.until(lambda: importing.awaiting)
        assert not driver.step()
        driver.import_kv(importing, driver.reference.kv(prompt(LENGTH)), 2 * BLOCK_SIZE)
        driver.run()
        assert importing.scheduled.blocks[:3] == importing.awaiting.blocks
        assert importing.chunks == [(2 * BLOCK_SIZE, LENGTH)]
        assert_computed(driver, importing)

    def test_imported_tokens_do_not_count_as_found_in_the_cache(self, driver: Any) -> None:
        driver.compute(Request(prompt(LENGTH)[: BLOCK_SIZE + 3], sampling("greedy")))
        before = driver.load
        importing = driver.submit(greedy(LENGTH), imports=True)
        driver.import_kv(importing, driver.reference.kv(prompt(LENGTH)), 3 * BLOCK_SIZE)
        driver.run()
        assert driver.load.prefix_tokens_found - before.prefix_tokens_found == BLOCK_SIZE
        assert driver.load.prefix_tokens_looked_up - before.prefix_tokens_looked_up == LENGTH

    def test_load_has_the_cost_of_a_computed_token(self, driver: Any) -> None:
        driver.compute(greedy(70))
        assert driver.load.token_seconds > 0

    def test_no_step_touches_a_block_that_is_being_written(self, driver: Any) -> None:
        importing = driver.submit(greedy(LENGTH), imports=True)
        driver.until(lambda: importing.awaiting)
        pattern = torch.arange(driver.reference.kv(prompt(LENGTH)).numel(), dtype=torch.float32)
        pattern = pattern.view_as(driver.reference.kv(prompt(LENGTH)))[:, :, : 3 * BLOCK_SIZE]
        layers = range(driver.served.kv.num_layers)
        driver._write(importing.awaiting.blocks, pattern, 0, 3 * BLOCK_SIZE, layers, damaged=False)
        others = driver.compute(*(greedy(200, seed) for seed in range(1, 6)))
        kept = [driver._read(importing.awaiting.blocks, layer, 0, 3 * BLOCK_SIZE, None) for layer in layers]
        assert torch.equal(torch.cat(kept, 1), pattern)
        driver.import_kv(importing, driver.reference.kv(prompt(LENGTH)), 2 * BLOCK_SIZE)
        driver.run()
        assert_computed(driver, importing, *others)

    def test_prompts_that_need_an_imported_block_next_wait_for_it(self, driver: Any) -> None:
        importing = driver.submit(greedy(LENGTH), imports=True)
        driver.until(lambda: importing.awaiting)
        same = driver.submit(greedy(LENGTH), imports=True)
        plain = driver.submit(Request(prompt(LENGTH)[:-1], sampling("greedy")))
        longer = driver.submit(Request(prompt(LENGTH) + prompt(BLOCK_SIZE, 9), sampling("greedy")), imports=True)
        other = driver.submit(greedy(40, 1))
        driver.run()
        assert [p.computed is not None for p in (same, plain, longer, other)] == [False, False, False, True]
        driver.import_kv(importing, driver.reference.kv(prompt(LENGTH)), 3 * BLOCK_SIZE)
        driver.run()
        assert same.awaiting is None
        assert longer.awaiting.cached_tokens == 3 * BLOCK_SIZE
        driver.import_kv(longer, driver.reference.kv(longer.request.prompt), 4 * BLOCK_SIZE)
        driver.run()
        assert [p.cached_tokens for p in (same, plain, longer)] == [3 * BLOCK_SIZE, 3 * BLOCK_SIZE, 4 * BLOCK_SIZE]
        assert_computed(driver, importing, same, plain, longer, other)

    def test_an_import_of_nothing_finds_what_was_computed_meanwhile(
        self, driver: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = driver.core._vllm._scheduler.scheduler_config
        monkeypatch.setattr(config, "long_prefill_token_threshold", BLOCK_SIZE // 4)
        computing = driver.submit(greedy(LENGTH))
        importing = driver.submit(greedy(LENGTH), imports=True)
        driver.until(lambda: importing.awaiting)
        assert importing.awaiting.cached_tokens == 0
        driver.run()
        driver.core.handle(Imported(importing.id, 0))
        driver.run()
        assert importing.cached_tokens == 3 * BLOCK_SIZE
        assert_computed(driver, computing, importing)

    @pytest.mark.parametrize("ready", [False, True], ids=["writing", "imported"])
    def test_a_prompt_that_ends_lets_those_that_wait_for_it_go_on(self, driver: Any, ready: bool) -> None:
        leaving = driver.submit(greedy(LENGTH), imports=True)
        driver.until(lambda: leaving.awaiting)
        same = driver.submit(greedy(LENGTH), imports=True)
        driver.step()
        if ready:
            driver.import_kv(leaving, driver.reference.kv(prompt(LENGTH)), BLOCK_SIZE)
        driver.cancel(leaving)
        driver.until(lambda: same.awaiting)
        assert same.awaiting.cached_tokens == 0, "nothing was published"
        driver.import_kv(same, driver.reference.kv(prompt(LENGTH)), BLOCK_SIZE)
        driver.run()
        assert_computed(driver, same)

    def test_a_prompt_that_shares_nothing_imports_nothing(self, driver: Any) -> None:
        unshared = driver.submit(greedy(LENGTH), imports=True)
        unshared.sequence.prompt_blocks = None
        driver.run()
        assert unshared.awaiting is None
        assert_computed(driver, unshared)

    def test_a_block_is_lent_and_reported_once_it_is_imported(self, driver: Any) -> None:
        feed = driver.served.prefix_keys.feed()
        present_keys(feed)
        importing = driver.submit(greedy(LENGTH), imports=True)
        driver.until(lambda: importing.awaiting)
        assert driver.lend(prompt(LENGTH)).tokens == 0
        assert present_keys(feed) == set()
        driver.import_kv(importing, driver.reference.kv(prompt(LENGTH)), 2 * BLOCK_SIZE)
        driver.run()
        assert driver.lend(prompt(LENGTH)).tokens == 3 * BLOCK_SIZE
        assert present_keys(feed) == set(keys_of(driver, prompt(LENGTH)))
        feed.close()

    def test_a_loan_begins_between_two_layers_and_has_no_block_of_the_running_step(self, driver: Any) -> None:
        driver.compute(greedy(LENGTH))
        running = driver.submit(Request(prompt(LENGTH) + prompt(LENGTH, 1), sampling("greedy")))
        chunks = []

        def new_loans() -> list[Lend]:
            if "in a step" in driver.loans:
                return []
            chunks.append(len(running.chunks))
            return [Lend("in a step", driver.served.blocks_of(running.request.prompt, driver.namespace))]

        driver.core.new_loans = new_loans
        driver.run()
        driver.core.new_loans = tuple
        loan = driver.loans["in a step"]
        assert (chunks, loan.tokens) == ([0], 3 * BLOCK_SIZE)
        kv = driver.reference.kv(prompt(LENGTH))[:, :, : loan.tokens]
        torch.testing.assert_close(driver.lent_kv(loan), kv, rtol=1e-4, atol=1e-4)
        assert_computed(driver, running)
        assert driver.lend(running.request.prompt).tokens == len(running.request.prompt) // BLOCK_SIZE * BLOCK_SIZE


class TestImportsWithFewBlocks(OnVllm, EngineConformance):
    half = "full"
    num_blocks = 10
    max_model_len = 320

    def test_an_import_waits_for_blocks_and_keeps_those_of_its_rest(self, driver: Any) -> None:
        size = driver.load.blocks_total - 3
        (first,) = driver.compute(greedy(size * BLOCK_SIZE - 9, 1))
        importing = driver.submit(greedy(size * BLOCK_SIZE - 9, 2), imports=True)
        driver.run()
        assert importing.awaiting is None
        driver.cancel(first)
        driver.until(lambda: importing.awaiting)
        assert driver.load.blocks_used == size
        later = driver.submit(greedy(4 * BLOCK_SIZE, 3))
        driver.run()
        assert later.computed is None, "the import's last block was given away"
        driver.core.handle(Imported(importing.id, 0))
        driver.run()
        assert_computed(driver, importing)
        driver.cancel(importing)
        driver.run()
        assert_computed(driver, later)

    def test_blocks_that_a_running_prompt_will_need_are_not_lent(self, driver: Any) -> None:
        """Otherwise vLLM would preempt the prompt, whose blocks a stream reads."""
        (cached,) = driver.compute(greedy(LENGTH))
        driver.cancel(cached)
        running = driver.submit(greedy((driver.load.blocks_total - 1) * BLOCK_SIZE - 7, 1))
        driver.step()
        assert len(running.sequence.blocks) < 3
        assert driver.lend(prompt(LENGTH)).tokens <= BLOCK_SIZE
        driver.run()
        assert_computed(driver, running)

    def test_loans_leave_blocks_to_prompts_and_take_none_for_which_one_waits(self, driver: Any) -> None:
        total = driver.load.blocks_total
        (first,) = driver.compute(greedy(total * BLOCK_SIZE - 9, 1))
        driver.cancel(first)
        loans = [driver.lend(first.request.prompt, to_peer=True) for _ in range(2)]
        assert [len(loan.blocks) for loan in loans] == [total - total // 4] * 2
        waiting = driver.submit(greedy(total * BLOCK_SIZE - 9, 2))
        driver.run()
        assert waiting.computed is None
        for loan in loans:
            later = driver.lend(first.request.prompt, to_peer=True)
            assert not later.blocks, "the loans would have no end"
            driver.end_loan(later)
            driver.end_loan(loan)
        driver.run()
        assert_computed(driver, waiting)


class TestReturnedAnswers(OnVllm, DecodeEngineConformance):
    pair_fixture = "conformance_pair_of_one_model"
    num_blocks = 40
    max_model_len = 320

    def test_an_answer_that_vllm_ends_because_the_context_is_full_is_not_returned(self, driver: Any) -> None:
        """The engine has not checked its last token then."""
        request = Request(prompt(250), sampling("greedy", 99, ignore_eos=True))
        (decoding,) = driver.answer(request)
        expected = driver.reference.answer(request).ids[:70]
        assert [token.token_id for token in decoding.tokens] == expected
        assert driver.lend(request.prompt + tuple(expected)).tokens == 7 * BLOCK_SIZE

    def test_what_has_not_arrived_is_not_returned(self, driver: DecodeDriver) -> None:
        tokens = prompt(3 * BLOCK_SIZE)
        driver.answer(Request(tokens[:70], sampling("greedy", 2)))
        driver.release(driver.reserve(Request(tokens, sampling("greedy", 9))))
        assert driver.lend(tokens).tokens == 2 * BLOCK_SIZE

    def test_no_block_of_an_answer_that_fails_is_published(self, driver: Any) -> None:
        """Without those before it, it could not be found now, but after the next turn has brought them."""
        feed = driver.served.prefix_keys.feed()
        present_keys(feed)
        request = Request(prompt(45), sampling("greedy", 2 * BLOCK_SIZE, ignore_eos=True), emitted=prompt(50, 1))
        failing = driver.reserve(request)
        driver.write(failing, torch.full_like(driver.reference.kv(request.prompt), torch.nan))
        driver.start(failing)
        driver.run()
        assert failing.error is not None
        driver.release(failing)
        driver.step()
        assert present_keys(feed) == set()
        feed.close()

    def test_a_preempted_sequence_returns_nothing_and_the_next_one_is_right(self, driver: Any) -> None:
        requests = [Request(prompt(5 * BLOCK_SIZE, n), sampling("greedy", 150, ignore_eos=True)) for n in range(5)]
        decodings = driver.begin(*requests)
        driver.run_until(lambda: driver.core._preempted)
        lost = next(decoding for decoding in decodings if decoding.id in driver.core._preempted)
        driver.release(lost)
        driver.run()
        assert_right(driver, *(decoding for decoding in decodings if decoding is not lost))
        assert_right(driver, *driver.answer(lost.request))


class TestReturnedAnswersWithAdapters(OnVllm, DecodeEngineConformance):
    pair_fixture = "conformance_pair_of_one_model"
    decode_driver = AdaptedDriver

    @classmethod
    def load(cls, pair: Pair, half: Half, options: EngineOptions) -> LoadedEngine:
        return super().load(pair, half, with_slots(options))

    @pytest.mark.parametrize("slot", [0, None])
    def test_an_adapters_answer_is_not_returned(self, driver: Any, slot: int | None) -> None:
        assert driver.change(0, random_adapter(driver.reference.pair.decoder_config, 1)).error is None
        tokens = prompt(3 * BLOCK_SIZE)
        request = AdaptedRequest(
            tokens, sampling("greedy", 2 * BLOCK_SIZE, ignore_eos=True), answer_start=len(tokens) - 2, slot=slot
        )
        (decoding,) = driver.answer(request)
        whole = tokens + tuple(token.token_id for token in decoding.tokens)
        assert driver.lend(whole).tokens == (2 * BLOCK_SIZE if slot == 0 else 4 * BLOCK_SIZE)


class TestBothEngines(OnVllm, EngineConformance):
    """KV that one engine has computed is imported by the other, whose blocks have another size."""

    half = "full"

    @pytest.fixture(scope="class")
    def own(self, driver: Any) -> Iterator[PrefillDriver]:
        options = EngineOptions(
            torch.device("cpu"), "float32", block_size=16, kv_memory=1 << 24, max_num_seqs=8, max_num_batched_tokens=64
        )
        own = PrefillDriver(load_engine("overfill", driver.reference.pair, "full", options), driver.reference)
        own.kv_tolerance = driver.kv_tolerance
        yield own
        own.core.close()

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("holder", ["own", "vllm"])
    def test_a_prompt_that_one_engine_has_goes_on_in_the_other(
        self, driver: Any, own: Any, holder: str, seed: int
    ) -> None:
        lender, borrower = (own, driver) if holder == "own" else (driver, own)
        driver.namespace = own.namespace = f"{holder}-{seed}"
        request = Request(prompt(LENGTH, seed), sampling("temperature"))
        (computed,) = lender.compute(request)
        lender.cancel(computed)
        loan = lender.lend(request.prompt)
        assert loan.tokens == 3 * BLOCK_SIZE
        importing = borrower.submit(request, imports=True)
        borrower.import_kv(importing, lender.lent_kv(loan), loan.tokens)
        lender.end_loan(loan)
        borrower.run()
        assert importing.cached_tokens == loan.tokens
        assert_computed(borrower, importing)
        assert importing.computed.first == computed.computed.first
        own.release_all()


class TestAnswersOfBothEngines(OnVllm, DecodeEngineConformance):
    """What a decoder that is the reader has answered is imported by a prefill engine, and the next turn is right."""

    pair_fixture = "conformance_pair_of_one_model"

    @pytest.fixture(scope="class")
    def own(self, driver: Any) -> Iterator[PrefillDriver]:
        options = EngineOptions(torch.device("cpu"), "float32", block_size=16, kv_memory=1 << 24, max_num_seqs=8)
        own = PrefillDriver(load_engine("overfill", driver.reference.pair, "full", options), driver.reference)
        own.kv_tolerance = driver.kv_tolerance
        yield own
        own.core.close()

    def test_the_next_turn_goes_on_with_the_answer(self, driver: DecodeDriver, own: PrefillDriver) -> None:
        (decoding,) = driver.answer(Request(prompt(45), sampling("greedy", 2 * BLOCK_SIZE, ignore_eos=True)))
        turn = decoding.request.prompt + tuple(token.token_id for token in decoding.tokens) + prompt(11, 1)
        loan = driver.lend(turn)
        assert loan.tokens == 3 * BLOCK_SIZE
        importing = own.submit(Request(turn, sampling("greedy")), imports=True)
        own.import_kv(importing, driver.lent_kv(loan), loan.tokens)
        own.run()
        assert importing.cached_tokens == loan.tokens
        assert_computed(own, importing)
        own.release_all()
