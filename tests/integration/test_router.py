"""Tests a router on loopback with scripted decode workers."""

import asyncio
import os
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import grpc
import pytest

from overfill.api import key_file as keys
from overfill.api.tokenizer import Tokenizer
from overfill.client import AsyncClient
from overfill.errors import (
    Unavailable,
)
from overfill.model.manifest import Pair
from overfill.request.params import SamplingParams
from overfill.rpc import shares
from overfill.rpc.channel import open_channel
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.membership import Membership
from overfill.rpc.sequences import serve_sequences
from overfill.rpc.server import RpcServer
from overfill.rpc.tls import TlsError
from overfill.settings.config import RouterConfig
from overfill.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    registry_pb2,
)
from services.router import inference, open_requests
from services.router.app import Router
from services.router.limits import READ_GRACE

STOP = common_pb2.FINISH_REASON_STOP
LENGTH = common_pb2.FINISH_REASON_LENGTH
PROMPT = [10, 11, 12]


async def until(condition):
    """Polls ``condition``, because a router's view of other processes has no event to wait for."""
    while not condition():
        await asyncio.sleep(0.01)


class Call:
    """One sequence, from the worker's end."""

    def __init__(self, served):
        self.start = served.start
        self.served = served
        self.ended = asyncio.Event()
        self._done = asyncio.get_running_loop().create_future()

    def say(self, **update):
        self.served.put(decode_pb2.SequenceUpdate(**update))

    async def run(self):
        try:
            await self._done
        finally:
            self.ended.set()

    def end(self):
        self._done.set_result(None)

    def tokens(self, first, ids, **more):
        self.say(tokens=decode_pb2.Tokens(first_index=first, ids=ids, **more))

    def done(self, reason=STOP, **more):
        self.say(done=decode_pb2.DecodeDone(reason=reason, **more))
        self.end()

    async def reserve(self):
        """Answers Reserved; returns the assignment of a prefill worker."""
        self.say(reserved=decode_pb2.Reserved(blocks=1, reservation_ns=1000))
        with_start = self.start.HasField("assign_prefill")
        return self.start.assign_prefill if with_start else await self.served.commands.get()

    async def answer(self, ids, reason=STOP):
        await self.reserve()
        self.tokens(len(self.start.emitted_token_ids), ids)
        self.done(reason)


class Worker(decode_pb2_grpc.DecodeServicer, admin_pb2_grpc.AdminServicer):
    """A worker without an engine; the test answers its calls."""

    def __init__(self, name, pair, stage):
        config = pair.full_config
        self.calls = asyncio.Queue()
        self.silent = False
        self.drained = asyncio.Event()
        self.breaks_off = None  # "gone" or "there": ends Drain without an answer, and leaves or stays
        self.refusal = asyncio.Queue()
        self.credits = 8
        self.hello = registry_pb2.Hello(
            worker_id=name,
            incarnation=int.from_bytes(os.urandom(4), "big"),
            stages=[stage],
            wire_version=WIRE_VERSION,
            software_version="9.9.9",
            engine=f"engine of {name}",
            model=pair.model_identity("decoder" if stage == common_pb2.STAGE_DECODE else "full"),
            kv=config.kv_spec("float32").to_proto(),
            max_model_len=config.max_positions,
            vocab_size=config.vocab_size,
        )
        self.load = decode_pb2.WorkerLoad(kv_blocks_total=128, block_size=16)

    async def Serve(self, requests, context):
        await serve_sequences(requests, context, self._run)

    async def _run(self, served):
        call = Call(served)
        self.calls.put_nowait(call)
        await call.run()

    async def Status(self, request, context):
        if self.silent:
            await asyncio.Event().wait()
        process = admin_pb2.ProcessStatus(id=self.hello.worker_id, pid=42, ready=True, load=self.load)
        return admin_pb2.StatusResponse(process=process)

    async def Drain(self, request, context):
        self.drained.set()
        if self.breaks_off is None:
            return admin_pb2.DrainResponse()
        if self.breaks_off == "gone":
            await self.membership.stop()
        self._stopping = asyncio.create_task(self._server.stop(0))
        await asyncio.Event().wait()

    async def serve(self, router):
        self._server = RpcServer()
        self._server.add(decode_pb2_grpc.add_DecodeServicer_to_server, self, "overfill.v1.Decode")
        self._server.add(admin_pb2_grpc.add_AdminServicer_to_server, self, "overfill.v1.Admin")
        self.hello.address = await self._server.start("127.0.0.1:0")
        self.membership = Membership(self.hello, [router], self._report, on_refused=self.refusal.put_nowait)
        await self.membership.start()

    async def kill(self):
        """Ends as a process that dies: streams break without a message."""
        await self._server.stop(0)
        await self.membership.stop()

    def _report(self):
        return registry_pb2.Report(load=self.load, credits=self.credits, ready=True)


