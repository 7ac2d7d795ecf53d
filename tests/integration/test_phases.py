"""Tests requests that end early in any phase: by their deadline, a client that vanishes, or an eviction.

A prefill and a decode worker run in this process, on loopback. Gates in their engines hold a request in the phase under
test. Afterwards neither worker owns a block.
"""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace

import grpc
import pytest
import torch
from decode_calls import DecodeCall

from overfill.engine.build import load_half, size_pools
from overfill.engine.decode import DecodeEngine
from overfill.engine.prefill import PrefillEngine
from overfill.engine.protocol import EngineOptions
from overfill.engine.sequence import PrefillSequence, Release
from overfill.engine.thread import EngineThread
from overfill.errors import DeadlineExceeded, InvalidRequest, Unavailable
from overfill.kv import puller
from overfill.kv.peers import PeerPool
from overfill.kv.wire import add_prefill_to_server
from overfill.lab.chaos.proxy import TcpProxy
from overfill.model.manifest import Pair
from overfill.model.steps import NO_HOOKS, LayerHooks
from overfill.pair.reference import TwoStageReference
from overfill.request.params import SamplingParams
from overfill.rpc.channel import open_channel
from overfill.rpc.server import RpcServer
from overfill.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from services.decode.servicer import DecodeServicer
from services.messages import new_hello
from services.prefill.servicer import PrefillServicer

PROMPT = [(7 * i) % 400 + 20 for i in range(200)]


class Gate:
    """Blocks the engine's thread between two layers while it is closed."""

    def __init__(self):
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()

    def hold(self, layer):
        if not self.open.is_set() and layer == 2:
            self.reached.set()
            self.open.wait()


class GatedRunner:
    def __init__(self, runner, gate):
        self._runner, self._gate = runner, gate

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def next_tokens(self, works, specs, hooks=NO_HOOKS):
        def start(layer):
            self._gate.hold(layer)
            hooks.layer_start(layer)

        return self._runner.next_tokens(works, specs, LayerHooks(start, hooks.kv_written))


HOST = SimpleNamespace(draining=False, notify=lambda: None)


def load(pair, half, kv_memory=2 * 2**20):
    options = EngineOptions(torch.device("cpu"), "float32", kv_memory=kv_memory, max_model_len=256, prefix_cache=False)
    return size_pools([load_half(pair, half, options)])[0]


