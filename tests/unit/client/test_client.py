"""Tests the blocking and the asyncio client with the same tests against a scripted router."""

import asyncio
import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import router_events as say

from overfill.client import (
    Answer,
    AnswerIdentity,
    AnswerPart,
    AsyncClient,
    Client,
    Message,
    PoolStatus,
    SamplingParams,
    StackStatus,
)
from overfill.client.concurrency import AsyncResponses
from overfill.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Produced,
    RequestCancelled,
    ShuttingDown,
    Unavailable,
)
from overfill.v1 import admin_pb2, common_pb2, inference_pb2


class SyncSdk:
    """Makes each call with a new blocking client."""

    def run(self, address, method, *args, **kwargs):
        with Client(address) as client:
            return getattr(client, method)(*args, **kwargs)

    def stream(self, address, on_delta=lambda stream: None, **kwargs):
        deltas = []
        with Client(address) as client, client.stream("x", **kwargs) as stream:
            for delta in stream:
                deltas.append(delta)
                on_delta(stream)
            return deltas, stream


class AsyncSdk:
    """Makes each call with a new asyncio client."""

    def run(self, address, method, *args, **kwargs):
        async def main():
            async with AsyncClient(address) as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(main())

    def stream(self, address, on_delta=lambda stream: None, **kwargs):
        async def main():
            deltas = []
            async with AsyncClient(address) as client, client.stream("x", **kwargs) as stream:
                async for delta in stream:
                    deltas.append(delta)
                    on_delta(stream)
                return deltas, stream

        return asyncio.run(main())


@pytest.fixture(params=[SyncSdk, AsyncSdk])
def sdk(request):
    return request.param()


def test_generate(sdk, router):
    answer = sdk.run(
        router.address,
        "generate",
        [Message("user", "Hi")],
        sampling=SamplingParams(max_tokens=5),
        stop=["\n"],
        timeout=60,
    )
    assert isinstance(answer, Answer)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("Hello", (10, 11, 12), "stop")
    assert answer.client_ttft is not None
    assert answer.client_ttft > 0
    (request,) = router.requests
    assert request.chat.messages[0].content == "Hi"
    assert (request.sampling.max_tokens, list(request.stop)) == (5, ["\n"])
    assert 0 < router.time_remaining[0] < 61  # gRPC rounds the timeout up


def test_no_timeout_is_no_deadline(sdk, router):
    sdk.run(router.address, "generate", "x")
    assert router.time_remaining[0] is None or router.time_remaining[0] > 1e6


def test_a_stream_has_its_answer_only_at_the_end(sdk, router):
    seeds = []

    def look(stream):
        seeds.append(stream.accepted.seed)
        with pytest.raises(InternalError):
            _ = stream.answer

    deltas, stream = sdk.stream(router.address, on_delta=look)
    assert [d.text for d in deltas] == ["Hel", "lo"]
    assert seeds == [7, 7]
    assert stream.answer.text == "Hello"


def test_errors_arrive_typed(sdk, router):
    router.script = [InvalidRequest("sampling.top_p", "too much")]
    with pytest.raises(InvalidRequest, match="too much") as caught:
        sdk.run(router.address, "generate", "x")
    assert caught.value.field == "sampling.top_p"
    router.script = [say.accepted(), Overloaded("full", retry_after=3)]
    with pytest.raises(Overloaded, match="full") as overloaded:
        sdk.run(router.address, "generate", "x")
    assert overloaded.value.retry_after == 3


def test_mistakes_are_not_sent(sdk, router):
    with pytest.raises(InvalidRequest, match="surrogate"):
        sdk.run(router.address, "generate", "a\ud800")
    with pytest.raises(InvalidRequest, match="timeout"):
        sdk.run(router.address, "generate", "a", timeout=-1)
    assert router.requests == []


def test_a_passed_deadline_raises_deadline_exceeded(sdk, router):
    router.script = ["hang"]
    with pytest.raises(DeadlineExceeded):
        sdk.run(router.address, "generate", "x", timeout=0.2)


def test_cancelling_ends_the_stream_and_frees_the_server(sdk, router):
    router.script = [*say.GOOD[:-1], "hang"]
    with pytest.raises(RequestCancelled):
        sdk.stream(router.address, on_delta=lambda s: s.cancel() if s.accepted else None)
    router.abandoned.wait()