class Stack:
    """A router and its workers."""

    def __init__(self, router, address, pair, exits):
        self.router = router
        self.address = address
        self.pair = pair
        self._exits = exits

    async def add(self, name, stage=common_pb2.STAGE_DECODE, **arguments):
        worker = Worker(name, self.pair, stage, **arguments)
        await worker.serve(self.address)
        self._exits.push_async_callback(worker.kill)
        return worker

    async def staff(self):
        """Adds one prefill and one decode worker; waits until both are available."""
        self.prefill = await self.add("p0", common_pb2.STAGE_PREFILL)
        self.first = await self.add("d0")
        await self.joined("p0", "d0")

    async def joined(self, *names):
        """Waits until exactly these workers are available for requests."""
        await until(lambda: {w.id for w in self.router.roster.workers() if w.credits_left} == set(names))

    async def idle(self):
        """Waits until no request is in flight."""
        await until(lambda: not self.router.dispatcher.num_jobs)
        assert all(w.in_flight == 0 for w in self.router.roster.workers())


@asynccontextmanager
async def running(pair_folder, grace_period=5, **config):
    async with AsyncExitStack() as exits:
        router = Router(RouterConfig(pair=pair_folder, port=0, grace_period=grace_period, **config))
        address = await router.start()
        serving = asyncio.create_task(router.run())
        try:
            yield Stack(router, address, Pair.load(pair_folder), exits)
        finally:
            router.drain()
            await serving


@pytest.fixture
async def stack(tiny_pair):
    """A stack with a prefill and a decode worker, in which no request is left after the test."""
    async with running(tiny_pair, max_attempts=3) as stack:
        await stack.staff()
        yield stack
        await stack.idle()


@pytest.fixture
async def client(stack):
    async with AsyncClient(stack.address) as client:
        yield client


@pytest.fixture
async def stub(stack):
    """A stub, for tests below the SDK."""
    channel = open_channel(stack.address)
    yield inference_pb2_grpc.InferenceStub(channel)
    await channel.close(None)


@pytest.fixture(scope="session")
def tokenizer(tiny_pair):
    return Tokenizer.load(tiny_pair / "full")


def greedy(max_tokens=16):
    return SamplingParams(temperature=0, max_tokens=max_tokens)


def request(**more):
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=PROMPT),
        sampling=common_pb2.SamplingParams(temperature=0, max_tokens=16),
        **more,
    )


async def test_an_answer_has_all_its_fields(stack, client, tokenizer):
    ids = tokenizer.encode("an answer")
    asking = asyncio.create_task(client.generate(PROMPT, sampling=greedy(), request_id="mine"))
    call = await stack.first.calls.get()
    assert list(call.start.prompt_token_ids) == PROMPT
    assert call.start.request_id == "mine"
    assert tuple(call.start.eos_token_ids) == tokenizer.eos_token_ids
    assert call.start.sampling.HasField("seed")
    assert call.start.sampling.max_tokens == 16
    target = await call.reserve()
    assert target.worker_id == "p0"
    assert target.address == stack.prefill.hello.address
    call.tokens(0, ids[:1], prefill_queue_ns=1, prefill_compute_ns=2, return_ns=3)
    call.tokens(1, ids[1:])
    call.done(prefill_worker_id="p0", handoff_exposed_ns=5, decode_ns=6)
    answer = await asking
    assert answer.text == "an answer"
    assert list(answer.token_ids) == ids
    assert answer.finish_reason == "stop"
    assert (answer.request_id, answer.prefill_worker, answer.decode_worker) == ("mine", "p0", "d0")
    assert (answer.prefill_engine, answer.decode_engine) == ("engine of p0", "engine of d0")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, len(ids))
    assert answer.migrations == 0
    timing = answer.timing
    assert timing.decode_reservation == pytest.approx(1e-6)
    assert (timing.prefill_queue, timing.prefill_compute) == (pytest.approx(1e-9), pytest.approx(2e-9))
    assert timing.return_path > 3e-9
    assert 0 < timing.router_queue < timing.ttft <= timing.total
    assert (timing.handoff_exposed, timing.decode) == (pytest.approx(5e-9), pytest.approx(6e-9))