class Workers:
    """One worker of each stage, and calls to the decode worker like a router's."""

    async def start(self, stack, folder):
        loop = asyncio.get_running_loop()
        pair = Pair.load(folder)
        executor = stack.enter_context(ThreadPoolExecutor(4))
        self.prefill_gate, self.decode_gate = Gate(), Gate()
        self.full, self.decoder = load(pair, "full"), load(pair, "decoder")

        full = self.full.served
        hello = new_hello("p", [full])
        self.prefill = PrefillServicer(full, hello, executor, max_leases=8)
        self.prefill.host = HOST
        core = PrefillEngine(
            GatedRunner(self.full.runner, self.prefill_gate),
            self.full.pool,
            4096,
            8,
            lambda events: loop.call_soon_threadsafe(self.prefill.on_events, events),
        )
        self.prefill_core = core
        self.prefill.engine = EngineThread(core, "p", 1)
        prefill_address = await self._serve(stack, add_prefill_to_server, self.prefill, "overfill.v1.Prefill")
        self.target = decode_pb2.AssignPrefill(worker_id="p", incarnation=hello.incarnation, address=prefill_address)

        decoder = self.decoder.served
        self.peers = PeerPool(decoder.kv_identity, 2, None)
        stack.push_async_callback(self.peers.close)
        self.hello = new_hello("d", [decoder])
        self.decode = DecodeServicer(decoder, self.hello, self.peers, executor)
        self.decode.host = HOST
        core = DecodeEngine(
            GatedRunner(self.decoder.runner, self.decode_gate),
            self.decoder.pool,
            8,
            64,
            lambda events: loop.call_soon_threadsafe(self.decode.on_events, events),
        )
        self.decode.engine = EngineThread(core, "d", 1)
        address = await self._serve(
            stack, decode_pb2_grpc.add_DecodeServicer_to_server, self.decode, "overfill.v1.Decode"
        )
        for worker in (self.prefill, self.decode):
            worker.engine.start()
            stack.callback(worker.engine.stop)
        stack.callback(self.prefill_gate.open.set)
        stack.callback(self.decode_gate.open.set)
        channel = open_channel(address)
        stack.push_async_callback(channel.close)
        self.stub = decode_pb2_grpc.DecodeStub(channel)

    def hold_every_prefill_block(self):
        blocker = PrefillSequence("blocker", [0], SamplingParams())
        self.prefill_core._awaiting_release["blocker"] = blocker
        prefix = self.prefill_core._prefix
        allocation = prefix.acquire("blocker", prefix.blocks_of(blocker.prompt), self.full.pool.num_free)
        blocker.blocks = allocation.blocks

    async def _serve(self, stack, add, servicer, name):
        server = RpcServer()
        server.add(add, servicer, name)
        stack.push_async_callback(server.stop)
        return await server.start("127.0.0.1:0")

    def start_message(self, prompt=PROMPT, emitted=(), max_tokens=20, timeout=None, **sampling):
        params = SamplingParams(**{"temperature": 0, "seed": 1, "max_tokens": max_tokens, **sampling})
        return decode_pb2.StartDecode(
            request_id="r",
            expected_incarnation=self.hello.incarnation,
            prompt_token_ids=prompt,
            emitted_token_ids=emitted,
            sampling=params.to_proto(),
            eos_token_ids=[1],
            time_left_ns=None if timeout is None else round(timeout * 1e9),
        )

    async def begin(self, start):
        call = DecodeCall(self.stub)
        await call.send(start=start)
        return call

    async def reserve(self, timeout=None, **options):
        call = await self.begin(self.start_message(timeout=timeout, **options))
        assert (await call.read()).HasField("reserved")
        return call

    async def assign(self, call, *data_addresses):
        """Assigns the prefill worker. Each of the data addresses serves an equal share of the KV heads."""
        target = decode_pb2.AssignPrefill()
        target.CopyFrom(self.target)
        for number, address in enumerate(data_addresses):
            share = self.full.served.kv.num_kv_heads // len(data_addresses)
            target.data_addresses.add(address=address, first_kv_head=number * share, num_kv_heads=share)
        await call.send(assign_prefill=target)

    async def answer(self, call, ids=()):
        """Reads the rest of an answer whose first tokens are ``ids``."""
        ids = [*ids]
        while True:
            message = await call.read()
            kind = message.WhichOneof("message")
            if kind == "tokens":
                assert message.tokens.first_index == len(ids)
                ids.extend(message.tokens.ids)
            elif kind == "done":
                return ids, message.done
            else:
                raise AssertionError(message)

    async def open_gates_until_empty(self):
        """Opens both gates; waits up to two seconds until both pools and both tables of requests are empty."""
        self.prefill_gate.open.set()
        self.decode_gate.open.set()
        async with asyncio.timeout(2):
            while self.full.pool.num_used or self.decoder.pool.num_used or self.prefill.active or self.decode.active:
                await asyncio.sleep(0.01)
        self.full.pool.check_integrity()
        self.decoder.pool.check_integrity()


@pytest.fixture
async def workers(tiny_pair, monkeypatch):
    monkeypatch.setattr(
        "overfill.engine.layers.MIN_NOTIFY_BYTES", 1
    )  # send small KV layer by layer, like that of large models
    async with AsyncExitStack() as stack:
        workers = Workers()
        await workers.start(stack, tiny_pair)
        yield workers
        await workers.open_gates_until_empty()


@pytest.fixture(scope="module")
def reference(tiny_pair):
    torch.set_num_threads(1)
    return TwoStageReference(tiny_pair)


async def reached(gate):
    await asyncio.to_thread(gate.reached.wait, 10)
    assert gate.reached.is_set()


@asynccontextmanager
async def in_phase(workers, phase, timeout=None):
    """Starts a call and returns it once its request is held in ``phase``."""
    async with AsyncExitStack() as stack:
        call = await workers.reserve(timeout)
        if phase == "prefill queued":
            workers.hold_every_prefill_block()
            stack.callback(workers.prefill.engine.send, Release("blocker"))
        if phase == "prefill running":
            workers.prefill_gate.open.clear()
        if phase == "decoding":
            workers.decode_gate.open.clear()
        if phase == "KV on its way":
            proxy = await stack.enter_async_context(TcpProxy(workers.target.address, 10_000))
            await workers.assign(call, proxy.address)
            assert (await call.read()).HasField("tokens"), "the first token comes before the KV"
        elif phase != "reserved":
            await workers.assign(call)
        if phase == "prefill queued":
            async with asyncio.timeout(5):
                while not workers.prefill.active:
                    await asyncio.sleep(0.01)
        if phase == "prefill running":
            await reached(workers.prefill_gate)
        if phase == "decoding":
            await reached(workers.decode_gate)
        yield call


