"""KV that a vLLM engine imports instead of computing it, and lends: blocks, tokens and what others may see of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import prefill_conformance as prefill
import pytest
import torch
from engine_conformance import BLOCK_SIZE, EngineConformance, prompt, sampling
from engine_drivers import PrefillDriver, Prefilling
from sampled_reference import Request
from vllm_engines import OnVllm

from overfill.engine.load import load_engine
from overfill.engine.protocol import EngineOptions
from overfill.engine.sequence import AwaitingImport, Imported, Lend, Lent, Release
from overfill.kv.chunks import Chunk, TransferSpec, digest, new_chunk
from overfill.kv.ranges import KvRange
from overfill.kv.store import KvStore, LayerTargets

# Importing and loading vLLM warns of deprecated uses of torch, which are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 3 * BLOCK_SIZE + 5
T = TypeVar("T")


def new_chunks(driver: Any, start: int, end: int) -> list[Chunk]:
    """Empty chunks of positions ``start..end``, one for each layer."""
    kv = driver.served.kv
    spec = TransferSpec(bytes(16), 0, kv, tuple(range(kv.num_layers)), (start, end))
    ranges = [KvRange(layer, layer + 1, start, end, 0, kv.num_kv_heads) for layer in range(kv.num_layers)]
    return [new_chunk(spec, part, memoryview(bytearray(spec.raw_bytes(part)))) for part in ranges]


def read_kv(driver: Any, store: KvStore, blocks: Sequence[int], start: int, end: int) -> list[Chunk]:
    chunks = new_chunks(driver, start, end)
    store.read(blocks, chunks, {})
    return chunks


def write_kv(driver: Any, store: KvStore, blocks: Sequence[int], chunks: list[Chunk]) -> None:
    targets = LayerTargets({layer: [layer] for layer in range(driver.served.kv.num_layers)})
    assert store.write(blocks, targets, chunks) == len(chunks)


def as_tensor(driver: Any, chunks: list[Chunk]) -> torch.Tensor:
    """[2, layers, tokens, kv_heads, head_dim]"""
    kv = driver.served.kv
    layers = [torch.from_numpy(np.frombuffer(chunk.payload, np.float32).copy()) for chunk in chunks]
    return torch.stack([layer.view(2, -1, kv.num_kv_heads, kv.head_dim) for layer in layers], 1)


class Elsewhere(EngineConformance):
    half = "full"

    @pytest.fixture(autouse=True)
    def events(self, driver: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        seen: list[Any] = []
        emit = driver.core._emit

        def note(events: list[Any]) -> None:
            seen.extend(events)
            emit(events)

        monkeypatch.setattr(driver.core, "_emit", note)
        return seen


def of(kind: type[T], events: list[Any]) -> list[T]:
    return [event for event in events if isinstance(event, kind)]


def submit(driver: PrefillDriver, tokens: tuple[int, ...], name: str = "greedy") -> Prefilling:
    """Submits a prompt that may be imported."""
    submit, core = driver.core.handle, driver.core

    def with_imports(message: Any) -> None:
        message.sequence.imports = True
        submit(message)

    core.handle = with_imports  # type: ignore[method-assign]
    try:
        return driver.submit(Request(tokens, sampling(name)))
    finally:
        del core.handle


def awaiting(driver: PrefillDriver, prefilling: Prefilling, events: list[Any]) -> AwaitingImport:
    """Steps until the engine asks for the prompt's KV."""
    found: list[AwaitingImport] = []
    driver.until(lambda: found.extend(e for e in of(AwaitingImport, events) if e.id == prefilling.id) or found)
    return found[0]


def finish(driver: PrefillDriver, event: AwaitingImport, tokens: int) -> None:
    """Writes what the full model would have computed, up to ``tokens``."""
    start = event.cached_tokens
    kv = driver.reference.kv(driver.prompts[event.id].request.prompt)
    if tokens > start:
        chunks = new_chunks(driver, start, tokens)
        for layer, chunk in enumerate(chunks):
            chunk.payload[:] = kv[:, layer, start:tokens].contiguous().numpy().tobytes()
            chunk.checksum = digest(chunk.header, chunk.payload)
        write_kv(driver, driver.served.store, event.blocks, chunks)
    driver.core.handle(Imported(event.id, tokens))