async def test_a_stop_string_cuts_the_answer_and_cancels_the_worker(stack, client, tokenizer):
    ids = tokenizer.encode("one two END three")
    asking = asyncio.create_task(client.generate(PROMPT, sampling=greedy(64), stop=["END"]))
    call = await stack.first.calls.get()
    await call.reserve()
    call.tokens(0, ids)  # without Done, the worker would continue
    answer = await asking
    await call.ended.wait()
    assert answer.text == "one two "
    assert (answer.finish_reason, answer.stop) == ("stop", "END")
    assert answer.usage.completion_tokens == len(answer.token_ids) < len(ids)


async def test_a_stop_string_frees_the_worker_before_the_client_has_read_what_it_cut(stack, tokenizer):
    handler = stack.router.cores[0].handler
    request = inference_pb2.GenerateRequest(sampling=greedy(64).to_proto(), stop=["END"])
    request.token_ids.ids.extend(PROMPT)
    with handler.requests.hold_quota() as hold:
        checked = await handler.check(request, hold, asyncio.get_running_loop().time())
        generation = handler.start(checked, hold)
    with generation:
        reading = asyncio.ensure_future(generation.next())
        call = await stack.first.calls.get()
        await call.reserve()
        call.tokens(0, tokenizer.encode("one two END three"))
        assert (await reading).text == "one two "
        assert not stack.router.dispatcher.num_jobs


@pytest.mark.parametrize(
    ("batches", "kinds"),
    [
        ([[20, 21, 22]], ["accepted", "delta", "finished"]),
        ([[20], [21, 22]], ["accepted", "delta", "finished"]),
        ([[20], [21], [22]], ["accepted", "delta", "delta", "finished"]),
    ],
)
async def test_the_last_tokens_share_a_message_with_the_end(stack, stub, batches, kinds):
    """Only the first tokens never wait for the end, because the time to first token is measured at them."""
    answering = stub.Generate(request())
    call = await stack.first.calls.get()
    await call.reserve()
    responses, first = [await answering.read()], 0
    for ids in batches[:-1]:
        call.tokens(first, ids)
        responses.append(await answering.read())
        first += len(ids)
    call.tokens(first, batches[-1])
    call.done()
    while len(responses) < len(kinds):
        responses.append(await answering.read())
    assert await answering.read() is grpc.aio.EOF
    assert [response.WhichOneof("message") for response in responses] == kinds
    deltas = [r.delta for r in responses if r.HasField("delta")] + [responses[-1].finished.rest]
    assert [i for delta in deltas for i in delta.token_ids] == [20, 21, 22]


@pytest.mark.parametrize("phase", ["started", "reserved", "running"])
async def test_a_client_that_gives_up_cancels_the_worker(stack, stub, phase):
    answering = stub.Generate(request())
    call = await stack.first.calls.get()
    if phase != "started":
        await call.reserve()
    if phase == "running":
        call.tokens(0, [20])
        assert (await answering.read()).HasField("accepted")
        assert (await answering.read()).HasField("delta")
    answering.cancel()
    await call.ended.wait()
    await stack.idle()


async def unread(stack, count):
    """Sends an answer to a client that reads none of it, but answers pings; returns its channel, RPC and sequence."""
    # A small window, so that the router's writes wait.
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    channel = grpc.aio.insecure_channel(stack.address, options=narrow)
    top = common_pb2.TokenLogprobs(top_ids=range(20), top_logprobs=[-1.0] * 20)
    asked = request()
    asked.sampling.max_tokens = count + 1
    asked.sampling.logprobs = 20
    rpc = inference_pb2_grpc.InferenceStub(channel).Generate(asked)
    call = await stack.first.calls.get()
    await call.reserve()
    for index in range(count):  # some 130 bytes each
        call.tokens(index, [index % 500], logprobs=[top])
    return channel, rpc, call