PHASES = ["reserved", "prefill queued", "prefill running", "KV on its way", "decoding"]


@pytest.mark.parametrize("phase", PHASES)
async def test_a_deadline_that_passes_frees_both_sides(workers, phase):
    async with in_phase(workers, phase, timeout=2.0) as call:
        assert isinstance(await call.failure(), DeadlineExceeded)
    await workers.open_gates_until_empty()


@pytest.mark.parametrize("phase", PHASES)
async def test_a_router_that_vanishes_frees_both_sides(workers, phase):
    async with in_phase(workers, phase) as call:
        call.cancel()
    await workers.open_gates_until_empty()


@pytest.mark.parametrize("phase", PHASES)
async def test_an_eviction_frees_both_sides(workers, phase):
    async with in_phase(workers, phase) as call:
        await call.send(evict=decode_pb2.Evict(reason="elsewhere"))
        error = await call.failure()
        assert isinstance(error, Unavailable)
        assert "elsewhere" in str(error)
    await workers.open_gates_until_empty()


def outcomes(metrics, name):
    samples = [sample for family in metrics.registry.collect() for sample in family.samples if sample.name == name]
    return {label: sample.value for sample in samples for label in sample.labels.values() if sample.value}


@pytest.mark.parametrize("last", ["length", "stop token"])
async def test_an_answer_that_its_first_token_ends_releases_its_kv_and_is_no_failure(
    workers, reference, last, monkeypatch
):
    pulls, pull_kv = [], puller.pull_kv
    monkeypatch.setattr(puller, "pull_kv", lambda *args: pulls.append(args) or pull_kv(*args))
    (first,) = reference.generate(PROMPT, 1)
    options = {"max_tokens": 1} if last == "length" else {"stop_token_ids": [first]}
    async with TcpProxy(workers.target.address, 10_000) as proxy:
        call = await workers.reserve(**options)
        await workers.assign(call, proxy.address)
        ids, _ = await workers.answer(call)
        await workers.open_gates_until_empty()
    assert ids == ([first] if last == "length" else [])
    assert outcomes(workers.prefill._metrics, "overfill_prefill_prompts_total") == {"ok": 1}
    assert outcomes(workers.decode.metrics, "overfill_decode_handoff_failures_total") == {}
    assert outcomes(workers.decode.metrics, "overfill_decode_handoff_seconds_count") == {}, "most KV has not arrived"
    if last == "length":  # whether a pull begins before the stop token arrives is a race
        assert not pulls, "one token is known beforehand to need no KV"


async def test_an_answer_of_one_token_is_computed_again_elsewhere_when_its_prefill_worker_fails(workers, reference):
    call = await workers.reserve(max_tokens=1)
    workers.prefill_gate.open.clear()
    await workers.assign(call)
    await reached(workers.prefill_gate)
    workers.prefill.end_all(Unavailable("it leaves"))
    assert (await call.read()).need_prefill.reason == decode_pb2.NeedPrefill.REASON_PREFILL_FAILED
    workers.prefill_gate.open.set()
    await workers.assign(call)
    ids, _ = await workers.answer(call)
    assert ids == reference.generate(PROMPT, 1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": []}, "prompt_token_ids"),
        ({"prompt": [5, 512]}, "prompt_token_ids"),
        ({"prompt": [5] * 256}, "prompt_token_ids"),
        ({"emitted": [1] * 20}, "emitted_token_ids"),
        ({"stop_token_ids": (512,)}, "sampling.stop_token_ids"),
        ({"temperature": 1.0, "seed": None}, "sampling.seed"),
    ],
)
async def test_a_wrong_request_is_refused_naming_the_field(workers, change, field):
    error = await (await workers.begin(workers.start_message(**change))).failure()
    assert isinstance(error, InvalidRequest)
    assert error.field == field


async def test_a_stale_incarnation_is_refused(workers):
    start = workers.start_message()
    start.expected_incarnation += 1
    assert isinstance(await (await workers.begin(start)).failure(), Unavailable)


async def test_a_draining_worker_refuses_new_requests(workers, monkeypatch):
    monkeypatch.setattr(workers.decode, "host", SimpleNamespace(draining=True, notify=lambda: None))
    assert isinstance(await (await workers.begin(workers.start_message())).failure(), Unavailable)