def test_leaving_the_block_cancels(router):
    router.script = [*say.GOOD[:2], "hang"]
    with Client(router.address) as client:
        with client.stream("x") as stream:
            assert next(stream).text == "Hel"
        router.abandoned.wait()


async def test_leaving_the_async_block_cancels(router):
    router.script = [*say.GOOD[:2], "hang"]
    async with AsyncClient(router.address) as client:
        async with client.stream("x") as stream:
            assert (await anext(stream)).text == "Hel"
        await asyncio.to_thread(router.abandoned.wait)


async def test_dropping_the_stream_cancels(router):
    router.script = [*say.GOOD[:2], "hang"]
    async with AsyncClient(router.address) as client:
        async for _ in client.stream("x"):
            break
        assert await asyncio.to_thread(router.abandoned.wait, 20)


def test_dropping_the_blocking_stream_cancels(router):
    router.script = [*say.GOOD[:2], "hang"]
    with Client(router.address) as client:
        for _ in client.stream("x"):
            break
        assert router.abandoned.wait(20)


def last_sample_fails(router):
    def choose():
        failed = len(router.requests) == 3
        router.script = [InvalidRequest("text", "is bad")] if failed else [*router.script[:1], "hang"]

    router.on_request = choose


def test_a_failed_sample_ends_the_others(router):
    last_sample_fails(router)
    with Client(router.address) as client:
        with pytest.raises(InvalidRequest, match="is bad"):
            client.samples("x", 3)
        assert router.abandoned.wait(20)


async def test_a_failed_sample_ends_the_others_of_an_asyncio_client(router):
    last_sample_fails(router)
    async with AsyncClient(router.address) as client:
        with pytest.raises(InvalidRequest, match="is bad"):
            await client.samples("x", 3)
        assert await asyncio.to_thread(router.abandoned.wait, 20)


def test_tasks_of_one_prompt_fail_each_for_itself(sdk, router):
    def choose():
        failed = router.requests[-1].tier == "judge"
        router.script = [ModelNotFound("no judge")] if failed else list(say.GOOD)

    router.on_request = choose
    tasks = ["planner", "judge", "coder"]
    answers = sdk.run(router.address, "fan_out", "x", tasks, request_id="r", timeout=30)
    assert [getattr(answer, "token_ids", None) for answer in answers] == [(10, 11, 12), None, (10, 11, 12)]
    assert isinstance(answers[1], ModelNotFound)
    asked = {request.tier: request for request in router.requests}
    assert [asked[task].request_id for task in tasks] == ["r-0", "r-1", "r-2"]
    assert len({request.session for request in router.requests}) == 1
    assert router.requests[0].session
    assert all(0 < left < 31 for left in router.time_remaining)
    sdk.run(router.address, "fan_out", "x", ["planner"], session="mine")
    assert (router.requests[-1].session, router.requests[-1].tier) == ("mine", "planner")


@pytest.mark.parametrize(("field", "tasks", "options"), [
    ("tasks", "planner", {}), ("tasks", [], {}), ("tier", ["planner"], {"tier": "coder"}), ("tier", [3], {}),
])  # fmt: skip
def test_wrong_tasks_are_refused_before_anything_is_sent(sdk, router, field, tasks, options):
    with pytest.raises(InvalidRequest) as caught:
        sdk.run(router.address, "fan_out", "x", tasks, **options)
    assert caught.value.field == field
    assert router.requests == []


async def test_cancelling_the_task_cancels_the_request(router):
    router.script = [*say.GOOD[:2], "hang"]
    started = asyncio.Event()

    async def read():
        async for _ in client.stream("x"):
            started.set()

    async with AsyncClient(router.address) as client:
        reading = asyncio.create_task(read())
        await started.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await asyncio.to_thread(router.abandoned.wait)


@pytest.mark.parametrize("events", ["gap", "repeat", "no end", "nothing"])
def test_a_broken_stream_is_an_error_and_never_a_wrong_answer(sdk, router, events):
    router.script = {
        "gap": [*say.GOOD[:2], say.delta(2, [12]), say.finished()],
        "repeat": [*say.GOOD[:2], say.delta(0, [10]), say.finished()],
        "no end": say.GOOD[:-1],
        "nothing": [],
    }[events]
    with pytest.raises(InternalError):
        sdk.run(router.address, "generate", "x")


