"""Tests what the router's checks of requests cost a key, and in which threads they run."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import worker_info

from overfill.api.families.hermes import Hermes
from overfill.api.keys import ApiKey
from overfill.errors import InvalidRequest, Overloaded, ShuttingDown
from overfill.kv import keys
from overfill.routing.affinity import PrefixAffinity
from overfill.routing.pool import Roster
from overfill.routing.worker import PREFILL
from overfill.telemetry.router_metrics import RouterMetrics
from overfill.v1 import common_pb2, decode_pb2, inference_pb2, registry_pb2
from services.router.bounded_executor import BoundedExecutor
from services.router.limits import RequestLimits
from services.router.request_handler import LONG_REQUEST, MAX_DETOKENIZED, RequestHandler
from services.router.served_tiers import ServedTiers
from services.router.shared import Shared
from services.router.statistics import Statistics

LONG = "x" * LONG_REQUEST
GENERATE = inference_pb2.GenerateRequest(text=LONG)
TOKENIZE = inference_pb2.TokenizeRequest(text=LONG)
DETOKENIZE = inference_pb2.DetokenizeRequest(ids=[1] * LONG_REQUEST)


class BlockingTokenizer:
    """A tokenizer whose calls wait for ``proceed``, and then return 100 tokens."""

    eos_token_ids = (0,)
    tool_format = Hermes()

    def __init__(self):
        self.begun, self.proceed = threading.Event(), threading.Event()

    def encode(self, text):
        self.begun.set()
        assert self.proceed.wait(30)
        return [1] * 100

    def has_text(self, token):
        return True

    def decode(self, ids):
        self.encode("")
        return "text"


@pytest.fixture
def tokenizer():
    tokenizer = BlockingTokenizer()
    yield tokenizer
    tokenizer.proceed.set()


class Submitted(list[Any]):
    """A dispatcher that records jobs and places none."""

    def admit(self, *_, **__): ...

    def submit(self, job, on_placed):
        self.append(job)

    def finish(self, job): ...


@pytest.fixture
def submitted():
    return Submitted()


def new_handler(tokenizer, dispatcher, max_positions, roster=None):
    config = SimpleNamespace(vocab_size=100, max_positions=max_positions)
    pair: Any = SimpleNamespace(full_config=config, identity=True, revision="")
    roster = roster or Roster()
    tiers = ServedTiers(["tiny"], {roster.default_tier: pair}, roster)
    unused: Any = SimpleNamespace(arrived=lambda *_: None)
    shared = Shared(unused, RouterMetrics(), limits=RequestLimits(max_attempts=1))
    return RequestHandler(tiers, tokenizer, unused, dispatcher, Statistics(shared, unused), shared)


@pytest.fixture
def handler(tokenizer, submitted):
    """A handler for a model that takes fewer tokens than the tokenizer returns."""
    return new_handler(tokenizer, submitted, 64)


def prefill_worker(prompt=None):
    """Makes a roster with one idle worker, which has reported the blocks of ``prompt``."""
    roster = Roster()
    roster.prefill.use(PrefixAffinity())
    worker = roster.join(worker_info("p0", PREFILL))
    load = decode_pb2.WorkerLoad(kv_blocks_total=100, block_size=16)
    report = registry_pb2.Report(load=load, credits=4, ready=True)
    if prompt is not None:
        keys_of = keys.PromptKeys(keys.root_key(worker.info.identity.cache_key, ""), prompt)
        report.prefix.added.extend(keys_of(16))
    roster.prefill.report(worker, report, 0.0)
    return roster, worker


def new_key(**limits):
    return ApiKey("ci", "0" * 64, "2026-01-01", **limits)


async def check(handler, key):
    with handler.requests.hold_quota(key) as hold:
        await handler.check(GENERATE, hold, 0.0)


async def tokenize(handler, key):
    with handler.requests.hold_quota(key) as hold:
        await handler.tokenize(TOKENIZE, hold)


async def detokenize(handler, key):
    with handler.requests.hold_quota(key) as hold:
        await handler.detokenize(DETOKENIZE, hold)


CALLS = {"generate": check, "tokenize": tokenize, "detokenize": detokenize}


@pytest.mark.parametrize("first", CALLS)
@pytest.mark.parametrize("second", CALLS)
async def test_a_request_counts_against_its_key_while_it_is_tokenized(handler, tokenizer, first, second):
    key = new_key(concurrency=1)
    running = asyncio.ensure_future(CALLS[first](handler, key))
    assert await asyncio.to_thread(tokenizer.begun.wait, 30)
    with pytest.raises(Overloaded, match="1 request running"):
        await asyncio.wait_for(CALLS[second](handler, key), 30)
    tokenizer.proceed.set()
    await asyncio.gather(running, return_exceptions=True)
    with pytest.raises(InvalidRequest, match="has 100 tokens"):  # and not Overloaded
        await check(handler, key)


async def test_a_refused_request_counts_against_its_key_s_rate(handler, tokenizer):
    key = new_key(rate=1e-3)
    tokenizer.proceed.set()
    with pytest.raises(InvalidRequest, match="has 100 tokens"):
        await check(handler, key)
    with pytest.raises(Overloaded, match="requests per second"):
        await check(handler, key)


async def test_prompts_of_one_request_are_charged_once_and_together(handler, tokenizer):
    key = new_key(concurrency=2)
    tokenizer.proceed.set()
    with handler.requests.hold_quota(key) as hold:
        hold.take(0.0)  # before the body is read, and then for all prompts
        hold.take(0.0, 2)
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="has 100 tokens"):
                await handler.check(GENERATE, hold, 0.0)
    with handler.requests.hold_quota(key) as hold:
        hold.take(0.0)
        with pytest.raises(InvalidRequest, match="n: asks for 3 answers"):
            hold.take(0.0, 3)


async def test_too_many_or_too_large_calls_are_refused(tokenizer):
    executor = BoundedExecutor(threads=1, max_calls=3, max_bytes=100)
    running = [asyncio.ensure_future(executor.run(size, tokenizer.encode, "")) for size in (40, 40)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 requests already, of 80 bytes") as caught:
        await executor.run(30, tokenizer.encode, "")
    assert caught.value.retry_after
    running.append(asyncio.ensure_future(executor.run(20, tokenizer.encode, "")))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await executor.run(0, tokenizer.encode, "")
    tokenizer.proceed.set()
    await asyncio.gather(*running)
    assert len(await executor.run(1000, tokenizer.encode, "")) == 100, "a large request runs alone"


async def test_a_cancelled_call_is_counted_until_its_thread_is_free(tokenizer):
    executor = BoundedExecutor(threads=1, max_calls=2)
    running = asyncio.ensure_future(executor.run(1, tokenizer.encode, ""))
    assert await asyncio.to_thread(tokenizer.begun.wait, 30)
    waiting = asyncio.ensure_future(executor.run(1, tokenizer.encode, ""))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    running.cancel()
    third = asyncio.ensure_future(executor.run(1, tokenizer.encode, ""))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await executor.run(1, tokenizer.encode, "")
    assert not running.done()
    tokenizer.proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    await third


@pytest.mark.parametrize("text", ["x", LONG])
async def test_answers_to_one_prompt_hash_its_blocks_once(tokenizer, submitted, monkeypatch, text):
    hashed_in: list[int] = []
    real = keys.block_key
    monkeypatch.setattr(keys, "block_key", lambda *a: hashed_in.append(threading.get_ident()) or real(*a))
    tokenizer.proceed.set()
    roster, worker = prefill_worker([1] * 100)
    handler = new_handler(tokenizer, submitted, 200, roster)
    hashed_in.clear()
    with handler.requests.hold_quota() as hold:
        checked = await handler.check(inference_pb2.GenerateRequest(text=text), hold, 0.0)
        answers = [handler.start(checked.sample(index), hold) for index in range(8)]
    for job in submitted:
        assert next(roster.prefill.policy.best(job)) is worker
        assert roster.prefixes.place(job, worker).memory == 96
    assert len(submitted) == 8
    assert len(hashed_in) == 100 // 16, "each block once"
    assert (threading.get_ident() in hashed_in) is (text != LONG), "those of a long request in a thread"
    for answer in answers:
        with answer:
            pass


@pytest.mark.parametrize(("scored", "cacheable"), [({}, 0), ({"answer_start": 40}, 32)])
async def test_what_prefix_caches_cannot_have_of_a_scored_prompt_does_not_count_as_cached(
    tokenizer, submitted, scored, cacheable
):
    tokenizer.proceed.set()
    roster, worker = prefill_worker()
    handler, place = new_handler(tokenizer, submitted, 200, roster), roster.prefixes.place
    sampling = common_pb2.SamplingParams(prompt_logprobs=1)
    with handler.requests.hold_quota() as hold:
        job = await handler.check(inference_pb2.GenerateRequest(text="x", sampling=sampling, **scored), hold, 0.0)
        plain = await handler.check(inference_pb2.GenerateRequest(text="x"), hold, 0.0)
    place(job, worker)
    assert place(plain, worker).memory == cacheable, "the scored prompt promises no more"
    assert place(job, worker).memory == cacheable, "the plain prompt's blocks are of no use to it"


async def test_a_drain_waits_for_a_request_that_is_tokenized(submitted, tokenizer):
    handler = new_handler(tokenizer, submitted, 200)

    async def begin():
        with handler.requests.hold_quota() as hold:
            handler.start(await handler.check(GENERATE, hold, 0.0), hold)

    beginning = asyncio.ensure_future(begin())
    assert await asyncio.to_thread(tokenizer.begun.wait, 30)
    handler.requests.drain()
    idle = asyncio.ensure_future(handler.requests.wait_idle())
    await asyncio.sleep(0)
    assert not idle.done()
    tokenizer.proceed.set()
    await beginning
    assert len(submitted) == 1, "it was accepted before the drain"
    assert not idle.done()
    handler.requests.abort_all(ShuttingDown("too late"))
    await asyncio.wait_for(idle, 30)


async def test_nothing_starts_once_all_is_aborted(submitted, tokenizer):
    handler = new_handler(tokenizer, submitted, 200)
    tokenizer.proceed.set()
    with handler.requests.hold_quota() as hold:
        checked = await handler.check(GENERATE, hold, 0.0)
        handler.requests.abort_all(ShuttingDown("too late"))
        with pytest.raises(ShuttingDown):
            handler.start(checked, hold)
        await asyncio.wait_for(handler.requests.wait_idle(), 30)
    assert not submitted


async def test_a_short_request_with_tools_does_not_wait_for_long_ones(tokenizer):
    handler = new_handler(tokenizer, Submitted(), 200)
    long = [asyncio.ensure_future(tokenize(handler, None)) for _ in range(8)]  # more than threads
    assert await asyncio.to_thread(tokenizer.begun.wait, 30)
    assert await asyncio.wait_for(handler._run(10, lambda: "checked", in_thread=True), 30) == "checked"
    tokenizer.proceed.set()
    await asyncio.gather(*long)


async def test_a_request_to_detokenize_has_a_limit(handler, tokenizer):
    ids = inference_pb2.DetokenizeRequest(ids=[1] * (MAX_DETOKENIZED + 1))
    with (
        handler.requests.hold_quota() as hold,
        pytest.raises(InvalidRequest, match="ids: has 262145 ids; at most 262144"),
    ):
        await handler.detokenize(ids, hold)


async def test_a_chat_that_its_template_makes_long_is_tokenized_in_a_thread(tokenizer):
    handler, threads = new_handler(tokenizer, Submitted(), 200), []

    def encode(*_, **__):
        threads.append(threading.current_thread())
        return [1], 0

    tokenizer.template_knows_tools, tokenizer.encode_with_generation_prompt = True, encode
    for calls in (1, LONG_REQUEST // 64):  # of a few bytes each
        message = inference_pb2.ChatMessage(role="assistant", tool_calls=[inference_pb2.ToolCall(name="f")] * calls)
        request = inference_pb2.TokenizeRequest(chat=inference_pb2.Chat(messages=[message]))
        with handler.requests.hold_quota(None) as hold:
            assert await handler.tokenize(request, hold) == [1]
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


@pytest.mark.parametrize("priority", [-3, 3])
async def test_a_priority_out_of_range_is_refused(handler, priority):
    request = inference_pb2.GenerateRequest(text="x", priority=priority)
    with handler.requests.hold_quota() as hold, pytest.raises(InvalidRequest, match=f"^priority: .*got {priority}$"):
        await handler.check(request, hold, 0.0)