async def test_a_prefill_worker_that_fails_is_reported_and_another_may_follow(workers, reference):
    call = await workers.reserve()
    gone = decode_pb2.AssignPrefill(worker_id="gone", incarnation=1, address="127.0.0.1:1")
    await call.send(assign_prefill=gone)
    need = (await call.read()).need_prefill
    assert need.reason == decode_pb2.NeedPrefill.REASON_PREFILL_FAILED
    assert need.worker_id == "gone"
    await workers.assign(call)
    ids, _ = await workers.answer(call)
    assert ids == reference.generate(PROMPT, 20)


async def test_each_data_address_sends_its_own_heads(workers, reference, monkeypatch):
    monkeypatch.setattr(puller, "_STREAM_BYTES", 1)  # each address has all streams
    pulls, pull_kv = [], puller.pull_kv
    monkeypatch.setattr(puller, "pull_kv", lambda *args: pulls.append(args) or pull_kv(*args))
    call = await workers.reserve()
    async with TcpProxy(workers.target.address) as first, TcpProxy(workers.target.address) as second:
        await workers.assign(call, first.address, second.address)
        ids, _ = await workers.answer(call)
    assert ids == reference.generate(PROMPT, 20)
    pulled = {(channel, box.head_start, box.head_end) for channel, request, _ in pulls for box in request.ranges}
    assert len(pulled) == len(pulls) == 4, "two streams to each address"
    assert sorted(heads for _, *heads in pulled) == [[0, 1], [0, 1], [1, 2], [1, 2]]


async def test_a_data_address_that_nobody_serves_fails_the_prefill_and_another_may_follow(workers, reference):
    call = await workers.reserve()
    await workers.assign(call, workers.target.address, "127.0.0.1:1")
    first = list((await call.read()).tokens.ids)
    need = (await call.read()).need_prefill
    assert need.reason == decode_pb2.NeedPrefill.REASON_PREFILL_FAILED
    await workers.assign(call)
    ids, _ = await workers.answer(call, first)
    assert ids == reference.generate(PROMPT, 20)


async def test_addresses_that_lack_a_head_are_refused_by_name(workers, reference):
    call = await workers.reserve()
    target = decode_pb2.AssignPrefill()
    target.CopyFrom(workers.target)
    target.data_addresses.add(address=target.address, num_kv_heads=1)
    await call.send(assign_prefill=target)
    need = (await call.read()).need_prefill
    assert need.reason == decode_pb2.NeedPrefill.REASON_INCOMPATIBLE
    assert "data_addresses must serve each of the 2 KV heads exactly once; got the ranges [0, 1)" in need.detail
    await workers.assign(call)
    ids, _ = await workers.answer(call)
    assert ids == reference.generate(PROMPT, 20)


async def test_when_blocks_run_out_a_sequence_asks_for_its_kv_again_and_the_answer_stays_right(workers, reference):
    pool = workers.decoder.pool
    calls = [await workers.reserve(max_tokens=40) for _ in range(2)]
    blocker = pool.acquire("blocker", pool.num_free - 1)
    for call in calls:
        await workers.assign(call)

    async def answer(call):
        ids, preempted = [], 0
        while True:
            message = await call.read()
            match message.WhichOneof("message"):
                case "tokens":
                    ids.extend(message.tokens.ids)
                case "need_prefill":
                    assert message.need_prefill.reason == decode_pb2.NeedPrefill.REASON_PREEMPTED
                    preempted += 1
                    await workers.assign(call)
                case "done":
                    return ids, preempted

    answers = await asyncio.gather(*map(answer, calls))
    pool.release("blocker", blocker)
    assert [ids for ids, _ in answers] == [reference.generate(PROMPT, 40)] * 2
    assert sum(preempted for _, preempted in answers) >= 1


async def test_pullkv_of_an_unknown_transfer_is_refused(workers):
    channel = open_channel(workers.target.address)
    call = prefill_pb2_grpc.PrefillStub(channel).PullKv(prefill_pb2.PullKvRequest(transfer_id=b"?" * 16))
    with pytest.raises(grpc.RpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    await channel.close()


async def test_one_stream_is_enough_for_little_kv(workers, reference, monkeypatch):
    pulls, pull_kv = [], puller.pull_kv
    monkeypatch.setattr(puller, "pull_kv", lambda *args: pulls.append(args) or pull_kv(*args))
    call = await workers.reserve()
    await workers.assign(call)
    ids, _ = await workers.answer(call)
    assert ids == reference.generate(PROMPT, 20)
    assert len(pulls) == 1