def test_an_address_without_listener_is_unavailable_and_named(sdk, closed_address):
    for method, args in (("generate", ["x"]), ("models", []), ("status", [])):
        with pytest.raises(Unavailable, match=closed_address):
            sdk.run(closed_address, method, *args)


def test_the_first_reachable_address_serves(sdk, closed_address, router, another_router):
    addresses = f"{closed_address},{router.address},{another_router.address}"
    assert sdk.run(addresses, "generate", "x", timeout=60).text == "Hello"
    assert sdk.run(addresses, "models")[0].name == "tiny"
    assert (len(router.requests), len(another_router.requests)) == (1, 0)
    router.script = [ShuttingDown("draining")]
    assert sdk.run(addresses, "generate", "x").text == "Hello"
    assert len(another_router.requests) == 1


def test_an_address_whose_router_leaves_is_tried_once_more(sdk, router):
    router.script = [ShuttingDown("draining")]
    with pytest.raises(ShuttingDown):
        sdk.run(router.address, "generate", "x", timeout=60)
    assert len(router.requests) == 2


def test_an_answer_goes_on_at_the_next_router_when_one_is_lost(sdk, router, another_router):
    identity = inference_pb2.AnswerIdentity(decoder_digest="d", prompt_tokens=3)
    router.script = [say.accepted(identity=identity), say.GOOD[1], ShuttingDown("leaving")]
    another_router.script = [say.accepted(identity=identity), *say.GOOD[2:]]
    answer = sdk.run(f"{router.address},{another_router.address}", "generate", "x", resume_token_ids=[], stop=["."])
    assert (answer.text, answer.token_ids, answer.routers) == ("Hello", (10, 11, 12), 2)
    (first,), (rest,) = router.requests, another_router.requests
    assert (rest.text, list(rest.stop), rest.request_id) == (first.text, ["."], "r1")
    assert (list(rest.resume_token_ids), rest.sampling.seed, rest.sampling.max_tokens) == ([10], 7, 40)
    assert rest.resume_identity == identity
    assert answer.identity == AnswerIdentity.from_proto(identity)
    assert not first.sampling.HasField("seed")
    assert not first.HasField("resume_identity")


def test_reasoning_goes_on_at_the_next_router_when_one_is_lost(sdk, router, another_router):
    router.script = [say.accepted(), say.delta(0, [10], reasoning="H"), Unavailable("gave up")]
    with pytest.raises(Unavailable) as caught:
        sdk.run(router.address, "generate", "x")
    assert (caught.value.produced.reasoning, caught.value.produced.text) == ("H", "")
    router.script[-1] = ShuttingDown("leaving")
    usage = common_pb2.Usage(prompt_tokens=3, completion_tokens=3, reasoning_tokens=2)
    another_router.script = [
        say.accepted(),
        say.delta(1, [11, 12], "Yes", reasoning="m"),
        say.finished(usage=usage, rest=inference_pb2.Delta(text=".")),
    ]
    deltas, stream = sdk.stream(f"{router.address},{another_router.address}")
    assert [(delta.reasoning, delta.text) for delta in deltas] == [("H", ""), ("m", "Yes"), ("", ".")]
    answer = stream.answer
    assert (answer.reasoning, answer.text, answer.usage.reasoning_tokens) == ("Hm", "Yes.", 2)
    assert answer.message == Message("assistant", "Yes.", reasoning="Hm")


def test_an_answer_stays_in_its_tier_when_its_router_is_lost(sdk, router, another_router):
    # The first router browns out at once, and falls back at token 1. The second one must do neither anew.
    router.script = [
        say.accepted(tier="default", brownout_from="full", identity={"decoder_digest": "of default"}),
        say.delta(0, [10], "Hel"),
        say.delta(1, [11], "l", parts=[say.part("fast", 1, identity={"decoder_digest": "of fast"})]),
        ShuttingDown("leaving"),
    ]
    another_router.script = [
        say.accepted(tier="fast"),
        say.delta(2, [12], "o"),
        say.finished(parts=[say.part("fast", 2)]),
    ]
    deltas, stream = sdk.stream(
        f"{router.address},{another_router.address}", model="tiny:full", fallback="fast", allow_brownout=True
    )
    (first,), (rest,) = router.requests, another_router.requests
    assert (first.model, first.tier, first.fallback, first.allow_brownout) == ("tiny:full", "", "fast", True)
    assert (rest.model, rest.tier, rest.fallback, rest.allow_brownout) == ("tiny", "fast", "fast", False)
    assert rest.resume_identity.decoder_digest == "of fast"
    assert [d.parts for d in deltas] == [(), (AnswerPart("fast", 1),), ()]
    answer = stream.answer
    assert answer.parts == (AnswerPart("default", 0), AnswerPart("fast", 1))
    assert (answer.tier, answer.brownout_from) == ("fast", "full")