async def test_a_client_that_reads_nothing_is_given_up(stack, monkeypatch):
    monkeypatch.setattr(inference, "STALLED_TIMEOUT", 0.3)
    channel, rpc, call = await unread(stack, 1900)
    try:
        async with asyncio.timeout(20):
            await call.ended.wait()  # although the answer has not ended
            assert not stack.router._requests._running
            with pytest.raises(grpc.aio.AioRpcError, match=r"the client has read nothing for 0\.3 s") as ended:
                async for _ in rpc:
                    pass
    finally:
        await channel.close(None)
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_key_whose_client_reads_no_first_message_is_refused_until_it_has_read(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "STALLED_TIMEOUT", 0.1)
    monkeypatch.setattr(shares, "MAX_UNREAD_BYTES", 1)
    file, secret = tmp_path / "keys.json", tmp_path / "secret"
    secret.write_text("a secret of 32 characters at least")
    metadata = [("authorization", f"Bearer {keys.create(file, 'slow')}")]
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 5)]
    async with (
        asyncio.timeout(30),
        running(tiny_pair, grace_period=0, api_keys=file, stack_secret=secret) as stack,
        grpc.aio.insecure_channel(stack.address, options=narrow) as channel,
        open_channel(stack.address) as other,
    ):
        handler = stack.router.cores[0].handler
        unread = inference_pb2_grpc.InferenceStub(channel).Generate(request(), metadata=metadata)
        await until(lambda: handler.requests._running)
        await until(lambda: not handler.requests._running)

        async def is_refused():
            asking = inference_pb2_grpc.InferenceStub(other).Generate(request(), metadata=metadata)
            with suppress(grpc.aio.AioRpcError):
                await asking.read()
                asking.cancel()
            return await asking.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        assert await is_refused()
        with pytest.raises(grpc.aio.AioRpcError, match=r"the client has read nothing for 0\.1 s") as ended:
            async for _ in unread:
                pass
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        while await is_refused():  # the router learns a moment later than the client that the RPC has ended
            await asyncio.sleep(0.01)


async def test_a_drain_does_not_wait_for_a_client_that_does_not_read_a_complete_answer(tiny_pair, monkeypatch):
    monkeypatch.setattr(open_requests, "READ_GRACE", 0.1)
    async with asyncio.timeout(30):
        async with running(tiny_pair, grace_period=60) as stack:
            await stack.staff()
            channel, _rpc, call = await unread(stack, 1900)
            call.done(LENGTH)
            await stack.idle()
            assert stack.router._requests._running, "or the test proves nothing"
        await channel.close(None)


async def test_a_drain_waits_for_a_client_that_reads_a_complete_answer_slowly(stack, monkeypatch):
    monkeypatch.setattr(open_requests, "READ_GRACE", 100.0)
    loop, handler = asyncio.get_running_loop(), stack.router.cores[0].handler
    real, skipped = loop.time, 0
    monkeypatch.setattr(loop, "time", lambda: real() + skipped)
    with handler.requests.hold_quota() as hold:
        answer = handler.start(await handler.check(request(), hold, loop.time()), hold)
    with answer:
        reading = asyncio.ensure_future(answer.next())
        call = await stack.first.calls.get()
        await call.reserve()
        call.tokens(0, [20])
        assert await reading
        call.tokens(1, [21])
        call.done(LENGTH)
        await stack.idle()
        waiting = asyncio.ensure_future(handler.requests.wait_idle())
        await asyncio.sleep(0)
        skipped += 60
        assert await answer.next()  # tells that the client has the first delta
        skipped += 60
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        skipped += 60
        await waiting


async def test_status_asks_the_workers_and_shows_a_silent_one(stack, client):
    stack.first.load.running = 3
    stack.prefill.silent = True
    status = await client.status()
    by_id = {w.id: w for w in status.workers}
    assert list(by_id) == ["p0", "d0"]
    assert by_id["d0"].process.load.running == 3
    assert by_id["d0"].process.pid == 42
    assert by_id["p0"].process is None
    assert by_id["p0"].address == stack.prefill.hello.address
    assert status.process.pid == os.getpid()
    assert status.process.address == stack.address


async def test_a_router_that_expects_nothing_is_complete_with_a_worker_of_each_stage(tiny_pair):
    async with running(tiny_pair) as stack, AsyncClient(stack.address) as client:
        status = await client.status()
        assert (status.serving, status.complete, status.pools["prefill"].expected) == (False, False, 1)


