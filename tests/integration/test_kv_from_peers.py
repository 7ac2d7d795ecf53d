"""Prefill workers that take a prompt's beginning from another worker's cache, as real processes.

No router runs: the tests name the holder themselves. A scripted holder shows what no real one does.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from kv_checksums import seal
from kv_pulls import prefill_process
from peer_workers import LENGTH, PrefillClient, holder_of, prompt_of

from overfill.errors import DeadlineExceeded, OverfillError, ShuttingDown
from overfill.kv import receiver
from overfill.kv.chunks import TransferSpec
from overfill.kv.imports import RETRY_AFTER
from overfill.kv.ranges import KvRange
from overfill.kv.spec import KvSpec
from overfill.kv.wire import SERVICE, join_chunks
from overfill.rpc.server import RpcServer
from overfill.v1 import common_pb2, kv_pb2, prefill_pb2, prefill_pb2_grpc

FLAGS = ("--kv-memory=4MiB",)


@pytest.fixture(scope="module")
def hellos(tiny_pair):
    """Workers with blocks of 16, 16, 32 and 7 tokens, by name."""
    sizes = {"holder": 16, "alike": 16, "large": 32, "odd": 7}
    with (
        prefill_process(f"--pair={tiny_pair}", *FLAGS) as holder,
        prefill_process(f"--pair={tiny_pair}", *FLAGS) as alike,
        prefill_process(f"--pair={tiny_pair}", *FLAGS, f"--block-size={sizes['large']}") as large,
        prefill_process(f"--pair={tiny_pair}", *FLAGS, f"--block-size={sizes['odd']}") as odd,
    ):
        yield {"holder": holder, "alike": alike, "large": large, "odd": odd}


@pytest.fixture
def executor():
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
async def workers(hellos, tiny_pair, executor):
    """The same workers. When the test has ended, all their blocks are free."""
    workers = {name: PrefillClient(hello, tiny_pair, executor) for name, hello in hellos.items()}
    yield SimpleNamespace(**workers)
    for worker in workers.values():
        await worker.until_free()
        await worker.peer.close()


@pytest.fixture
def spare_hello(request, tiny_pair):
    """A further worker, which the test may stop; its parameter has more flags."""
    with prefill_process(f"--pair={tiny_pair}", *FLAGS, *getattr(request, "param", ())) as hello:
        yield hello


@pytest.fixture
async def spare(spare_hello, tiny_pair, executor):
    worker = PrefillClient(spare_hello, tiny_pair, executor)
    yield worker
    await worker.peer.close()


@pytest.mark.parametrize("spare_hello", [["--revision=r2"]], indirect=True)
async def test_kv_of_another_revision_is_computed_and_not_borrowed(workers, spare):
    prompt = prompt_of(50)
    await spare.prefill(prompt)
    got = await workers.alike.prefill(prompt, holder_of(spare.hello))
    assert (got.cached, got.peer) == (0, 0)


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "pulled"])
async def test_borrowed_kv_is_the_holders_bit_by_bit_and_the_next_token_is_the_same(workers, monkeypatch, at_once):
    if not at_once:
        monkeypatch.setattr(receiver, "MAX_KV_AT_ONCE", 0)
    prompt = prompt_of(1 + at_once)
    computed = await workers.holder.prefill(prompt)
    borrowed = await workers.alike.prefill(prompt, holder_of(workers.holder.hello))
    assert (borrowed.cached, borrowed.peer) == (144, 144)
    assert torch.equal(borrowed.kv[:, :, :144], computed.kv[:, :, :144])
    torch.testing.assert_close(borrowed.kv, computed.kv, atol=1e-4, rtol=1e-4)
    assert borrowed.token == computed.token
    again = await workers.alike.prefill(prompt, holder_of(workers.holder.hello))
    assert (again.cached, again.peer) == (144, 0), "the borrower's own cache has it now"


@pytest.mark.parametrize(
    ("lender", "borrower", "end"),
    [("holder", "large", 128), ("large", "holder", 128), ("holder", "odd", 140), ("odd", "holder", 144)],
)
async def test_workers_with_different_block_sizes_lend_to_each_other(workers, lender, borrower, end):
    prompt = prompt_of(10 + ("large", "odd", "holder").index(borrower) + 3 * (lender == "odd"))
    lender, borrower = getattr(workers, lender), getattr(workers, borrower)
    computed = await lender.prefill(prompt)
    borrowed = await borrower.prefill(prompt, holder_of(lender.hello))
    assert borrowed.peer == end
    assert torch.equal(borrowed.kv[:, :, :end], computed.kv[:, :, :end])
    assert borrowed.token == computed.token


async def test_what_a_borrower_has_itself_does_not_travel_and_its_own_tenants_stay_apart(workers):
    prompt = prompt_of(20)
    await workers.holder.prefill(prompt, namespace="one")
    await workers.alike.prefill(prompt[:70], namespace="one")
    assert (await workers.alike.prefill(prompt, holder_of(workers.holder.hello), "two")).peer == 0
    assert (await workers.alike.prefill(prompt, holder_of(workers.holder.hello), "one")).peer == 144 - 64


async def test_a_lossy_codec_to_the_decode_worker_leaves_loans_exact(workers):
    prompt = prompt_of(21)
    computed = await workers.holder.prefill(prompt, codec=common_pb2.KV_CODEC_INT8)
    borrowed = await workers.alike.prefill(prompt, holder_of(workers.holder.hello), codec=common_pb2.KV_CODEC_INT8)
    assert borrowed.peer == 144
    assert torch.equal(borrowed.kv[:, :, :144], computed.kv[:, :, :144]), "rounded from the same KV"
    exact = await workers.alike.prefill(prompt)
    assert torch.equal(exact.kv[:, :, :144], (await workers.holder.prefill(prompt)).kv[:, :, :144])


async def test_prompts_that_share_a_borrowed_beginning_borrow_it_once(workers):
    prompts = [[*prompt_of(22), *([number] * 20)] for number in (30, 40, 50)]
    await workers.holder.prefill(prompt_of(22))
    named = holder_of(workers.holder.hello)
    borrowed = await asyncio.gather(*(workers.alike.prefill(prompt, named) for prompt in prompts))
    assert sorted(one.peer for one in borrowed) == [0, 0, 144]
    assert {one.cached for one in borrowed} == {144}


async def test_a_frozen_holder_costs_one_bounded_wait_and_then_the_prompt_is_computed(workers, spare):
    prompt, other = prompt_of(30), prompt_of(31)
    for known in (prompt, other):
        await spare.prefill(known)
    named = holder_of(spare.hello)
    assert (await workers.alike.prefill(prompt[:40], named)).peer == 32  # it is connected
    os.kill(spare.hello.pid, signal.SIGSTOP)
    try:
        frozen = await workers.alike.prefill(prompt, named)
        assert (frozen.cached, frozen.peer) == (32, 0)
        assert (await workers.alike.prefill(other, named)).peer == 0
        with pytest.raises(DeadlineExceeded):
            await workers.large.prefill(prompt, named, timeout=0.5)
        await workers.large.until_free()
    finally:
        os.kill(spare.hello.pid, signal.SIGCONT)
    computed = await spare.prefill(prompt)
    assert frozen.token == computed.token
    torch.testing.assert_close(frozen.kv, computed.kv, atol=1e-4, rtol=1e-4)
    await spare.until_free()


async def test_a_holder_that_is_gone_or_restarted_is_a_miss(workers, spare):
    prompt = prompt_of(40)
    computed = await workers.holder.prefill(prompt)
    await spare.prefill(prompt)
    os.kill(spare.hello.pid, signal.SIGKILL)
    gone = await workers.alike.prefill(prompt, holder_of(spare.hello))
    restarted = await workers.large.prefill(prompt, holder_of(workers.holder.hello, incarnation=5))
    for one in (gone, restarted):
        assert (one.cached, one.peer, one.token) == (0, 0, computed.token)


@pytest.mark.parametrize("spare_hello", [["--kv-memory=512KiB"]], indirect=True)
async def test_a_holder_that_has_evicted_the_prompt_is_a_miss(workers, spare):
    prompts = [prompt_of(seed) for seed in range(100, 106)]
    computed = [await spare.prefill(prompt) for prompt in prompts]
    for prompt, one in zip(prompts, computed, strict=True):
        got = await workers.alike.prefill(prompt, holder_of(spare.hello))
        assert got.peer == got.cached
        assert got.token == one.token
    latest = await workers.large.prefill(prompts[-1], holder_of(spare.hello))
    assert latest.peer == 128
    first = await workers.large.prefill(prompts[0], holder_of(spare.hello))
    assert first.peer < 128, "32 blocks hold three of the prompts"


@pytest.mark.parametrize("spare_hello", [["--grace-period=60"]], indirect=True)
async def test_a_worker_that_drains_lends_until_it_exits(workers, spare):
    prompts = [prompt_of(number) for number in (50, 52, 53)]
    for prompt in prompts:
        await spare.prefill(prompt)
    start = prefill_pb2.StartPrefill(
        transfer_id=b"t" * 16,
        prompt_token_ids=prompt_of(51),
        layers=[0],
        codec=common_pb2.KV_CODEC_RAW,
        sampling=common_pb2.SamplingParams(temperature=0),
        expected_incarnation=spare.hello.incarnation,
    )
    lease = spare.peer.control.Prefill()
    await lease.write(prefill_pb2.PrefillRequest(start=start))
    await lease.read()  # it is accepted, and nothing is acknowledged: the worker waits for the lease
    os.kill(spare.hello.pid, signal.SIGTERM)
    with pytest.raises(ShuttingDown):
        while True:
            await spare.prefill(prompts[0])
    for prompt in prompts:
        borrowed = await workers.alike.prefill(prompt, holder_of(spare.hello))
        if borrowed.peer:
            break
        await asyncio.sleep(RETRY_AFTER)  # on a busy machine the loan took too long, and its holder is left alone
    assert borrowed.peer == 144
    lease.cancel()


@pytest.mark.parametrize("spare_hello", [["--no-kv-peers"]], indirect=True)
async def test_workers_that_are_told_not_to_lend_or_borrow_do_not(workers, spare):
    prompt = prompt_of(60)
    assert not spare.hello.lends_kv
    assert workers.holder.hello.lends_kv
    for worker in (spare, workers.holder):
        await worker.prefill(prompt)
    assert (await workers.alike.prefill(prompt, holder_of(spare.hello))).peer == 0
    assert (await spare.prefill(prompt_of(61), holder_of(workers.holder.hello))).peer == 0


class ScriptedHolder(prefill_pb2_grpc.PrefillServicer):
    """Lends random KV. ``misbehave`` may change the messages of a stream.

    Attributes:
        only_once: whether every stream but the first has no messages.
        claims: tokens that it says it lends.
        pulling, ended: set when KV is pulled, and when the loan has ended.
    """

    def __init__(self, hello):
        self.described = prefill_pb2.DescribePrefillResponse(
            wire_version=hello.wire_version,
            worker_id="scripted",
            incarnation=secrets.randbits(63),  # a worker leaves one that has failed alone for a while
            model=hello.model,
            kv=hello.kv,
            codecs=[common_pb2.KV_CODEC_RAW],
        )
        self.kv = KvSpec.from_proto(hello.kv)
        self.claims, self.misbehave = 144, lambda messages: messages
        self.pulls, self.only_once = 0, False
        self.pulling, self.ended = asyncio.Event(), asyncio.Event()
        self.server = RpcServer()
        self.server.add(prefill_pb2_grpc.add_PrefillServicer_to_server, self, SERVICE)

    async def Describe(self, request, context):
        return self.described

    async def Lend(self, request_iterator, context):
        try:
            self.start = (await anext(aiter(request_iterator))).start
            yield prefill_pb2.LendResponse(tokens=self.claims)
            await anext(aiter(request_iterator), None)
        finally:
            self.ended.set()

    async def PullKv(self, request, context):
        self.pulling.set()
        self.pulls += 1
        if self.pulls > 1 and self.only_once:
            return
        async for message in self.misbehave(self.messages(request)):
            yield kv_pb2.KvChunk.FromString(message)

    async def messages(self, request):
        layers = tuple(range(self.kv.num_layers))
        spec = TransferSpec(request.transfer_id, 0, self.kv, layers, (0, self.claims))
        for box in map(KvRange.from_proto, request.ranges):
            for layer in box.layers:
                one = box._replace(layer_start=layer, layer_end=layer + 1)
                yield join_chunks([seal(spec, one, torch.randn(spec.raw_bytes(one) // 4).numpy().tobytes())])


@pytest.fixture
async def scripted(workers):
    holder = ScriptedHolder(workers.holder.hello)
    holder.address = await holder.server.start("127.0.0.1:0")
    holder.named = kv_pb2.KvHolder(
        worker_id="scripted", incarnation=holder.described.incarnation, address=holder.address, tokens=144
    )
    yield holder
    await holder.server.stop()


async def frozen(messages):
    async for message in messages:
        yield message
        await asyncio.Event().wait()


async def broken(messages):
    async for message in messages:
        yield message
        raise OverfillError("gone")


async def flipped(messages):
    async for message in messages:
        yield bytes([*message[:-20], message[-20] ^ 1, *message[-19:]])


async def cut_short(messages):
    async for message in messages:
        yield message
        return


async def of_another_transfer(messages):
    async for message in messages:
        chunk = kv_pb2.KvChunk.FromString(message)
        chunk.transfer_id = b"\0" * 16
        yield chunk.SerializeToString()


def other_model(holder):
    holder.described.model.full_digest = "0" * 64


def other_dtype(holder):
    holder.described.kv.dtype = common_pb2.DTYPE_BFLOAT16


def claims_more(holder):
    holder.claims = LENGTH + 1


def misbehaves(how):
    def spoil(holder):
        holder.misbehave, holder.only_once = how, how in (broken, cut_short)

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(spoil, id=name)
        for name, spoil in {
            "frozen in mid-pull": misbehaves(frozen),
            "gone in mid-pull": misbehaves(broken),
            "damaged KV": misbehaves(flipped),
            "less KV than claimed": misbehaves(cut_short),
            "KV of another transfer": misbehaves(of_another_transfer),
            "another model": other_model,
            "another dtype": other_dtype,
            "more tokens than asked": claims_more,
        }.items()
    ],
)
async def test_a_prompt_whose_holder_fails_in_mid_pull_is_computed(workers, scripted, spoil):
    spoil(scripted)
    prompt = prompt_of(70)
    expected = await workers.holder.prefill(prompt)
    namespace = spoil.__qualname__ + scripted.address  # nothing of it is cached
    got = await workers.alike.prefill(prompt, scripted.named, namespace)
    assert (got.cached, got.peer, got.token) == (0, 0, expected.token)
    torch.testing.assert_close(got.kv, expected.kv, atol=1e-4, rtol=1e-4)
    if hasattr(scripted, "start"):
        await asyncio.wait_for(scripted.ended.wait(), 5)


async def test_what_the_scripted_holder_lends_is_taken_when_nothing_is_wrong_with_it(workers, scripted):
    """The tests above would prove nothing otherwise."""
    got = await workers.alike.prefill(prompt_of(71), scripted.named, "scripted")
    assert got.peer == 144


@pytest.mark.parametrize("end", ["cancelled", "deadline"])
async def test_a_request_that_ends_in_mid_import_leaves_nothing_in_use(workers, scripted, end):
    scripted.misbehave = frozen
    timeout = 0.5 if end == "deadline" else 20.0
    prompt = asyncio.ensure_future(workers.alike.prefill(prompt_of(72), scripted.named, scripted.address, timeout))
    await asyncio.wait_for(scripted.pulling.wait(), 5)
    assert await workers.alike.blocks_used() == 10
    if end == "cancelled":
        prompt.cancel()
    with pytest.raises((asyncio.CancelledError, DeadlineExceeded)):
        await prompt
    await workers.alike.until_free()
    await asyncio.wait_for(scripted.ended.wait(), 5)