def test_a_resubmitted_request_names_its_tier_once(sdk, router, another_router):
    router.script = [say.accepted(tier="full"), say.delta(0, [10], "Hel"), ShuttingDown("leaving")]
    another_router.script = [
        say.accepted(tier="full"),
        say.delta(1, [11, 12], "lo", parts=[say.part("fast", 2)]),
        say.finished(parts=[say.part("full", 1), say.part("fast", 2)]),
    ]
    answer = sdk.run(f"{router.address},{another_router.address}", "generate", "x", model="tiny:full")
    (rest,) = another_router.requests
    assert (rest.model, rest.tier) == ("tiny:full", "full")
    assert answer.parts == (AnswerPart("full", 0), AnswerPart("fast", 2))


def test_held_back_text_comes_once_when_the_router_is_lost_before_the_end(sdk, router, another_router):
    # All tokens arrive, but not the final message, which has the held-back text.
    router.script = [*say.GOOD[:3], ShuttingDown("leaving")]
    another_router.script = [say.accepted(), say.finished(rest=inference_pb2.Delta(text="!"))]
    answer = sdk.run(f"{router.address},{another_router.address}", "generate", "x")
    assert (answer.text, answer.token_ids) == ("Hello!", (10, 11, 12))


def test_losing_a_router_after_its_last_message_changes_nothing(sdk, router, another_router):
    router.script = [*say.GOOD, ShuttingDown("leaving")]
    deltas, stream = sdk.stream(f"{router.address},{another_router.address}")
    assert len(deltas) == 2
    assert stream.answer.text == "Hello"
    assert another_router.requests == []


def test_an_error_carries_the_answer_so_far(sdk, router):
    router.script = [*say.GOOD[:2], Unavailable("gave up after 4 attempts")]
    with pytest.raises(Unavailable, match="gave up") as caught:
        sdk.run(router.address, "generate", "x")
    assert caught.value.produced == Produced("Hel", (10,), "r1", 7, identity=AnswerIdentity())
    router.script = [say.accepted(tier="fast"), say.GOOD[1], say.delta(5, [12])]
    with pytest.raises(InternalError) as wrong:
        sdk.run(router.address, "generate", "x")
    assert wrong.value.produced == Produced("Hel", (10,), "r1", 7, "fast", AnswerIdentity())
    router.script = [Overloaded("full")]
    with pytest.raises(Overloaded) as refused:
        sdk.run(router.address, "generate", "x")
    assert refused.value.produced is None


def test_a_closed_client_asks_no_other_router(router, another_router):
    router.script = [*say.GOOD[:2], "hang"]
    client = Client(f"{router.address},{another_router.address}")
    stream = client.stream("x")
    next(stream)
    client.close()
    with pytest.raises(RequestCancelled):
        next(stream)
    with pytest.raises(RequestCancelled, match="the client is closed"):
        client.stream("x")
    assert another_router.requests == []


@pytest.mark.parametrize("two_routers", [False, True])
async def test_closing_the_client_ends_the_answer_that_a_task_waits_for(router, another_router, two_routers):
    router.script = [*say.GOOD[:2], "hang"]
    client = AsyncClient(f"{router.address},{another_router.address}" if two_routers else router.address)
    started = asyncio.Event()

    async def read():
        async for _ in client.stream("x"):
            started.set()

    reading = asyncio.create_task(read())
    await started.wait()
    await client.close()
    with pytest.raises(RequestCancelled, match="the client is closed") as caught:
        await reading
    assert caught.value.produced is not None
    assert caught.value.produced.text == "Hel"
    assert another_router.requests == []


@pytest.mark.parametrize("two_routers", [False, True])
def test_closing_the_blocking_client_ends_a_short_call_of_another_thread(router, another_router, two_routers):
    client = Client(f"{router.address},{another_router.address}" if two_routers else router.address)
    asked = threading.Event()
    router.on_tokenize = asked.set
    with ThreadPoolExecutor(1) as threads:
        calling = threads.submit(client.tokenize, "x")
        assert asked.wait(30)
        client.close()
        with pytest.raises(RequestCancelled, match="the client is closed"):
            calling.result(30)