async def test_an_id_in_use_by_the_other_stage_is_refused_and_the_first_stays(stack):
    worker = await stack.add(stack.first.hello.worker_id, stage=common_pb2.STAGE_PREFILL)
    assert (await worker.refusal.get()).fields == ("worker_id",)
    assert stack.router.roster.find(stack.first.hello.worker_id).info.stage == common_pb2.STAGE_DECODE


async def test_a_second_worker_with_the_id_of_one_that_works_is_refused_and_the_first_stays(stack, client, caplog):
    name = stack.first.hello.worker_id
    incarnation = stack.first.hello.incarnation
    for _ in range(2):
        worker = await stack.add(name)
        error = await worker.refusal.get()
        assert error.fields == ("worker_id",)
        assert stack.first.hello.address in str(error)
    assert stack.router.roster.find(name).info.incarnation == incarnation
    assert [r.levelname for r in caplog.records if "refused a second worker" in r.message] == ["WARNING"] * 2
    asking = asyncio.create_task(client.generate(PROMPT, sampling=greedy()))
    await (await stack.first.calls.get()).answer([20])
    assert list((await asking).token_ids) == [20]


async def test_a_worker_that_leaves_before_it_answers_has_been_drained(stack):
    channel = open_channel(stack.address)
    stub = admin_pb2_grpc.AdminStub(channel)
    stack.first.breaks_off = "gone"
    await stub.Drain(admin_pb2.DrainRequest(worker_id="d0"))
    other = await stack.add("d1")
    await stack.joined("p0", "d1")
    other.breaks_off = "there"
    with pytest.raises(grpc.RpcError):
        await stub.Drain(admin_pb2.DrainRequest(worker_id="d1"))
    await channel.close(None)


async def test_a_draining_router_finishes_running_requests_and_refuses_new_ones(tiny_pair):
    async with running(tiny_pair) as stack, AsyncClient(stack.address) as client:
        await stack.staff()
        asking = asyncio.create_task(client.generate(PROMPT, sampling=greedy()))
        call = await stack.first.calls.get()
        stack.router.drain()
        await until(lambda: stack.router._requests.draining)
        with pytest.raises(Unavailable, match="shutting down"):
            await client.generate(PROMPT, sampling=greedy())
        assert (await client.status()).process.draining
        await stack.add("d1")
        await stack.joined("p0", "d0", "d1")
        await call.answer([20])
        assert list((await asking).token_ids) == [20]


async def test_a_request_that_outlives_the_grace_period_gets_a_clean_error(tiny_pair):
    async with running(tiny_pair, grace_period=0) as stack, AsyncClient(stack.address) as client:
        await stack.staff()
        asking = asyncio.create_task(client.generate(PROMPT, sampling=greedy()))
        call = await stack.first.calls.get()
        await call.reserve()
        call.tokens(0, [20])
        stack.router.drain()
        # The client asks once more. It may reach the port that the router has opened again, which refuses it.
        with pytest.raises(Unavailable, match=r"shut down before the answer was complete|router is shutting down"):
            await asking
        await call.ended.wait()


async def test_a_drain_ends_its_answers_although_its_port_cannot_be_opened_again(tiny_pair, monkeypatch):
    async with running(tiny_pair, grace_period=60) as stack, AsyncClient(stack.address) as client:
        await stack.staff()
        asking = asyncio.create_task(client.generate(PROMPT, sampling=greedy()))
        call = await stack.first.calls.get()

        async def start(self, address):
            raise TlsError("the certificate cannot be read")

        monkeypatch.setattr(RpcServer, "start", start)
        stack.router.drain()
        await until(lambda: stack.router._requests.draining)
        await call.answer([20])
        assert list((await asking).token_ids) == [20]


async def test_an_unread_answer_does_not_outlast_the_grace_period(tiny_pair):
    router = Router(RouterConfig(pair=tiny_pair, port=0, grace_period=0))
    await router.start()
    serving = asyncio.create_task(router.run())
    handler = router.cores[0].handler
    request = inference_pb2.GenerateRequest(sampling=greedy().to_proto())
    request.token_ids.ids.extend(PROMPT)
    with handler.requests.hold_quota() as hold:
        checked = await handler.check(request, hold, asyncio.get_running_loop().time())
        answer = handler.start(checked, hold)
    with answer:
        router.drain()
        await asyncio.wait_for(asyncio.shield(serving), 0.8 * READ_GRACE)