def lend(driver: Any, tokens: Sequence[int], events: list[Any], namespace: str | None = None) -> Lent:
    id = f"loan-{len(events)}"
    driver.core.handle(Lend(id, driver.served.blocks_of(tokens, driver.namespace if namespace is None else namespace)))
    (lent,) = (event for event in of(Lent, events) if event.id == id)
    return lent


class TestImports(OnVllm, Elsewhere):
    @pytest.mark.parametrize("name", ["greedy", "temperature"])
    @pytest.mark.parametrize("imported", [0, BLOCK_SIZE, 3 * BLOCK_SIZE])
    def test_only_what_was_not_imported_is_computed(self, driver, events, imported, name):
        importing = submit(driver, prompt(LENGTH), name)
        event = awaiting(driver, importing, events)
        assert (len(event.blocks) >= 3, event.cached_tokens) == (True, 0)
        assert not driver.step(), "computed while others write its blocks"
        finish(driver, event, imported)
        driver.run()
        assert importing.chunks[0][0] == importing.cached_tokens == imported
        assert importing.chunks[-1][1] == LENGTH
        if imported:
            assert importing.scheduled.blocks[: len(event.blocks)] == event.blocks
        prefill.assert_computed(driver, importing)
        (again,) = driver.compute(importing.request)
        assert again.cached_tokens == 3 * BLOCK_SIZE, "imported and computed blocks are shared"
        prefill.assert_computed(driver, again)

    def test_a_cached_beginning_is_kept_and_the_rest_imported(self, driver, events):
        (first,) = driver.compute(Request(prompt(LENGTH)[: BLOCK_SIZE + 3], sampling("greedy")))
        importing = submit(driver, prompt(LENGTH))
        event = awaiting(driver, importing, events)
        assert event.cached_tokens == BLOCK_SIZE
        assert event.blocks[0] == first.scheduled.blocks[0]
        before = driver.load
        finish(driver, event, 3 * BLOCK_SIZE)
        driver.run()
        assert importing.chunks == [(3 * BLOCK_SIZE, LENGTH)]
        assert driver.load.prefix_tokens_found - before.prefix_tokens_found == BLOCK_SIZE, "imported ones do not count"
        prefill.assert_computed(driver, first, importing)

    def test_others_are_computed_meanwhile_and_touch_no_block_of_the_import(self, driver, events):
        importing = submit(driver, prompt(LENGTH))
        event = awaiting(driver, importing, events)
        chunks = new_chunks(driver, 0, 3 * BLOCK_SIZE)
        for chunk in chunks:
            chunk.payload[:] = np.arange(len(chunk.payload) // 4, dtype=np.float32).tobytes()
            chunk.checksum = digest(chunk.header, chunk.payload)
        write_kv(driver, driver.served.store, event.blocks, chunks)
        others = driver.compute(*(Request(prompt(200, seed), sampling("greedy")) for seed in range(1, 6)))
        assert all(other.computed for other in others)
        assert importing.scheduled is None
        kept = read_kv(driver, driver.served.store, event.blocks, 0, 3 * BLOCK_SIZE)
        assert [chunk.payload for chunk in kept] == [chunk.payload for chunk in chunks]
        finish(driver, event, 2 * BLOCK_SIZE)
        driver.run()
        prefill.assert_computed(driver, importing, *others)

    def test_prompts_that_need_an_imported_block_next_wait_for_it(self, driver, events):
        importing = submit(driver, prompt(LENGTH))
        event = awaiting(driver, importing, events)
        same = submit(driver, prompt(LENGTH))
        plain = driver.submit(Request(prompt(LENGTH)[:-1], sampling("greedy")))
        longer = submit(driver, prompt(LENGTH) + prompt(BLOCK_SIZE, 9))
        other = driver.submit(Request(prompt(40, 1), sampling("greedy")))
        driver.run()
        assert len(of(AwaitingImport, events)) == 1
        assert [p.computed is not None for p in (same, plain, longer, other)] == [False, False, False, True]
        finish(driver, event, 3 * BLOCK_SIZE)
        driver.run()
        second = of(AwaitingImport, events)[1]
        assert (second.id, second.cached_tokens) == (longer.id, 3 * BLOCK_SIZE)
        finish(driver, second, 4 * BLOCK_SIZE)
        driver.run()
        assert [p.cached_tokens for p in (same, plain, longer)] == [3 * BLOCK_SIZE, 3 * BLOCK_SIZE, 4 * BLOCK_SIZE]
        prefill.assert_computed(driver, importing, same, plain, longer, other)

    def test_an_import_of_nothing_finds_what_was_computed_meanwhile(self, driver, events, monkeypatch):
        config = driver.core._vllm._scheduler.scheduler_config
        monkeypatch.setattr(config, "long_prefill_token_threshold", BLOCK_SIZE // 4)
        computing = driver.submit(Request(prompt(LENGTH), sampling("greedy")))
        importing = submit(driver, prompt(LENGTH))
        event = awaiting(driver, importing, events)
        assert event.cached_tokens == 0
        driver.run()
        finish(driver, event, 0)
        driver.run()
        assert importing.cached_tokens == 3 * BLOCK_SIZE
        prefill.assert_computed(driver, computing, importing)

    @pytest.mark.parametrize("ready", [False, True], ids=["writing", "imported"])
    def test_a_prompt_that_ends_frees_its_blocks_and_lets_others_go_on(self, driver, events, ready):
        leaving = submit(driver, prompt(LENGTH))
        event = awaiting(driver, leaving, events)
        same = submit(driver, prompt(LENGTH))
        driver.step()
        if ready:
            finish(driver, event, BLOCK_SIZE)
        driver.cancel(leaving)
        driver.core.handle(Imported(leaving.id, 2 * BLOCK_SIZE))  # was on its way
        second = awaiting(driver, same, events)
        assert second.cached_tokens == 0, "nothing was published"
        finish(driver, second, BLOCK_SIZE)
        driver.run()
        prefill.assert_computed(driver, same)
        driver.cancel(same)
        driver.assert_empty()

    @pytest.mark.parametrize("length", [1, BLOCK_SIZE, 2 * BLOCK_SIZE + 1, 3 * BLOCK_SIZE])
    def test_nothing_is_imported_if_no_full_block_is_missing_or_nothing_is_shared(self, driver, events, length):
        if length > BLOCK_SIZE:
            driver.compute(Request(prompt(length), sampling("greedy")))
        known = submit(driver, prompt(length))
        driver.run()
        unshared = submit(driver, prompt(length, 1))
        unshared.sequence.prompt_blocks = None
        driver.run()
        assert not of(AwaitingImport, events)
        prefill.assert_computed(driver, known, unshared)

    def test_the_journal_reports_what_was_imported(self, driver, events):
        feed = driver.served.prefix_keys.feed()
        prefill.present_keys(feed)
        importing = submit(driver, prompt(LENGTH))
        event = awaiting(driver, importing, events)
        assert prefill.present_keys(feed) == set()
        finish(driver, event, 2 * BLOCK_SIZE)
        driver.run()
        assert prefill.present_keys(feed) == set(prefill.keys_of(driver, prompt(LENGTH)))
        feed.close()


class TestImportsWithFewBlocks(OnVllm, Elsewhere):
    num_blocks = 10
    max_model_len = 256

    def test_an_import_waits_for_blocks_and_keeps_those_of_its_rest(self, driver, events):
        size = driver.load.blocks_total - 3
        (first,) = driver.compute(Request(prompt(size * BLOCK_SIZE - 9, 1), sampling("greedy")))
        importing = submit(driver, prompt(size * BLOCK_SIZE - 9, 2))
        driver.run()
        assert not of(AwaitingImport, events)
        driver.cancel(first)
        event = awaiting(driver, importing, events)
        assert driver.load.blocks_used == size
        later = driver.submit(Request(prompt(4 * BLOCK_SIZE, 3), sampling("greedy")))
        driver.run()
        assert later.computed is None, "the import's last block was given away"
        for tokens in (0, BLOCK_SIZE):
            finish(driver, event, tokens)  # the second one is not awaited
        driver.run()
        prefill.assert_computed(driver, importing)
        driver.cancel(importing)
        driver.run()
        prefill.assert_computed(driver, later)


class TestLoans(OnVllm, Elsewhere):
    num_blocks = 10
    max_model_len = 320

    def test_lent_blocks_stay_until_the_release_and_are_evictable_afterwards(self, driver, events):
        (computed,) = driver.compute(Request(prompt(LENGTH), sampling("greedy")))
        blocks = computed.scheduled.blocks[:3]
        driver.cancel(computed)
        loan = lend(driver, prompt(LENGTH), events)
        assert (loan.blocks, loan.tokens) == (blocks, 3 * BLOCK_SIZE)
        load = driver.load
        assert (load.blocks_used, load.running, load.waiting) == (3, 0, 0)
        driver.core.check()
        room = (load.blocks_total - 3) * BLOCK_SIZE
        for seed in range(1, 4):
            (other,) = driver.compute(Request(prompt(room - 7, seed), sampling("greedy")))
            prefill.assert_computed(driver, other)
            driver.cancel(other)
        kv = as_tensor(driver, read_kv(driver, driver.served.store, loan.blocks, 0, loan.tokens))
        expected = driver.reference.kv(prompt(LENGTH))[:, :, : loan.tokens]
        torch.testing.assert_close(kv, expected, rtol=1e-4, atol=1e-4)
        driver.core.handle(Release(loan.id))
        driver.assert_empty()
        (whole,) = driver.compute(Request(prompt(room + 3 * BLOCK_SIZE - 7, 5), sampling("greedy")))
        assert whole.computed is not None

    def test_what_is_lent_is_the_cached_beginning_in_the_namespace(self, driver, events):
        (computed,) = driver.compute(Request(prompt(LENGTH), sampling("greedy")))
        longer = lend(driver, prompt(LENGTH) + prompt(70, 1), events)
        assert (longer.blocks, longer.tokens) == (computed.scheduled.blocks[:3], 3 * BLOCK_SIZE)
        shorter = lend(driver, prompt(LENGTH)[: 2 * BLOCK_SIZE], events)
        assert shorter.tokens == 2 * BLOCK_SIZE
        assert lend(driver, prompt(LENGTH), events, driver.namespace + "/other").tokens == 0
        assert lend(driver, prompt(LENGTH, 1), events).tokens == 0
        for loan in of(Lent, events):
            driver.core.handle(Release(loan.id))
        driver.cancel(computed)
        driver.assert_empty()

    def test_blocks_that_a_running_prompt_will_need_are_not_lent(self, driver, events):
        """Otherwise vLLM would preempt the prompt, whose blocks a stream reads."""
        (cached,) = driver.compute(Request(prompt(LENGTH), sampling("greedy")))
        driver.cancel(cached)
        total = driver.load.blocks_total
        running = driver.submit(Request(prompt((total - 1) * BLOCK_SIZE - 7, 1), sampling("greedy")))
        driver.step()
        assert len(running.sequence.blocks) < 3
        loan = lend(driver, prompt(LENGTH), events)
        assert loan.tokens <= BLOCK_SIZE
        driver.run()
        prefill.assert_computed(driver, running)
        driver.core.handle(Release(loan.id))

    def test_a_block_that_is_imported_is_not_lent_before(self, driver, events):
        importing = submit(driver, prompt(LENGTH))
        event = awaiting(driver, importing, events)
        assert lend(driver, prompt(LENGTH), events).tokens == 0
        finish(driver, event, 2 * BLOCK_SIZE)
        driver.step()
        assert lend(driver, prompt(LENGTH), events).tokens >= 2 * BLOCK_SIZE
        for loan in of(Lent, events):
            driver.core.handle(Release(loan.id))
        driver.run()
        prefill.assert_computed(driver, importing)


class TestBothEngines(OnVllm, Elsewhere):
    """KV that one engine has computed is imported by the other, whose blocks have another size."""

    @pytest.fixture(scope="class")
    def own(self, driver: Any) -> Any:
        options = EngineOptions(
            torch.device("cpu"), "float32", block_size=16, kv_memory=1 << 24, max_num_seqs=8, max_num_batched_tokens=64
        )
        loaded = load_engine("overfill", driver.reference.pair, "full", options)
        own = PrefillDriver(loaded, driver.reference)
        yield own
        own.core.close()

    def test_a_prompt_of_the_other_engine_goes_on_here(self, driver, own, events):
        (held,) = own.compute(Request(prompt(LENGTH), sampling("greedy")))
        importing = submit(driver, prompt(LENGTH))
        event = awaiting(driver, importing, events)
        chunks = read_kv(own, own.served.store, held.scheduled.blocks, 0, 3 * BLOCK_SIZE)
        write_kv(driver, driver.served.store, event.blocks, chunks)
        driver.core.handle(Imported(event.id, 3 * BLOCK_SIZE))
        driver.run()
        prefill.assert_computed(driver, importing)
        own.release_all()