async def test_closing_the_client_ends_a_short_call_that_a_task_waits_for(router):
    client = AsyncClient(router.address)
    asked = asyncio.Event()
    router.on_tokenize = partial(asyncio.get_running_loop().call_soon_threadsafe, asked.set)
    calling = asyncio.create_task(client.tokenize("x"))
    await asked.wait()
    await client.close()
    with pytest.raises(RequestCancelled, match="the client is closed"):
        await calling


def test_routers_that_only_accept_are_not_asked_forever(sdk, router, another_router):
    router.script = another_router.script = [say.accepted(), ShuttingDown("leaving")]
    with pytest.raises(ShuttingDown, match="leaving"):
        sdk.run(f"{router.address},{another_router.address}", "generate", "x")
    assert (len(router.requests), len(another_router.requests)) == (4, 4)


def test_a_router_that_is_back_is_asked_again(sdk, router, another_router):
    router.script = [say.accepted(), RequestCancelled("gone")]
    another_router.script = [say.accepted(), RequestCancelled("gone too")]

    def on_request():
        if len(another_router.requests) == 2:
            router.script = say.GOOD

    another_router.on_request = on_request
    assert sdk.run(f"{router.address},{another_router.address}", "generate", "x").text == "Hello"
    assert (len(router.requests), len(another_router.requests)) == (3, 2)


def test_a_router_that_was_replaced_while_others_shut_down_is_asked_again(sdk, router, another_router):
    router.script, another_router.script = [ShuttingDown("leaving")], [ShuttingDown("leaving too")]
    another_router.on_request = lambda: setattr(router, "script", say.GOOD)
    assert sdk.run(f"{router.address},{another_router.address}", "generate", "x").text == "Hello"
    assert (len(router.requests), len(another_router.requests)) == (2, 1)
    another_router.on_request = lambda: None
    router.script = another_router.script = [ShuttingDown("leaving")]
    with pytest.raises(ShuttingDown, match="leaving"):
        sdk.run(f"{router.address},{another_router.address}", "generate", "x")


@pytest.mark.parametrize("error", [Overloaded("full"), Unavailable("gave up after 4 attempts")])
def test_an_error_from_a_living_router_is_final(sdk, router, another_router, error):
    router.script = [error]
    with pytest.raises(type(error)):
        sdk.run(f"{router.address},{another_router.address}", "generate", "x")
    assert another_router.requests == []


def test_a_chat_of_plain_text_is_refused_with_what_to_write(sdk, router):
    with pytest.raises(InvalidRequest, match="generate"):
        sdk.run(router.address, "chat", "What is a KV cache?")
    assert router.requests == []


def test_models_and_status(sdk, router):
    (model,) = sdk.run(router.address, "models")
    assert (model.name, model.max_model_len, model.dtype, model.tier) == ("tiny", 64, "float32", "full")
    status = sdk.run(router.address, "status")
    assert (status.process.stage, status.process.load, status.process.codec) == ("router", None, None)
    assert (status.serving, status.complete, status.http_address) == (False, False, None)
    assert {stage: (pool.ready, pool.expected) for stage, pool in status.pools.items()} == {
        "prefill": (0, 1), "decode": (1, 3),
    }  # fmt: skip
    assert status.tiers == {"full": PoolStatus(1, 1, "full", brownout=True), "fast": PoolStatus(0, 2, "fast")}
    answering, silent = status.workers
    assert (answering.tier, answering.process.tier, silent.tier) == ("full", "full", None)
    assert (answering.id, answering.stage, silent.process) == ("d0", "decode", None)
    assert answering.process.load.kv_blocks_total == 8
    assert (answering.process.kv.dtype, answering.process.codec) == ("bfloat16", "raw")


@pytest.mark.parametrize(
    ("method", "arguments", "options", "request_"),
    [
        ("rollout", [], {}, {}),
        ("set_rollout", ["r2", 50], {"over": 600}, {"set": {"revision": "r2", "percent": 50, "over_seconds": 600}}),
        ("pause_rollout", [], {}, {"pause": True}),
        ("undo_rollout", [], {}, {"undo": True}),
    ],
)
def test_each_change_of_a_rollout_is_a_request_of_its_own(sdk, router, method, arguments, options, request_):
    status = sdk.run(router.address, method, *arguments, **options)
    assert router.rollouts == [admin_pb2.ChangeRolloutRequest(**request_)]
    old, new = status.revisions
    assert (old.name, old.percent, old.ready, old.pools) == ("r1", 75, False, {})
    assert (new.name, new.ready, new.running, new.pools) == ("r2", True, 4, {"decode": PoolStatus(2, 3)})
    assert (status.target_percent, status.remaining_seconds, status.paused) == (50, 9.5, True)


def test_the_status_of_a_stack_counts_the_workers_of_both_revisions():
    decode = {"stage": common_pb2.STAGE_DECODE, "tier": "full"}
    pools = [
        admin_pb2.PoolStatus(**decode, ready=1, expected=2, revision="r1", brownout=True),
        admin_pb2.PoolStatus(**decode, ready=2, expected=2, revision="r2"),
    ]
    worker = admin_pb2.WorkerStatus(id="d", stage=common_pb2.STAGE_DECODE, revision="r2")
    status = StackStatus.from_proto(admin_pb2.StatusResponse(pools=pools, workers=[worker]))
    assert status.pools == {"decode": PoolStatus(3, 4)}
    assert status.tiers == {"full": PoolStatus(3, 4, "full", brownout=True)}
    assert status.with_revisions
    assert status.workers[0].revision == "r2"


def test_status_names_the_address_that_answered(sdk, router, another_router):
    """The router says that it listens on 0.0.0.0:7600."""
    assert sdk.run(router.address, "status").process.address == router.address
    assert sdk.run(f"127.0.0.1:1,{another_router.address}", "status").process.address == another_router.address


@pytest.mark.parametrize(
    ("listens", "reached", "shown"),
    [
        ("0.0.0.0", "10.0.0.7:17600", ("10.0.0.7:17600", "10.0.0.7:9600", "10.0.0.7:8000")),
        ("[::]", "[fd00::7]:7600", ("[fd00::7]:7600", "[fd00::7]:9600", "[fd00::7]:8000")),
        ("0.0.0.0", "dns:///serve.example.org:7600", (
            "dns:///serve.example.org:7600", "serve.example.org:9600", "serve.example.org:8000",
        )),
        ("0.0.0.0", "dns:h:7600", ("dns:h:7600", "h:9600", "h:8000")),
        ("0.0.0.0", "ipv4:10.0.0.1:7600", ("ipv4:10.0.0.1:7600", "10.0.0.1:9600", "10.0.0.1:8000")),
        ("[::]", "ipv6:[::1]:7600", ("ipv6:[::1]:7600", "[::1]:9600", "[::1]:8000")),
        ("0.0.0.0", "unix:/run/r.sock", ("unix:/run/r.sock", "127.0.0.1:9600", "127.0.0.1:8000")),
        ("10.0.0.7", "127.0.0.1:17600", ("10.0.0.7:7600", "10.0.0.7:9600", "10.0.0.7:8000")),
    ],
)  # fmt: skip
def test_a_wildcard_address_is_shown_as_one_that_can_be_used(listens, reached, shown):
    process = admin_pb2.ProcessStatus(address=f"{listens}:7600", metrics_address=f"{listens}:9600")
    message = admin_pb2.StatusResponse(process=process, http_address=f"{listens}:8000")
    status = StackStatus.from_proto(message).reached_at(reached)
    assert (status.process.address, status.process.metrics_address, status.http_address) == shown
    without = StackStatus.from_proto(admin_pb2.StatusResponse()).reached_at(reached)
    assert (without.process.address, without.process.metrics_address, without.http_address) == ("", None, None)


def test_importing_the_sdk_loads_nothing_heavy():
    code = "import sys, overfill.client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "overfill.client.sync" in loaded.split()
    assert {"torch", "transformers", "ray", "numpy", "tokenizers"}.isdisjoint(loaded.split())


def test_an_option_that_does_not_exist_is_refused(sdk, router):
    with pytest.raises(TypeError, match=r"no option fallbak, max_tokens; max_tokens belong in sampling=SamplingParams"):
        sdk.run(router.address, "generate", "x", max_tokens=5, fallbak="fast")
    assert router.requests == []


def test_a_stream_outside_an_event_loop_fails_once():
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncResponses(None)
    gc.collect()
